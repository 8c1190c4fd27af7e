"""Names and layouts of the paper's code (facebookresearch/DiT), whose names ours are."""

from collections.abc import Mapping

import numpy as np

from paddle_dit.config import DiTConfig
from paddle_dit.conversion.keymaps import facebook_rules

POSITION_TABLE = "pos_embed"  # fixed: recomputed from the configuration, never loaded


def config_from_facebook(values: dict) -> DiTConfig:
    """Return our configuration for the keyword arguments of the reference's ``DiT``; its frequencies have shift 0."""
    values = dict(values)
    values["sample_size"] = values.pop("input_size")
    return DiTConfig.from_dict({**values, "frequency_shift": 0})


def from_facebook(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Return what the reference names, any part of a state dict, in our layout; names that we have not stay as is."""
    joins = {rule.ours: rule.join for rule in facebook_rules(config)}
    return {
        name: joins[name]([array]) if name in joins else array
        for name, array in tensors.items()
        if name != POSITION_TABLE
    }
