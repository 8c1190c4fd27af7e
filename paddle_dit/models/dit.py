"""The diffusion transformer with adaLN-Zero blocks (Peebles and Xie 2023, section 3.2 and figure 3).

Parameters carry the names of the paper's code. Linear weights are ``[in, out]``, as Paddle has them.

Some forms are chosen for Paddle's CPU kernels, where they are several times faster and exact: ``chunk``
instead of ``unbind``, ``expand`` before a broadcast product, and patches cut by reshapes instead of a convolution.
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

from paddle_dit.config import DiTConfig
from paddle_dit.models.fused import Linear, add_gated, along_tokens, modulated_norm
from paddle_dit.models.refit import FREQUENCIES
from paddle_dit.positions import sincos_position_table


class PatchEmbed(nn.Layer):
    """Cut latents into patches and project each to the model's width."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.patch_size, self.grid = config.patch_size, config.grid
        self.proj = Linear(config.in_channels * config.patch_size**2, config.hidden_size)

    def forward(self, x):
        """Map ``[N, C, H, W]`` to tokens ``[N, T, D]``."""
        channels, patch = x.shape[1], self.patch_size
        rows, columns = self.grid
        x = x.reshape([-1, channels, rows, patch, columns, patch])
        x = x.transpose([0, 2, 4, 1, 3, 5])  # (N, rows, columns, C, p, p)
        return self.proj(x.reshape([-1, rows * columns, channels * patch * patch]))


class TimestepEmbedder(nn.Layer):
    """Embed timesteps by sinusoids and a two-layer MLP."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.hidden_size
        self.divisor = FREQUENCIES // 2 - config.frequency_shift
        self.mlp = nn.Sequential(Linear(FREQUENCIES, width), nn.Silu(), Linear(width, width))

    def forward(self, timesteps):
        """Map timesteps ``[N]`` to ``[N, D]``.

        The frequencies are computed here, not kept in a buffer, so that casting the model cannot round them.
        """
        exponents = paddle.arange(FREQUENCIES // 2, dtype="float32") * -math.log(10000) / self.divisor
        frequencies = paddle.exp(exponents)
        angles = timesteps.astype("float32").unsqueeze(1) * frequencies.unsqueeze(0)
        sinusoids = paddle.concat([angles.cos(), angles.sin()], axis=-1)
        return self.mlp(sinusoids.astype(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Layer):
    """Table of class embeddings; the last row is the null class."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.label_rows, config.hidden_size)

    def forward(self, class_labels):
        """Map labels ``[N]`` to ``[N, D]``."""
        return self.embedding_table(class_labels)


class Attention(nn.Layer):
    """Multi-head self-attention."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.hidden_size
        self.head_size = width // config.num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x):
        """Map ``[N, T, D]`` to ``[N, T, D]``."""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv):
        """Map the queries, keys and values of some heads, ``[N, T, 3 * heads * d]``, to ``[N, T, heads * d]``.

        The number of heads is read off the width: under tensor parallelism a process has a part of them.
        """
        tokens, width = qkv.shape[1], qkv.shape[2] // 3
        heads = width // self.head_size
        if paddle.get_device().startswith("gpu"):
            parts = [part.reshape([-1, tokens, heads, self.head_size]) for part in qkv.chunk(3, axis=-1)]
            out = F.scaled_dot_product_attention(*parts)  # (N, T, heads, d)
        else:
            parts = qkv.reshape([-1, tokens, 3 * heads, self.head_size]).transpose([0, 2, 1, 3])
            query, key, value = parts.chunk(3, axis=1)  # (N, heads, T, d)
            scores = paddle.matmul(query * self.head_size**-0.5, key, transpose_y=True)
            out = paddle.matmul(F.softmax(scores, axis=-1), value).transpose([0, 2, 1, 3])
        return out.reshape([-1, tokens, width])


class Mlp(nn.Layer):
    """Two linear layers with a GELU (tanh form) between them."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = Linear(config.hidden_size, hidden)
        self.fc2 = Linear(hidden, config.hidden_size)

    def forward(self, x):
        """Map ``[N, T, D]`` to ``[N, T, D]``."""
        return self.fc2(F.gelu(self.fc1(x), approximate=True))


class DiTBlock(nn.Layer):
    """Transformer block whose normalisation is modulated, and whose branches are gated, by the conditioning."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.width, self.norm_eps = config.hidden_size, config.norm_eps
        self.attn = Attention(config)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), Linear(self.width, 6 * self.width))

    def forward(self, x, conditioning):
        """Map tokens ``[N, T, D]`` and ``conditioning [N, D]`` to tokens ``[N, T, D]``."""
        return self.modulated(x, self.adaLN_modulation(conditioning))

    def modulated(self, x, modulation):
        """Map tokens ``[N, T, D]`` to tokens ``[N, T, D]``, given what the conditioning makes of the block.

        ``modulation`` is ``[N, 6 * D]``: shift, scale and gate of the attention, then of the MLP.
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        x = add_gated(x, self.attn(modulated_norm(x, shift_msa, scale_msa, self.norm_eps)), gate_msa)
        return add_gated(x, self.mlp(modulated_norm(x, shift_mlp, scale_mlp, self.norm_eps)), gate_mlp)


class FinalLayer(nn.Layer):
    """Modulated LayerNorm and projection back to patches."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.width, self.norm_eps = config.hidden_size, config.norm_eps
        self.linear = Linear(self.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), Linear(self.width, 2 * self.width))

    def forward(self, x, conditioning):
        """Map tokens ``[N, T, D]`` to patches ``[N, T, p * p * out_channels]``."""
        return self.modulated(x, self.adaLN_modulation(conditioning))

    def modulated(self, x, modulation):
        """Map tokens ``[N, T, D]`` to patches, given shift and scale, ``modulation [N, 2 * D]``."""
        shift, scale = modulation.chunk(2, -1)
        return self.linear(modulated_norm(x, shift, scale, self.norm_eps))


class DiT(nn.Layer):
    """Diffusion transformer: predicts the noise (and the variance) of latents at a timestep, given a class.

    ``recompute_every = k`` recomputes every k-th block in the backward pass instead of keeping its activations
    (1: all blocks, 0: none).
    """

    def __init__(self, config: DiTConfig, recompute_every: int = 0):
        super().__init__()
        self.config, self.recompute_every = config, recompute_every
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        table = sincos_position_table(config.hidden_size, config.grid)
        self.register_buffer("pos_embed", paddle.to_tensor(table).unsqueeze(0), persistable=False)
        self.blocks = nn.LayerList([DiTBlock(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    @paddle.no_grad()
    def initialize_weights(self) -> None:
        """Initialise as the paper: xavier, normal 0.02 embeddings, zero modulation and final layer (section 3.2)."""
        xavier, zeros, normal = (
            nn.initializer.XavierUniform(),
            nn.initializer.Constant(0.0),
            nn.initializer.Normal(0, 0.02),
        )
        for layer in self.sublayers():
            if isinstance(layer, nn.Linear):
                xavier(layer.weight)
                zeros(layer.bias)
        normal(self.y_embedder.embedding_table.weight)
        normal(self.t_embedder.mlp[0].weight)
        normal(self.t_embedder.mlp[2].weight)
        for block in self.blocks:
            zeros(block.adaLN_modulation[1].weight)
        zeros(self.final_layer.adaLN_modulation[1].weight)
        zeros(self.final_layer.linear.weight)

    def forward(self, x, timesteps, class_labels):
        """Predict noise and variance.

        Args:
            x: noisy latents, float ``[N, C, H, W]``.
            timesteps: ``[N]``, 0 .. 999.
            class_labels: int64 ``[N]``; ``config.null_class`` for no class.

        Returns:
            ``[N, C, H, W]``, or ``[N, 2C, H, W]`` with ``learn_sigma``: the noise, then the variance as a fraction
            in [-1, 1] between the smallest and the largest log-variance.
        """
        if tuple(x.shape[1:]) != self.config.sample_shape:
            raise ValueError(
                f"latents are {list(x.shape)}, this model takes [N, {str(self.config.sample_shape)[1:-1]}]"
            )
        x = self.embed(x)  # (N, T, D)
        conditioning = self.t_embedder(timesteps) + self.y_embedder(class_labels)  # (N, D)
        for index, block in enumerate(self.blocks):
            x = self._run_block(index, block, x, conditioning)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, conditioning))  # (N, out_channels, H, W)

    def embed(self, x):
        """Map latents ``[N, C, H, W]`` to tokens at their positions, ``[N, T, D]``."""
        x = self.x_embedder(x)
        return x + along_tokens(self.pos_embed.astype(x.dtype), x)

    def _run_block(self, index: int, block: DiTBlock, x, conditioning):
        # Without an input that needs a gradient, Paddle's recompute would give a block's own weights none either.
        reached = not (x.stop_gradient and conditioning.stop_gradient)
        if self.training and self.recompute_every and index % self.recompute_every == 0 and reached:
            from paddle.distributed.fleet.utils import recompute

            return recompute(block, x, conditioning)
        return block(x, conditioning)

    def unpatchify(self, x):
        """Map ``[N, T, p * p * C]`` to ``[N, C, H, W]``."""
        rows, columns = self.config.grid
        patch, channels = self.config.patch_size, self.config.out_channels
        x = x.reshape([-1, rows, columns, patch, patch, channels]).transpose([0, 5, 1, 3, 2, 4])
        return x.reshape([-1, channels, rows * patch, columns * patch])
