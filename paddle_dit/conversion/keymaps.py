"""Which foreign tensors hold the numbers of each of ours, and in which layout. Plain NumPy, no Paddle.

A table is a list of :class:`Rule`, one per tensor of ours; both directions follow from it. Every format has its own
function that returns a table for a configuration.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paddle_dit.config import DiTConfig
from paddle_dit.errors import ConversionError

STOCK_NULL_CLASS = 1000  # the row of the label table that DiTPipeline takes for "no class", whatever the model

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and the foreign tensors that hold the same numbers.

    Attributes:
        ours: our name.
        theirs: the foreign names.
        split: our array -> the foreign arrays, in the order of ``theirs``.
        join: the foreign arrays -> ours.
    """

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]


def to_ppdiffusers(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> Tensors:
    """Rename and lay out our tensors for ppdiffusers' Transformer2DModel; equal copies share their memory.

    Raises:
        ConversionError: tensors are missing or left over, or do not fit the configuration.
    """
    rules = ppdiffusers_rules(config)
    _check_names(tensors, {rule.ours for rule in rules})
    return {name: array for rule in rules for name, array in zip(rule.theirs, _try(rule, tensors, True), strict=True)}


def from_ppdiffusers(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> Tensors:
    """Undo :func:`to_ppdiffusers`, rows that pad the label table included.

    Raises:
        ConversionError: as there, or copies that should be equal differ.
    """
    rules = ppdiffusers_rules(config)
    tensors = {name: array for name, array in tensors.items() if name != "pos_embed.pos_embed"}  # a constant
    _check_names(tensors, {name for rule in rules for name in rule.theirs})
    return {rule.ours: _try(rule, tensors, False) for rule in rules}


def stock_classes(config: DiTConfig) -> int:
    """Return ``num_embeds_ada_norm``: the stock label table has one row more, and its row 1000 must exist to guide."""
    return max(config.num_classes, STOCK_NULL_CLASS) if config.has_null_class else config.num_classes


def stock_can_guide(config: DiTConfig) -> bool:
    """Return whether row 1000 of the stock label table is this model's null class."""
    return config.has_null_class and config.num_classes <= STOCK_NULL_CLASS


def ppdiffusers_rules(config: DiTConfig) -> list[Rule]:
    """Return the table for ppdiffusers' DiT, whose every block has its own copy of the timestep and label embedders."""
    return [
        *_layers(_same, "x_embedder.proj", ["pos_embed.proj"], weight=_patches(config)),
        *_layers(_same, "t_embedder.mlp.0", _in_blocks(config, "norm1.emb.timestep_embedder.linear_1")),
        *_layers(_same, "t_embedder.mlp.2", _in_blocks(config, "norm1.emb.timestep_embedder.linear_2")),
        Rule(
            "y_embedder.embedding_table.weight",
            tuple(_in_blocks(config, "norm1.emb.class_embedder.embedding_table.weight")),
            lambda table: [_padded(table, stock_classes(config) + 1)] * config.depth,
            lambda tables: _only(tables)[: config.label_rows],
        ),
        *(rule for index in range(config.depth) for rule in _block_rules(index)),
        *_layers(_same, "final_layer.adaLN_modulation.1", ["proj_out_1"]),
        *_layers(_same, "final_layer.linear", ["proj_out_2"]),
    ]


def _block_rules(index: int) -> Iterator[Rule]:
    ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
    yield from _layers(_same, f"{ours}.adaLN_modulation.1", [f"{theirs}.norm1.linear"])
    yield from _layers(_thirds, f"{ours}.attn.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"])
    yield from _layers(_same, f"{ours}.attn.proj", [f"{theirs}.attn1.to_out.0"])
    yield from _layers(_same, f"{ours}.mlp.fc1", [f"{theirs}.ff.net.0.proj"])
    yield from _layers(_same, f"{ours}.mlp.fc2", [f"{theirs}.ff.net.2"])


# A layout is a function of the number of foreign tensors that returns (split, join).


def _same(copies: int):
    return lambda array: [array] * copies, _only


def _thirds(parts: int):
    return lambda array: np.split(array, parts, axis=-1), lambda arrays: np.concatenate(arrays, axis=-1)


def _patches(config: DiTConfig):
    """Our linear layer over patches ``[C * p * p, D]`` as a convolution ``[D, C, p, p]``."""
    kernel = (config.hidden_size, config.in_channels, config.patch_size, config.patch_size)
    return lambda _: (lambda w: [w.T.reshape(kernel)], lambda arrays: _only(arrays).reshape(len(arrays[0]), -1).T)


def _layers(layout, ours: str, theirs: Sequence[str], weight=None) -> Iterator[Rule]:
    """Yield the rules of a layer's weight and bias; ``weight`` is the weight's layout where it differs."""
    for suffix, chosen in (("weight", weight or layout), ("bias", layout)):
        yield Rule(f"{ours}.{suffix}", tuple(f"{name}.{suffix}" for name in theirs), *chosen(len(theirs)))


def _in_blocks(config: DiTConfig, name: str) -> list[str]:
    return [f"transformer_blocks.{index}.{name}" for index in range(config.depth)]


def _padded(table: np.ndarray, rows: int) -> np.ndarray:
    """Repeat the last row, the null class where there is one, up to ``rows``."""
    return np.concatenate([table, np.repeat(table[-1:], rows - len(table), axis=0)])


def _only(arrays: Sequence[np.ndarray]) -> np.ndarray:
    if any(not np.array_equal(arrays[0], other) for other in arrays[1:]):
        raise ConversionError("the blocks hold different timestep or label embedders; a DiT has one for all blocks")
    return arrays[0]


def _try(rule: Rule, tensors: Mapping[str, np.ndarray], forward: bool):
    """Apply a rule; an array of the wrong number of axes or elements is the file's fault, not ours."""
    try:
        return rule.split(tensors[rule.ours]) if forward else rule.join([tensors[name] for name in rule.theirs])
    except (ValueError, IndexError):
        shape = tensors[rule.ours if forward else rule.theirs[0]].shape
        raise ConversionError(f"'{rule.ours}' of shape {shape} does not fit the model's configuration") from None


def _check_names(tensors: Mapping[str, np.ndarray], expected: set[str]) -> None:
    missing, unexpected = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unexpected:
        parts = {"missing": missing, "unexpected": unexpected}
        told = "; ".join(f"{what}: {', '.join(names[:3])} ({len(names)})" for what, names in parts.items() if names)
        raise ConversionError(f"these are not the weights of this DiT configuration ({told})")
