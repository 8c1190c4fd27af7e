"""Names and layouts of the paper's code (facebookresearch/DiT), whose names ours are."""

import numpy as np

from paddle_dit.config import DiTConfig

POSITION_TABLE = "pos_embed"  # fixed: recomputed from the configuration, never loaded


def config_from_facebook(values: dict) -> DiTConfig:
    """Return our configuration for the keyword arguments of the reference's ``DiT``; its frequencies have shift 0."""
    values = dict(values)
    values["sample_size"] = values.pop("input_size")
    return DiTConfig.from_dict({**values, "frequency_shift": 0})


def from_facebook(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return our state dict for the reference's: linear weights are transposed, the patch convolution is flattened."""
    return {name: _to_linear(name, tensor) for name, tensor in tensors.items() if name != POSITION_TABLE}


def _to_linear(name: str, tensor: np.ndarray) -> np.ndarray:
    if name == "x_embedder.proj.weight":  # a convolution [D, C, p, p]
        tensor = tensor.reshape(len(tensor), -1)
    elif tensor.ndim != 2 or name == "y_embedder.embedding_table.weight":
        return tensor
    return np.ascontiguousarray(tensor.T)
