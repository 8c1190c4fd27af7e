"""The formats in which a DiT's tensors come, recognised by their names and shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from paddle_dit.config import DiTConfig
from paddle_dit.conversion.architecture import PAPER_NAMES, STOCK_NAMES, Names
from paddle_dit.conversion.keymaps import (
    Rule,
    diffusers_rules,
    facebook_rules,
    our_rules,
    paddlemix_rules,
    ppdiffusers_rules,
)
from paddle_dit.errors import ConversionError
from paddle_dit.pickles import shown

OURS = "paddle_dit"
MODEL_INDEX, OWN_INFO = "model_index.json", "paddle_dit.json"  # of a pipeline; and ours, in folders of other formats


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        name: as users know it.
        names: which of its tensors show the architecture.
        rules: a configuration -> which tensors hold the numbers of ours.
        frequency_shift: of the program that computes with it.
    """

    name: str
    names: Names
    rules: Callable[[DiTConfig], list[Rule]]
    frequency_shift: int


FACEBOOK = Format("facebook/DiT", PAPER_NAMES, facebook_rules, 0)
PADDLEMIX = Format("PaddleMIX DiT", PAPER_NAMES, paddlemix_rules, 0)
OWN = Format(OURS, PAPER_NAMES, our_rules, 1)
DIFFUSERS = Format("diffusers DiT", STOCK_NAMES, diffusers_rules, 1)
PPDIFFUSERS = Format("ppdiffusers DiT", STOCK_NAMES, ppdiffusers_rules, 1)

# How other models' tensors are called, for a message that says what a file is.
_OTHERS = {
    "a UNet of Stable Diffusion": ("model.diffusion_model.", "input_blocks.", "down_blocks.", "conv_in."),
    "a PixArt transformer": ("adaln_single.",),
    "a Stable Diffusion 3 transformer": ("joint_blocks.", "context_embedder."),
    "a CLIP text encoder": ("text_model.", "cond_stage_model."),
    "a Large-DiT (Llama) transformer": ("layers.0.attention.", "noise_refiner."),
    "a vision transformer": ("patch_embed.", "cls_token"),
}
EXPECTED = (
    "expected a DiT of the paper's code, fast-DiT, PaddleMIX, diffusers, ppdiffusers or this project, or the VAE of "
    "Stable Diffusion"
)


def recognise(tensors: Mapping[str, np.ndarray]) -> Format | None:
    """Return the format of a table of tensors, or None for a VAE's.

    Weights of SiT have the same tensors as those of a DiT and cannot be told from them.

    Raises:
        ConversionError: neither; what it looks like is said.
    """
    for formats, patches, modulation in (
        ((FACEBOOK, PADDLEMIX), "x_embedder.proj.weight", "final_layer.adaLN_modulation.1.weight"),
        ((DIFFUSERS, PPDIFFUSERS), "pos_embed.proj.weight", "proj_out_1.weight"),
    ):
        if patches in tensors and modulation in tensors:
            shape = tensors[modulation].shape
            if len(shape) == 2 and shape[0] != shape[1]:
                turned = shape[0] == 2 * shape[1]
                ours = tensors[patches].ndim == 2 and not turned
                return OWN if ours else formats[0 if turned else 1]
    if is_vae(tensors):
        return None
    raise ConversionError(f"it holds {_described(tensors)}; {EXPECTED}")


def is_vae(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether these are an autoencoder's tensors, under the names of diffusers or CompVis."""
    return {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= tensors.keys()


def _described(tensors: Mapping[str, np.ndarray]) -> str:
    for what, marks in _OTHERS.items():
        if any(name.startswith(mark) for mark in marks for name in tensors):
            return f"the tensors of {what}"
    names = sorted(tensors)
    return f"the tensors of another model ('{shown(names[0])}', …)" if names else "no tensors"
