"""Names and layouts of the VAE of Stable Diffusion elsewhere, and what its tensors say of it. Plain NumPy."""

import re
from collections.abc import Mapping

import numpy as np

from paddle_dit.errors import ConversionError

COMPVIS_MARK = "encoder.mid.block_1.norm1.weight"  # a tensor by whose name CompVis's are known
_GROUPS = 32  # of every group norm of Stable Diffusion's VAE
SCALING = 0.18215  # of its latents; the default of the class too

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LINEAR = re.compile(r".*\.attentions\.0\.to_(q|k|v|out\.0)\.weight")


def to_ppdiffusers(tensors: Mapping[str, np.ndarray], turned: bool) -> dict[str, np.ndarray]:
    """Return the tensors of ppdiffusers' AutoencoderKL, the same numbers as float32.

    Args:
        tensors: under the names of CompVis or of diffusers, those from before 0.18 too, or of ppdiffusers.
        turned: the attention's weights are PyTorch's, ``[out, in]``; CompVis's are convolutions ``[out, in, 1, 1]``.

    Raises:
        ConversionError: numbers that are not finite, or no floats.
    """
    ups = {found[1] for name in tensors if (found := re.match(r"decoder\.up\.(\d{1,3})\.", name))}
    found = {}
    for name, array in tensors.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ConversionError(f"'{name}' ({array.dtype}) holds NaN, infinity or no floats; fetch the file again")
        ours = _renamed(name, len(ups)) if COMPVIS_MARK in tensors else _modern(name)
        array = array.astype(np.float32, copy=False)
        if _LINEAR.fullmatch(ours):
            array = array.reshape(array.shape[:2])
            array = np.ascontiguousarray(array.T) if turned else array
        if ours in found:
            raise ConversionError(f"'{name}' stands for '{ours}', which another tensor does too; fetch the file again")
        found[ours] = array
    return found


def infer_config(tensors: Mapping[str, np.ndarray]) -> dict:
    """Return the ``config.json`` of an AutoencoderKL for tensors under ppdiffusers' names.

    Tensors show neither the groups of its norms nor the scale of its latents: those of Stable Diffusion 1 and 2 are
    assumed, 32 and 0.18215.

    Raises:
        ConversionError: these are no such tensors.
    """
    widths, layers = [], 0
    while (first := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in tensors:
        widths.append(tensors[first].shape[0])
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.weight" in tensors:
        layers += 1
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    if not widths or any(name not in tensors or tensors[name].ndim != 4 for name in needed):
        raise ConversionError("its tensors are not those of an AutoencoderKL")
    if any(width % _GROUPS for width in widths):
        raise ConversionError(f"its widths {widths} are no multiples of {_GROUPS}; place its config.json beside it")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": tensors[needed[0]].shape[1],
        "out_channels": tensors[needed[2]].shape[0],
        "latent_channels": tensors[needed[1]].shape[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers,
        "norm_num_groups": _GROUPS,
        "sample_size": 256,
        "scaling_factor": SCALING,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def _renamed(name: str, ups: int) -> str:
    """Return ppdiffusers' name for one of CompVis, whose decoder counts its blocks from the image inwards."""
    name = name.replace("nin_shortcut", "conv_shortcut")
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda found: f".mid_block.resnets.{int(found[1]) - 1}.", name)
    name = re.sub(r"\.mid\.attn_1\.(\w+)\.", lambda found: _attention(found[1], _ATTENTION), name)
    name = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", name)
    name = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", name)
    for theirs, ours in (("block", "resnets"), ("upsample", "upsamplers.0")):
        pattern = rf"^decoder\.up\.(\d+)\.{theirs}\."
        name = re.sub(pattern, lambda found, o=ours: f"decoder.up_blocks.{ups - 1 - int(found[1])}.{o}.", name)
    return name


def _modern(name: str) -> str:
    return re.sub(r"\.mid_block\.attentions\.0\.(\w+)\.", lambda found: _attention(found[1], _OLD_ATTENTION), name)


def _attention(layer: str, names: Mapping[str, str]) -> str:
    return f".mid_block.attentions.0.{names.get(layer, layer)}."
