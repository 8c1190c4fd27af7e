"""What training a model costs: memory per card and time per step, from its configuration alone, without Paddle.

The activations are counted tensor by tensor from what the code keeps for its backward pass; the tables below name each.
The counts of the CPU, and those of the operations that GPUs take outside attention, agree with what Paddle allocates
(``tests/training/test_costs.py``). Nothing has been measured on a GPU: flash attention's share and the half precisions
follow from Paddle's sources, for heads whose size is a multiple of 8 (others fall back to plain attention there).

Not counted: the CUDA context, workspaces of libraries, buffers of communication, and fragmentation. The last is large
on the CPU, where :func:`paddle_dit.runtime.prepare` trades it for speed: there the process grew by 1.3 to 3 times the
activations; where glibc gives large blocks back, by little more than the activations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from paddle_dit.config import DiTConfig, Dtype
from paddle_dit.errors import ConfigError
from paddle_dit.training.recipe import AmpLevel, Sharding

# Dense bf16 TFLOP/s of one card, from NVIDIA's data sheets, which often print twice that, for sparse matrices.
PEAK_TFLOPS = {
    "V100": 125.0,  # fp16: it has no bf16
    "A10": 125.0,
    "A30": 165.0,
    "A100": 312.0,
    "A800": 312.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.0,
    "L4": 121.0,
    "L40S": 362.0,
    "H20": 148.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
}


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as its costs go.

    Attributes:
        samples_per_micro_batch: samples that one rank takes through the model at once.
        ranks: cards: data-parallel ranks times ``tensor_parallel_degree``.
        recompute_every: as of :class:`~paddle_dit.models.dit.DiT`.
        precision: of the matrix products.
        amp_level: O1 keeps float32 weights and casts them for each product; O2 keeps half-precision weights, and
            float32 master weights in the optimizer. Without a meaning in fp32.
        sharding: what the data-parallel ranks divide among them: the optimizer's state, the master weights and the EMA
            (stage1), the gradients too (stage2), the weights too (stage3).
        tensor_parallel_degree: ranks that share each block's qkv, proj, fc1 and fc2 and the activations between them.
        device: the CPU has hand-written gradients and keeps the softmax; GPUs have flash attention.
    """

    samples_per_micro_batch: int
    ranks: int = 1
    recompute_every: int = 0
    precision: Dtype = "fp32"
    amp_level: AmpLevel = "O2"
    sharding: Sharding = "none"
    tensor_parallel_degree: int = 1
    device: Literal["cpu", "gpu"] = "gpu"

    def __post_init__(self):
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)
            if choices and value not in choices:
                raise ConfigError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        for name, least in (("samples_per_micro_batch", 1), ("recompute_every", 0), ("tensor_parallel_degree", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.ranks < 1 or self.ranks % self.tensor_parallel_degree:
            raise ConfigError(
                f"ranks {self.ranks} must be a multiple of tensor_parallel_degree {self.tensor_parallel_degree}"
            )
        if self.device == "cpu" and self.precision != "fp32":
            raise ConfigError(f"precision {self.precision} needs a GPU: Paddle computes in fp32 on the CPU")

    @property
    def casts(self) -> bool:
        """Whether float32 weights are cast for each product."""
        return self.precision != "fp32" and self.amp_level == "O1"

    @property
    def halves(self) -> bool:
        """Whether the weights themselves are in half precision."""
        return self.precision != "fp32" and self.amp_level == "O2"

    def recomputes(self, index: int) -> bool:
        """Whether block ``index`` is recomputed in the backward pass."""
        return self.recompute_every > 0 and index % self.recompute_every == 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one card at the peak of a step.

    Attributes:
        weights: with the fixed position table.
        gradients: they stay allocated from step to step, so they are there beside the activations.
        optimizer: AdamW's two float32 moments.
        master_weights: the float32 copy that O2 keeps.
        ema: float32.
        activations: the most that a micro-batch adds to the above, while its forward and backward pass run.
    """

    weights: int
    gradients: int
    optimizer: int
    master_weights: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory(config: DiTConfig, setup: Setup) -> Memory:
    """Return the bytes that training ``config`` takes on each card.

    Raises:
        ConfigError: the heads or the MLP cannot be divided among the tensor-parallel ranks.
    """
    degree = setup.tensor_parallel_degree
    if config.num_heads % degree or int(config.hidden_size * config.mlp_ratio) % degree:
        raise ConfigError(f"tensor_parallel_degree {degree} must divide {config.num_heads} heads and the MLP's width")
    buffer = math.prod(config.grid) * config.hidden_size
    trained = config.num_parameters() - buffer - config.depth * _split_away(config, degree)
    held = 2 if setup.halves else 4
    stage = get_args(Sharding).index(setup.sharding)

    def share(elements: int, sharded_from: int) -> int:
        """Elements of one rank, where the data-parallel ranks divide them from stage ``sharded_from`` on."""
        return -(-elements * degree // setup.ranks) if stage >= sharded_from else elements

    return Memory(
        weights=held * (share(trained, 3) + buffer),
        gradients=held * share(trained, 2),
        optimizer=8 * share(trained, 1),
        master_weights=4 * share(trained, 1) if setup.halves else 0,
        ema=4 * share(trained, 1),
        activations=_activations(config, setup),
    )


def train_flops(config: DiTConfig, recompute_every: int = 0) -> float:
    """Return the FLOPs of training on one image: 6 per multiply-add, and 2 more in blocks that are recomputed.

    A multiply-add is two operations, and the backward pass has two products for each of the forward pass.
    """
    recomputed = math.ceil(config.depth / recompute_every) if recompute_every else 0
    return 6.0 * config.multiply_adds() + 2.0 * recomputed * _of_a_block(config, DiTConfig.multiply_adds)


def seconds_per_step(config: DiTConfig, setup: Setup, global_batch_size: int, tflops: float) -> float:
    """Return the seconds of one update.

    Args:
        config: the model.
        setup: how it is trained; its ranks share the work evenly.
        global_batch_size: images per update.
        tflops: 1e12 operations per second that each card sustains: its entry in :data:`PEAK_TFLOPS` for a lower bound,
            times the utilisation measured for an estimate. Communication counts as lost utilisation.
    """
    return global_batch_size * train_flops(config, setup.recompute_every) / (setup.ranks * tflops * 1e12)


def _of_a_block(config: DiTConfig, count: Callable[[DiTConfig], int]) -> int:
    """Return what one block adds to ``count`` of the model."""
    return count(replace(config, depth=2)) - count(replace(config, depth=1))


def _split_away(config: DiTConfig, degree: int) -> int:
    """Return the parameters of a block that one of ``degree`` tensor-parallel ranks leaves to the others.

    qkv and fc1 are divided by columns, and so are their biases; proj and fc2 by rows, and their biases are everywhere.
    """
    width, mlp = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    split = 4 * width * width + 2 * width * mlp + 3 * width + mlp
    return split - split // degree


@dataclass(frozen=True)
class _Kept:
    """Tensors that one layer keeps for its backward pass: ``count`` times ``unit`` elements per token.

    ``split``: tensor-parallel ranks divide them. ``wide``: at which AMP levels they are float32 nevertheless.
    """

    what: str
    count: float
    unit: str
    split: bool = False
    wide: tuple[str, ...] = ()


_HALF = ("O1", "O2")

# Paddle's own operations, as models/dit.py and models/fused.py use them on GPUs. The modulation of the norms is float32
# at both levels, and so are statistics in Paddle's kernels; O1 also casts what enters layer_norm.
_BLOCK_ON_GPU = (
    _Kept("inputs of the two norms: the residual stream", 2, "width", wide=("O1",)),
    _Kept("normalised tokens, and the gains repeated for every token", 4, "width", wide=_HALF),
    _Kept("means and variances of the norms", 4, "one", wide=_HALF),
    _Kept("inputs of qkv and fc1", 2, "width"),
    _Kept("queries, keys and values", 3, "width", split=True),
    _Kept("log-sum-exp of the scores (flash attention)", 1, "heads", split=True, wide=_HALF),
    _Kept("output of attention, the input of proj", 1, "width", split=True),
    _Kept("input and output of the GELU", 2, "mlp", split=True),
    _Kept("outputs of proj and fc2, and the gates repeated for every token", 4, "width"),
    _Kept("SiLU of the conditioning", 1, "sample"),
)
# The gradients of models/fused.py: no input of a norm and nothing repeated, but every score of the plain attention.
_BLOCK_ON_CPU = (
    _Kept("normalised tokens", 2, "width"),
    _Kept("inverse deviations of the norms", 2, "one"),
    _Kept("inputs of qkv and fc1", 2, "width"),
    _Kept("scaled queries, keys and values", 3, "width", split=True),
    _Kept("softmax of the scores", 1, "scores", split=True),
    _Kept("output of attention, the input of proj", 1, "width", split=True),
    _Kept("input and output of the GELU", 2, "mlp", split=True),
    _Kept("outputs of proj and fc2, which the gates multiply", 2, "width"),
    _Kept("SiLU of the conditioning, two gains, two gates", 5, "sample"),
)
_FINAL_ON_GPU = (
    _Kept("input of the norm", 1, "width", wide=("O1",)),
    _Kept("normalised tokens, and the gain repeated for every token", 2, "width", wide=_HALF),
    _Kept("mean and variance of the norm", 2, "one", wide=_HALF),
    _Kept("input of the linear layer", 1, "width"),
    _Kept("SiLU of the conditioning", 1, "sample"),
)
_FINAL_ON_CPU = (
    _Kept("normalised tokens and the input of the linear layer", 2, "width"),
    _Kept("inverse deviation of the norm", 1, "one"),
    _Kept("SiLU of the conditioning and the gain", 2, "sample"),
)
# What the final layer's backward pass then holds at its widest, in the modulated norm.
_FINAL_BACKWARD_ON_GPU = (
    _Kept("gradients of both terms and both factors", 4, "width", wide=_HALF),
    _Kept("gone: input of the linear layer", -1, "width"),
)
_FINAL_BACKWARD_ON_CPU = (
    _Kept("gradient, its product with the normalised tokens, three terms of the input's gradient", 5, "width"),
    _Kept("gone: input of the linear layer", -1, "width"),
)
_EMBEDDERS = (
    _Kept("patches", 1, "latent"),
    _Kept("sinusoids of the timestep", 1, "frequencies"),
    _Kept("input and output of the timestep's SiLU, and the conditioning", 3, "sample"),
)
_RESIDUAL = _Kept("residual stream", 1, "width")

# diffusion/objective.py at its widest point, when the last torch.where of the likelihood has run. All in float32,
# in tensors of a latent's shape.
_LOSS_WITH_VARIANCE = (
    _Kept("clean latents, noise and noisy latents", 3, "latent"),
    _Kept("the model's output, and its halves: noise and variance", 4, "latent"),
    _Kept("error of the noise, for its square", 1, "latent"),
    _Kept("factors of the log-variance", 2, "latent"),
    _Kept("divergence: two exponentials and a square", 3, "latent"),
    _Kept("bin's borders in deviations: 1 / deviation, and two distances", 3, "latent"),
    _Kept("the two distribution functions: four tensors each", 8, "latent"),
    _Kept("logarithms: upper, floor, two differences and three maxima", 7, "latent"),
    _Kept("masks of the two conditions, one byte per element", 0.5, "latent"),
    _Kept("locals of the bound: three log-variances, two coefficients, x0, two means, divergence", 9, "latent"),
    _Kept("locals of the likelihood: log-deviation, distance, lower, three logarithms, two choices", 8, "latent"),
)
_LOSS_OF_NOISE = (
    _Kept("clean latents, noise and noisy latents", 3, "latent"),
    _Kept("the model's output", 1, "latent"),
    _Kept("error of the noise, and its square", 2, "latent"),
)


def _activations(config: DiTConfig, setup: Setup) -> int:
    """Return the most bytes that one micro-batch holds at once.

    That is in the loss, or in the backward pass of the final layer or of a block. The forward pass of a block never
    holds more than its backward pass, which starts with all that the former kept.
    """
    on_cpu = setup.device == "cpu"
    block = _bytes(config, setup, _BLOCK_ON_CPU if on_cpu else _BLOCK_ON_GPU)
    if setup.casts:  # the products keep the half-precision copies of their weights
        degree = setup.tensor_parallel_degree
        block += 2 * (_of_a_block(config, DiTConfig.num_parameters) - _split_away(config, degree))
    residual = _bytes(config, setup, (_RESIDUAL,))
    # A recomputed block has its input, its fresh output, and the copy of the latter's gradient that
    # paddle.autograd.backward makes. On GPUs its table has the input, as the first norm's, unless O1 cast that.
    recomputed = (3 if on_cpu or setup.casts else 2) * residual
    kept, peaks = _bytes(config, setup, _EMBEDDERS), []
    for index in range(config.depth):
        again = setup.recomputes(index)
        peaks.append(kept + block + _backward_extra(config, setup) + again * recomputed)
        kept += residual if again else block
    kept += _bytes(config, setup, _FINAL_ON_CPU if on_cpu else _FINAL_ON_GPU)
    peaks.append(kept + _bytes(config, setup, _FINAL_BACKWARD_ON_CPU if on_cpu else _FINAL_BACKWARD_ON_GPU))
    loss = _LOSS_WITH_VARIANCE if config.learn_sigma else _LOSS_OF_NOISE
    peaks.append(kept + _bytes(config, replace(setup, precision="fp32"), loss))
    return math.ceil(max(peaks))


def _backward_extra(config: DiTConfig, setup: Setup) -> float:
    """Return the bytes that a block's backward pass holds at its widest point beyond what its forward pass kept.

    Two points compete. In the MLP, fc2's gradients: the residual stream's, the branch's, the GELU output's and the new
    weight's, when the last gate's factors are gone. In the CPU's attention, the softmax: two gradients as large as the
    scores, when nothing of the MLP and neither proj's input nor the values are left.
    """
    degree = setup.tensor_parallel_degree
    mlp = int(config.hidden_size * config.mlp_ratio)
    two_residuals = _Kept("gradients of the residual stream and of the branch", 2, "width")
    hidden = _Kept("gradient of the GELU's output", 1, "mlp", split=True)
    gone = _Kept("output of fc2, and on GPUs its repeated gate", -1 if setup.device == "cpu" else -2, "width")
    new_gradient = (2 if setup.precision != "fp32" else 4) * config.hidden_size * mlp / degree
    in_mlp = _bytes(config, setup, (two_residuals, hidden, gone)) + new_gradient
    if setup.device == "gpu":
        return in_mlp
    scores = _Kept("gradients of the softmax and of the scores", 2, "scores", split=True)
    stream = _Kept("second norm, input of fc1, both branches' outputs, less the residual gradient", -3, "width")
    values = _Kept("output of attention, values, less the values' gradient", -1, "width", split=True)
    inner = _Kept("input and output of the GELU", -2, "mlp", split=True)
    return max(in_mlp, _bytes(config, setup, (scores, stream, values, inner)))


def _bytes(config: DiTConfig, setup: Setup, table: tuple[_Kept, ...]) -> float:
    """Return the bytes of a table for one micro-batch on one rank."""
    tokens = math.prod(config.grid)
    units = {
        "one": 1,
        "width": config.hidden_size,
        "mlp": int(config.hidden_size * config.mlp_ratio),
        "heads": config.num_heads,
        "scores": config.num_heads * tokens,
        "latent": config.in_channels * config.patch_size**2,
        "sample": config.hidden_size / tokens,  # [N, D] tensors: one per sample, not per token
        "frequencies": 256 / tokens,
    }
    per_token = 0.0
    for kept in table:
        size = 4 if setup.precision == "fp32" or setup.amp_level in kept.wide else 2
        share = setup.tensor_parallel_degree if kept.split else 1
        per_token += size * kept.count * units[kept.unit] / share
    return setup.samples_per_micro_batch * tokens * per_token
