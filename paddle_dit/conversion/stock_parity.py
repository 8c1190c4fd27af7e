"""Does ppdiffusers' stock transformer, loaded from a DiTPipeline folder, compute what our model computes?"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle

from paddle_dit.config import DiTConfig
from paddle_dit.conversion.keymaps import STOCK_NULL_CLASS
from paddle_dit.conversion.loading import build_dit
from paddle_dit.errors import ConversionError

TOLERANCE = 1e-5  # of the largest output, or absolute where that is below 1
TIMESTEPS = (0, 1, 250, 500, 998, 999)


@paddle.no_grad()
def compare_outputs(folder: Path, tensors: Mapping[str, np.ndarray], config: DiTConfig) -> tuple[float, float, float]:
    """Compare the stock transformer in ``folder`` with our model on random inputs, at the stock frequency_shift 1.

    Returns:
        The largest error, the largest output, and the largest difference that our own frequency_shift makes.

    Raises:
        ConversionError: the error is above :data:`TOLERANCE`, or not a number.
    """
    from ppdiffusers import DiTPipeline

    stock = DiTPipeline.from_pretrained(str(folder)).transformer
    shifts = config.frequency_shift, 1
    trained, shifted = (build_dit(tensors, replace(config, frequency_shift=shift), folder) for shift in shifts)
    found = []
    for x, timesteps, labels, stock_labels in _random_inputs(config):
        wanted = shifted(x, timesteps, labels)
        error = stock(x, timestep=timesteps, class_labels=stock_labels).sample - wanted
        found.append([float(array.abs().max()) for array in (error, wanted, trained(x, timesteps, labels) - wanted)])
    max_error, largest, deviation = np.max(found, axis=0).tolist()  # NaN stays NaN
    if not max_error <= TOLERANCE * max(1.0, largest):
        raise ConversionError(
            f"the stock transformer's output differs from the model's by {max_error:.3g} (largest output "
            f"{largest:.3g}), above {TOLERANCE:g}; nothing was written"
        )
    return max_error, largest, deviation


def _random_inputs(config: DiTConfig) -> Iterator[tuple]:
    """Yield noise ``[n, C, H, W]``, timesteps ``[n]``, our labels ``[n]`` and the stock class's ``[n]``."""
    labels = {0: 0, config.num_classes - 1: config.num_classes - 1} if config.num_classes else {}
    if config.has_null_class:
        labels[config.null_class] = max(config.null_class, STOCK_NULL_CLASS)
    ours, stocks = (np.array(list(side), dtype=np.int64) for side in (labels.keys(), labels.values()))
    rng = np.random.default_rng(0)
    for timestep in TIMESTEPS:
        x = rng.standard_normal((len(labels), *config.sample_shape), dtype=np.float32)
        timesteps = np.full(len(labels), timestep, dtype=np.int64)
        yield tuple(map(paddle.to_tensor, (x, timesteps, ours, stocks)))
