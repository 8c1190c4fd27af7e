"""What a DiT's tensors say of its architecture, and whether what stands beside them agrees. Plain NumPy."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path

import numpy as np

from paddle_dit.config import PRESETS, DiTConfig
from paddle_dit.errors import ConfigError, ConversionError
from paddle_dit.positions import sincos_position_table

# An average of decay 0.9999 kept in float32 leaves a constant by up to 1.7e-4, and half precision rounds it by 5e-4
# (float16) or 4e-3 (bfloat16); a table that was trained is far beyond.
POSITION_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Names:
    """Where a family of formats keeps the tensors that show the architecture, whatever the layout of linear weights."""

    patches: str
    width: str
    labels: str
    hidden: str
    output: str
    blocks: str
    positions: str


PAPER_NAMES = Names(
    patches="x_embedder.proj.weight",
    width="t_embedder.mlp.0.bias",
    labels="y_embedder.embedding_table.weight",
    hidden="blocks.0.mlp.fc1.bias",
    output="final_layer.linear.bias",
    blocks="blocks",
    positions="pos_embed",
)
STOCK_NAMES = Names(
    patches="pos_embed.proj.weight",
    width="transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.bias",
    labels="transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
    hidden="transformer_blocks.0.ff.net.0.proj.bias",
    output="proj_out_2.bias",
    blocks="transformer_blocks",
    positions="pos_embed.pos_embed",
)


@dataclass(frozen=True)
class Description:
    """What stands beside the tensors.

    Attributes:
        place: where it stands, for messages.
        values: fields of DiTConfig that it names.
        notes: what a conversion leaves behind, one line each.
    """

    place: str = ""
    values: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hints:
    """What a user says of a model whose files do not; None is nothing.

    Attributes:
        num_heads: attention heads.
        sample_size: side of the square latents.
        frequency_shift: 0 as the paper's code, 1 as diffusers.
        drop_trained_positions: take the fixed position table where the file has a trained one.
    """

    num_heads: int | None = None
    sample_size: int | None = None
    frequency_shift: int | None = None
    drop_trained_positions: bool = False


def infer_config(
    tensors: Mapping[str, np.ndarray], names: Names, shift: int, description: Description, hints: Hints
) -> tuple[DiTConfig, list[str]]:
    """Return the configuration of a DiT, and a line for everything that its tensors do not show.

    Args:
        tensors: under foreign names.
        names: which of them show what.
        shift: the format's own frequency_shift.
        description: checked against the tensors.
        hints: win over both where nothing can be read off the tensors.

    Raises:
        ConversionError: no DiT, a description that contradicts the tensors, or something that nobody says.
    """
    shown, said, notes = _shown(tensors, names), description.values, list(description.notes)
    rows = len(tensors[names.labels])
    shown["num_classes"] = rows - 1
    if said.get("num_classes") == rows:
        shown |= {"num_classes": rows, "class_dropout_prob": 0.0}
    elif "num_classes" not in said:
        notes.append(f"{rows - 1} classes and the null class: the label table has {rows} rows")
    _compare(shown, said, description.place)
    shown["num_heads"], line = _heads(shown["hidden_size"], said, description.place, hints)
    notes.append(line)
    if "sample_size" not in shown:
        shown["sample_size"], line = _sample_size(said, description.place, hints)
        notes.append(line)
    elif hints.sample_size not in (None, shown["sample_size"]):
        raise ConversionError(f"its position table is of sample_size {shown['sample_size']}, not {hints.sample_size}")
    shown["frequency_shift"] = shift if hints.frequency_shift is None else hints.frequency_shift
    try:
        return DiTConfig(**shown), notes
    except ConfigError as error:
        raise ConversionError(f"its tensors are of no DiT: {error}") from None


def check_positions(table: np.ndarray, config: DiTConfig, hints: Hints) -> str | None:
    """Compare a file's position table ``[1, T, D]`` with the fixed one, which a conversion takes in its stead.

    Returns:
        A line for the user, or None where they are equal.

    Raises:
        ConversionError: they differ beyond rounding.
    """
    fixed = sincos_position_table(config.hidden_size, config.grid)
    largest = float(np.abs(table[0].astype(np.float64) - fixed).max())
    if largest == 0:
        return None
    if largest <= POSITION_TOLERANCE:
        return f"its position table is the fixed one, rounded: {largest:.1e} from it"
    if hints.drop_trained_positions:
        return f"its trained position table was dropped: up to {largest:.2g} from the fixed one"
    raise ConversionError(
        f"its position table was trained (up to {largest:.2g} from the fixed sine-cosine one) and cannot be converted "
        "exactly; --drop-trained-positions takes the fixed one, which changes the model"
    )


def describe_stock(values: dict, path: Path) -> Description:
    """Return what a ``config.json`` of diffusers, ppdiffusers or PaddleMIX says.

    Raises:
        ConversionError: it describes something else than a DiT, or with values of the wrong type.
    """
    needed = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}
    for key, value in needed.items():
        if values.get(key, value) != value:
            raise ConversionError(
                f"{path} does not describe a DiT, which has {' and '.join(needed.values())}: {key} is {values[key]!r}"
            )
    pairs = {"sample_size": "sample_size", "patch_size": "patch_size", "in_channels": "in_channels"}
    pairs |= {"num_layers": "depth", "num_attention_heads": "num_heads", "num_classes": "num_classes"}
    pairs |= {"num_embeds_ada_norm": "num_classes"}
    said = {ours: values[theirs] for theirs, ours in pairs.items() if values.get(theirs) is not None}
    for key, value in said.items():
        if type(value) is not int or value < 0:
            raise ConversionError(f"{path} does not describe a DiT: {key} is {value!r}, not a whole number")
    size, channels, out = values.get("attention_head_dim"), said.get("in_channels"), values.get("out_channels")
    if type(size) is int and "num_heads" in said:
        said["hidden_size"] = said["num_heads"] * size
    if channels is not None and out is not None:
        said["learn_sigma"] = out == 2 * channels
    epsilon = values.get("norm_eps", 1e-6)
    for key, value in {"norm_eps": epsilon, "out_channels": 0 if out is None else out}.items():
        if not isinstance(value, int | float):
            raise ConversionError(f"{path} does not describe a DiT: {key} is {value!r}, not a number")
    notes = [f"the norm before an MLP has epsilon {epsilon:g} there and 1e-06 here"] if epsilon != 1e-6 else []
    return Description(str(path), said, tuple(notes))


def describe_arguments(options: object, place: str) -> Description:
    """Return what the options of a training checkpoint of the paper's code or fast-DiT say, if there are any."""
    options = options if isinstance(options, dict) else {}
    said = {}
    if isinstance(model := options.get("model"), str) and model in PRESETS:
        said |= {key: PRESETS[model][key] for key in ("patch_size", "depth", "hidden_size", "num_heads")}
    if type(size := options.get("image_size")) is int and size % 8 == 0:
        said["sample_size"] = size // 8  # of the VAE that these programs use
    if type(classes := options.get("num_classes")) is int:
        said["num_classes"] = classes
    return Description(f"the options ('args') in {place}", said)


def _shown(tensors: Mapping[str, np.ndarray], names: Names) -> dict:
    needed = [names.patches, names.width, names.labels, names.hidden, names.output]
    lost = [name for name in needed if name not in tensors]
    if lost:
        raise ConversionError(f"it lacks '{lost[0]}', without which it is no DiT")
    kernel, table = tensors[names.patches], tensors[names.labels]
    width, hidden, output = (tensors[name].shape[-1:] for name in (names.width, names.hidden, names.output))
    square = kernel.ndim == 4 and kernel.shape[2] == kernel.shape[3] and min(kernel.shape) > 0
    if not square or table.ndim != 2 or not (width and hidden and output) or width[0] != kernel.shape[0]:
        raise ConversionError(f"'{names.patches}' {kernel.shape} and '{names.labels}' {table.shape} are of no DiT")
    channels, patch = kernel.shape[1], kernel.shape[2]
    out_channels, rest = divmod(output[0], patch * patch)
    if rest or out_channels not in (channels, 2 * channels):
        raise ConversionError(
            f"'{names.output}' has {output[0]} numbers; patches of {patch}x{patch} with {channels} channels need "
            f"{channels * patch**2}, or {2 * channels * patch**2} with a learned variance"
        )
    blocks = {found[1] for name in tensors if (found := re.match(rf"{names.blocks}\.(\d{{1,5}})\.", name))}
    shown = {"patch_size": patch, "in_channels": channels, "hidden_size": width[0], "depth": len(blocks)}
    shown |= {"mlp_ratio": hidden[0] / width[0], "learn_sigma": out_channels == 2 * channels}
    if names.positions in tensors:
        shape = tensors[names.positions].shape
        side = isqrt(shape[1]) if len(shape) == 3 else 0
        if len(shape) != 3 or side * side != shape[1] or shape[2] != width[0]:
            raise ConversionError(f"'{names.positions}' {shape} is no position table of a square of patches")
        shown["sample_size"] = side * patch
    return shown


def _compare(shown: dict, said: dict, place: str) -> None:
    wrong = [key for key in shown if key in said and said[key] != shown[key]]
    if wrong:
        told = "; ".join(f"{key} is {said[key]} there, {shown[key]} in the tensors" for key in wrong)
        raise ConversionError(f"{place} contradicts the tensors: {told}; give the configuration that belongs to them")


def preset_heads(width: int) -> int | None:
    """Return the attention heads of the presets of a width, if there are any."""
    return {fields["hidden_size"]: fields["num_heads"] for fields in PRESETS.values()}.get(width)


def _heads(width: int, said: dict, place: str, hints: Hints) -> tuple[int, str]:
    if hints.num_heads is not None:
        return hints.num_heads, f"{hints.num_heads} heads: as you say"
    if "num_heads" in said:
        return said["num_heads"], f"{said['num_heads']} heads: from {place}"
    if (heads := preset_heads(width)) is not None:
        return heads, f"{heads} heads: those of the presets of width {width}; no tensor shows them"
    raise ConversionError(f"no tensor shows the number of heads, and no preset has width {width}; give --num-heads")


def _sample_size(said: dict, place: str, hints: Hints) -> tuple[int, str]:
    if hints.sample_size is not None:
        return hints.sample_size, f"sample_size {hints.sample_size}: as you say"
    if "sample_size" in said:
        return said["sample_size"], f"sample_size {said['sample_size']}: from {place}"
    raise ConversionError("it has no position table to tell its sample_size by; give --sample-size (32 at 256 pixels)")
