"""Does ppdiffusers' stock transformer compute what our model computes, and how far does the frequency_shift move it?"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paddle

from paddle_dit.config import DiTConfig
from paddle_dit.conversion.loading import build_dit
from paddle_dit.conversion.ppdiffusers_pipeline import stock_config
from paddle_dit.errors import ConversionError
from paddle_dit.models.refit import FREQUENCIES

TOLERANCE = 1e-5  # of the largest output, or absolute where that is below 1
TIMESTEPS = (0, 1, 250, 500, 998, 999)


@dataclass(frozen=True)
class Comparison:
    """What a comparison found, over random inputs at :data:`TIMESTEPS`.

    Attributes:
        max_error: largest difference between the stock transformer's outputs and ours, both at frequency_shift 1.
        largest: largest absolute output.
        deviations: timestep -> largest difference that the model's own frequency_shift makes.
    """

    max_error: float
    largest: float
    deviations: dict[int, float]

    @property
    def deviation(self) -> float:
        """Largest of the deviations."""
        return max(self.deviations.values(), default=math.nan)


NOT_COMPARED = Comparison(math.nan, math.nan, {})


def load_stock(folder: Path):
    """Return the transformer of a DiTPipeline folder that we wrote, as the stock class loads it."""
    from ppdiffusers import DiTPipeline

    return DiTPipeline.from_pretrained(str(folder)).transformer


def build_stock(tensors: Mapping[str, np.ndarray], config: DiTConfig, turned: bool, norm_eps: float | None = None):
    """Return ppdiffusers' transformer with foreign tensors, none of which has gone through our tables.

    Args:
        tensors: under ppdiffusers' names, which are diffusers'.
        config: of the model.
        turned: linear weights are PyTorch's.
        norm_eps: of the norm before an MLP, where it is not ours.

    Raises:
        ConversionError: tensors are missing or do not fit.
    """
    from ppdiffusers import Transformer2DModel

    rows = len(tensors["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"])
    values = stock_config(config) | {"num_embeds_ada_norm": rows - 1}
    stock = Transformer2DModel(**values | ({} if norm_eps is None else {"norm_eps": norm_eps}))
    for name, parameter in stock.state_dict().items():
        array = tensors[name].astype(np.float32)
        if turned and array.ndim == 2 and not name.endswith("embedding_table.weight"):
            array = array.T
        parameter.set_value(np.ascontiguousarray(array))
    stock.eval()
    return stock


@paddle.no_grad()
def compare_outputs(
    stock,
    tensors: Mapping[str, np.ndarray],
    config: DiTConfig,
    tolerance: float = TOLERANCE,
    report: Callable[[int], object] = lambda count: None,
) -> Comparison:
    """Compare a stock transformer with our model on random inputs, at the stock frequency_shift 1.

    Args:
        stock: ppdiffusers' ``Transformer2DModel``.
        tensors: ours.
        config: of ours.
        tolerance: of the largest output, or absolute where that is below 1.
        report: is told after each timestep that one more is done.

    Raises:
        ConversionError: the error is above the tolerance, or not a number.
    """
    model = build_dit(tensors, replace(config, frequency_shift=1), "the converted model")
    max_error = largest = 0.0
    deviations = {}
    for timestep, (x, timesteps, labels, stock_labels) in _random_inputs(config, stock.config.num_embeds_ada_norm):
        wanted = model(x, timesteps, labels)
        error = stock(x, timestep=timesteps, class_labels=stock_labels).sample - wanted
        deviations[timestep] = 0.0
        if config.frequency_shift != 1:
            model.t_embedder.divisor = FREQUENCIES // 2 - config.frequency_shift
            deviations[timestep] = float((model(x, timesteps, labels) - wanted).abs().max())
            model.t_embedder.divisor = FREQUENCIES // 2 - 1
        # np.maximum keeps NaN, which max() may drop.
        max_error = float(np.maximum(max_error, float(error.abs().max())))
        largest = float(np.maximum(largest, float(wanted.abs().max())))
        report(1)
    if not max_error <= tolerance * max(1.0, largest):
        raise ConversionError(
            f"the stock transformer's output differs from the model's by {max_error:.3g} (largest output "
            f"{largest:.3g}), above {tolerance:g}; nothing was written"
        )
    return Comparison(max_error, largest, deviations)


def _random_inputs(config: DiTConfig, stock_null_class: int) -> Iterator[tuple]:
    """Yield a timestep, and noise ``[n, C, H, W]``, timesteps ``[n]``, our labels ``[n]`` and the stock class's."""
    labels = {0: 0, config.num_classes - 1: config.num_classes - 1} if config.num_classes else {}
    if config.has_null_class:
        labels[config.null_class] = stock_null_class
    ours, stocks = (np.array(list(side), dtype=np.int64) for side in (labels.keys(), labels.values()))
    rng = np.random.default_rng(0)
    for timestep in TIMESTEPS:
        x = rng.standard_normal((len(labels), *config.sample_shape), dtype=np.float32)
        timesteps = np.full(len(labels), timestep, dtype=np.int64)
        yield timestep, tuple(map(paddle.to_tensor, (x, timesteps, ours, stocks)))
