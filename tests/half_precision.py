"""A stand-in for half precision, which the CPU has not: weights become what float16 holds of them, or infinite."""

from contextlib import contextmanager

import numpy as np


def use_float16_weights(monkeypatch, find_layer):
    """Let "fp16" round the weights of a layer as a float16 layer's are, wherever half precision is asked for.

    Args:
        monkeypatch: pytest's.
        find_layer: returns the layer.
    """

    @contextmanager
    def autocast(precision, level="O1"):
        weights = list(find_layer().parameters()) if precision == "fp16" else []
        former = [weight.numpy() for weight in weights]
        for weight, values in zip(weights, former, strict=True):
            with np.errstate(over="ignore"):
                weight.set_value(values.astype(np.float16).astype(np.float32))
        yield
        for weight, values in zip(weights, former, strict=True):
            weight.set_value(values)

    monkeypatch.setattr("paddle_dit.half_precision.has_gpu", lambda: True)
    monkeypatch.setattr("paddle_dit.half_precision.autocast", autocast)


def overflow_in(bias):
    """Give a bias a value that float32 holds and float16 does not."""
    values = bias.numpy()
    values[0] = 1e5
    bias.set_value(values)
