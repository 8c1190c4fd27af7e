"""The programs of an engine as Paddle layers, to be run as they are or traced for a backend.

Inputs and outputs are those of :mod:`paddle_dit.deploy.specs`, by name.
"""

import paddle
from paddle import nn

from paddle_dit.deploy.specs import CACHED_STEP, CONDITIONING, DECODER, MODEL, STEP
from paddle_dit.models.dit import DiT


class Conditioning(nn.Layer):
    """What every block makes of timestep and label, which depends on nothing else: one table for a whole image."""

    def __init__(self, model: DiT):
        super().__init__()
        self.model = model

    def forward(self, timesteps, class_labels):
        """Map timesteps ``[S]`` and labels ``[K]`` to modulations ``[S * K, M]``; all labels of a step are together."""
        timestep, label = self.model.t_embedder(timesteps), self.model.y_embedder(class_labels)
        conditioning = timestep.unsqueeze(1) + label.unsqueeze(0)  # (S, K, D)
        return modulations(self.model, conditioning.reshape([-1, conditioning.shape[-1]]))


def modulations(model: DiT, conditioning):
    """Map ``conditioning [N, D]`` to all blocks' modulations and the final layer's, ``[N, M]``."""
    layers = [*model.blocks, model.final_layer]
    return paddle.concat([layer.adaLN_modulation(conditioning) for layer in layers], axis=-1)


class CachedStep(nn.Layer):
    """A step of any sampler, given the modulations: guidance, transformer and update."""

    def __init__(self, model: DiT):
        super().__init__()
        self.model = model

    def forward(self, x, combination, coefficients, previous_x0, noise, modulation, rows):
        """Return the next latents and the prediction of ``x_0``, both ``[N, C, H, W]``.

        Args:
            x: latents, ``[N, C, H, W]``.
            combination: ``[G, C]``: the predicted noise is the sum of the copies' times these.
            coefficients: ``[9]``, see :data:`~paddle_dit.deploy.specs.COEFFICIENTS`.
            previous_x0: ``[N, C, H, W]``, what the step before predicted.
            noise: ``[N, C, H, W]``.
            modulation: ``[R, M]``, a table of :class:`Conditioning`.
            rows: int64 ``[G, N]``, the table's row of each copy of each image. ``G`` is 2 where images are guided.
        """
        return self.update(
            x, combination, coefficients, previous_x0, noise, paddle.gather(modulation, rows.flatten()), rows
        )

    def update(self, x, combination, coefficients, previous_x0, noise, modulation, pairs):
        """Return what :meth:`forward` does, given the modulation of each copy of each image, ``[G * N, M]``."""
        out = self.predict(x, modulation, pairs)  # (G, N, out_channels, H, W)
        channels = x.shape[1]
        eps = (out[:, :, :channels] * combination.unsqueeze(1).unsqueeze(-1).unsqueeze(-1)).sum(0)
        on_x, on_eps, on_x0, deviation, learned, low, high, x0_on_x, x0_on_eps = coefficients.split(9)
        if self.model.config.learn_sigma:
            share = 0.5 * (out[0, :, channels:] + 1)
            deviation = deviation + learned * paddle.exp(0.5 * (low + share * (high - low)))
        next_x = on_x * x + on_eps * eps + on_x0 * previous_x0 + deviation * noise
        return next_x, x0_on_x * x + x0_on_eps * eps

    def predict(self, x, modulation, pairs):
        """Return the transformer's output for every copy of every image, ``[G, N, out_channels, H, W]``."""
        model = self.model
        # Copies share their tokens until the first modulation. ONNX cannot expand to a size that it does not know.
        tokens = model.embed(x).unsqueeze(0) + paddle.zeros_like(pairs).astype(x.dtype).unsqueeze(-1).unsqueeze(-1)
        tokens = tokens.reshape([-1, *tokens.shape[2:]])  # (G * N, T, D)
        size = 6 * model.config.hidden_size
        for index, block in enumerate(model.blocks):
            tokens = block.modulated(tokens, modulation[:, index * size : (index + 1) * size])
        out = model.unpatchify(model.final_layer.modulated(tokens, modulation[:, len(model.blocks) * size :]))
        return out.reshape([paddle.shape(pairs)[0], -1, *out.shape[1:]])


class Step(CachedStep):
    """The same with the conditioning inside: what a step costs where nothing is computed before the loop."""

    def forward(self, x, combination, coefficients, previous_x0, noise, timesteps, class_labels):
        """As for :class:`CachedStep`, with int64 ``timesteps`` and ``class_labels``, both ``[G, N]``, in its place."""
        model = self.model
        conditioning = model.t_embedder(timesteps.flatten()) + model.y_embedder(class_labels.flatten())
        table = modulations(model, conditioning)
        return self.update(x, combination, coefficients, previous_x0, noise, table, timesteps)


class Decoder(nn.Layer):
    """The decoder of a VAE.

    paddle2onnx converts GroupNorm of four dimensions alone, so that of an attention, which has three, is given a fourth
    of size 1. The results are the same.
    """

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        for layer in vae.decoder.sublayers():
            if getattr(layer, "group_norm", None) is not None:  # an attention
                layer.group_norm.register_forward_pre_hook(_with_fourth)
                layer.group_norm.register_forward_post_hook(_without_fourth)

    def forward(self, latents):
        """Map latents as the VAE made them, ``[N, C, h, w]``, to pixels ``[N, 3, H, W]``."""
        return self.vae.decode(latents).sample


def _with_fourth(norm, inputs):
    return inputs[0].unsqueeze(-1) if inputs[0].ndim == 3 else inputs[0]


def _without_fourth(norm, inputs, output):
    return output.squeeze(-1) if output.ndim == 4 else output  # an earlier decoder of the same VAE has its hooks, too


def build_layers(model: DiT, vae) -> dict[str, nn.Layer]:
    """Return the layer of every program, all in evaluation mode, which share the weights of model and VAE."""
    layers = {
        MODEL: model,
        STEP: Step(model),
        CACHED_STEP: CachedStep(model),
        CONDITIONING: Conditioning(model),
        DECODER: Decoder(vae),
    }
    for layer in layers.values():
        layer.eval()
    return layers
