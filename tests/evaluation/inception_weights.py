"""Weights of Inception by the formula of tests/golden/README.md."""

import zlib

import numpy as np

from paddle_dit.evaluation.inception import Inception

from ..conftest import GOLDEN


def golden():
    with np.load(GOLDEN / "inception.npz", allow_pickle=False) as file:
        return dict(file)


def shapes():
    """Return the shape of every tensor in the public port, in PyTorch's layout."""
    found = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, parameter in Inception().named_parameters():
        if name.endswith(".weight") and not name.startswith("fc."):
            layer, outputs = name.removesuffix(".weight"), parameter.shape[0]
            found[f"{layer}.conv.weight"] = tuple(parameter.shape)
            found |= {f"{layer}.bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
    return found


def tensor(name, shape):
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("conv.weight"):
        values *= np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("bn.weight"):
        values = 1 + 0.1 * values
    elif name.endswith("running_var"):
        values = 1 + 0.1 * np.abs(values)
    else:
        values *= 0.02 if name == "fc.weight" else 0.1
    return values.astype(np.float32)


def formula_weights():
    return {name: tensor(name, shape) for name, shape in shapes().items()}
