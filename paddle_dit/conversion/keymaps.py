"""Which foreign tensors hold the numbers of each of ours, and in which layout. Plain NumPy, no Paddle.

A table is a list of :class:`Rule`, one per tensor of ours; both directions follow from it. Every format has its own
function that returns a table for a configuration. Arrays are views of each other wherever the layout allows it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paddle_dit.config import DiTConfig
from paddle_dit.errors import ConversionError
from paddle_dit.models.refit import parameter_shapes

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


class Joined(Mapping):
    """Our tensors as float32, each made from the foreign ones when it is asked for.

    Args:
        rules: of the foreign format.
        tensors: the foreign ones, no more and no less than the rules name.
        config: of the model.
        place: where they lie, for messages.

    Raises:
        ConversionError: names are missing or left over; on reading, an array that does not fit the configuration,
            copies that should be equal and differ, or numbers that are no finite floats.
    """

    def __init__(
        self, rules: Sequence[Rule], tensors: Mapping[str, np.ndarray], config: DiTConfig, place: object = None
    ):
        check_names(tensors, {name for rule in rules for name in rule.theirs})
        self._rules = {rule.ours: rule for rule in rules}
        self._tensors, self._shapes, self._place = tensors, parameter_shapes(config), place

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self._joined(self._rules[name])
        except ConversionError as error:
            raise ConversionError(f"{self._place}: {error}" if self._place else str(error)) from None

    def _joined(self, rule: Rule) -> np.ndarray:
        parts = [as_float32(theirs, self._tensors[theirs]) for theirs in rule.theirs]
        array = _apply(rule, rule.join, parts, parts[0].shape)
        if array.shape != self._shapes[rule.ours]:
            raise _misfit(rule, parts[0].shape)
        return array


def as_float32(name: str, array: np.ndarray) -> np.ndarray:
    """Return weights as float32, the same numbers; ConversionError where there is none for one, or it is not finite."""
    if array.dtype.kind != "f":
        raise ConversionError(f"'{name}' holds {array.dtype} and should hold floats; this is no weights file of a DiT")
    if not np.isfinite(array).all():
        raise ConversionError(f"'{name}' ({array.dtype}) holds NaN or infinity; convert an earlier checkpoint")
    single = array.astype(np.float32, copy=False)
    if array.dtype.itemsize > 4 and not np.array_equal(single, array):
        raise ConversionError(f"'{name}' ({array.dtype}) holds numbers that float32 has not; save it as float32")
    return single


def to_ppdiffusers(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> Tensors:
    """Rename and lay out our tensors for ppdiffusers' Transformer2DModel; equal copies share their memory.

    Raises:
        ConversionError: tensors are missing or left over, or do not fit the configuration.
    """
    rules = ppdiffusers_rules(config)
    check_names(tensors, {rule.ours for rule in rules})
    return dict(split(rules, tensors))


def from_ppdiffusers(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> Tensors:
    """Undo :func:`to_ppdiffusers`, rows that pad the label table included.

    Raises:
        ConversionError: as there, or copies that should be equal differ.
    """
    tensors = {name: array for name, array in tensors.items() if name != "pos_embed.pos_embed"}  # a constant
    return dict(Joined(ppdiffusers_rules(config), tensors, config))


def split(rules: Sequence[Rule], tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the foreign tensors that hold our numbers, one of ours after the other."""
    for rule in rules:
        array = tensors[rule.ours]
        yield from zip(rule.theirs, _apply(rule, rule.split, array, array.shape), strict=True)


def foreign_shapes(rules: Sequence[Rule], config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what :func:`split` yields, in its order, without the numbers."""
    blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in parameter_shapes(config).items()}
    return {name: array.shape for name, array in split(rules, blank)}


def stock_classes(config: DiTConfig) -> int:
    """Return ``num_embeds_ada_norm``: the stock label table has one row more, and its row 1000 must exist to guide."""
    return max(config.num_classes, STOCK_NULL_CLASS) if config.has_null_class else config.num_classes


def stock_can_guide(config: DiTConfig) -> bool:
    """Return whether row 1000 of the stock label table is this model's null class."""
    return config.has_null_class and config.num_classes <= STOCK_NULL_CLASS


def our_rules(config: DiTConfig) -> list[Rule]:
    """Return the table for our own files: each tensor is itself."""
    return [Rule(name, (name,), *_same(1)) for name in parameter_shapes(config)]


def facebook_rules(config: DiTConfig) -> list[Rule]:
    """Return the table for the paper's code: our names, PyTorch's layout."""
    return list(_paper_rules(config, turned=True))


def paddlemix_rules(config: DiTConfig) -> list[Rule]:
    """Return the table for PaddleMIX's DiT: the paper's names, Paddle's layout, the patches by a convolution."""
    return list(_paper_rules(config, turned=False))


def ppdiffusers_rules(config: DiTConfig) -> list[Rule]:
    """Return the table for ppdiffusers' DiT, whose every block has its own copy of the timestep and label embedders."""
    return list(_stock_rules(config, turned=False))


def diffusers_rules(config: DiTConfig) -> list[Rule]:
    """Return the table for diffusers' DiT: ppdiffusers' names, PyTorch's layout."""
    return list(_stock_rules(config, turned=True))


def _paper_rules(config: DiTConfig, turned: bool) -> Iterator[Rule]:
    for name in parameter_shapes(config):
        if name == "x_embedder.proj.weight":
            yield Rule(name, (name,), *_patches(config)(1))
        else:
            linear = name.endswith(".weight") and name != "y_embedder.embedding_table.weight"
            yield Rule(name, (name,), *(_turned(_same) if turned and linear else _same)(1))


def _stock_rules(config: DiTConfig, turned: bool) -> Iterator[Rule]:
    yield from _layers(_same, "x_embedder.proj", ["pos_embed.proj"], weight=_patches(config))
    for ours, theirs in (("t_embedder.mlp.0", "linear_1"), ("t_embedder.mlp.2", "linear_2")):
        yield from _layers(_same, ours, _in_blocks(config, f"norm1.emb.timestep_embedder.{theirs}"), turned)
    yield Rule(
        "y_embedder.embedding_table.weight",
        tuple(_in_blocks(config, "norm1.emb.class_embedder.embedding_table.weight")),
        lambda table: [_padded(table, stock_classes(config) + 1)] * config.depth,
        lambda tables: _only(tables)[: config.label_rows],
    )
    for index in range(config.depth):
        yield from _block_rules(index, turned)
    yield from _layers(_same, "final_layer.adaLN_modulation.1", ["proj_out_1"], turned)
    yield from _layers(_same, "final_layer.linear", ["proj_out_2"], turned)


def _block_rules(index: int, turned: bool) -> Iterator[Rule]:
    ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
    yield from _layers(_same, f"{ours}.adaLN_modulation.1", [f"{theirs}.norm1.linear"], turned)
    yield from _layers(_thirds, f"{ours}.attn.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"], turned)
    yield from _layers(_same, f"{ours}.attn.proj", [f"{theirs}.attn1.to_out.0"], turned)
    yield from _layers(_same, f"{ours}.mlp.fc1", [f"{theirs}.ff.net.0.proj"], turned)
    yield from _layers(_same, f"{ours}.mlp.fc2", [f"{theirs}.ff.net.2"], turned)


# A layout is a function of the number of foreign tensors that returns (split, join).


def _same(copies: int):
    return lambda array: [array] * copies, _only


def _thirds(parts: int):
    return lambda array: np.split(array, parts, axis=-1), lambda arrays: np.concatenate(arrays, axis=-1)


def _turned(layout):
    """Make of a layout that of PyTorch's linear weights, ``[out, in]``."""

    def turned(count: int):
        split, join = layout(count)
        return lambda array: [part.T for part in split(array)], lambda arrays: join([array.T for array in arrays])

    return turned


def _patches(config: DiTConfig):
    """Our linear layer over patches ``[C * p * p, D]`` as a convolution ``[D, C, p, p]``."""
    kernel = (config.hidden_size, config.in_channels, config.patch_size, config.patch_size)
    return lambda _: (lambda w: [w.T.reshape(kernel)], lambda arrays: _only(arrays).reshape(len(arrays[0]), -1).T)


def _layers(layout, ours: str, theirs: Sequence[str], turned: bool = False, weight=None) -> Iterator[Rule]:
    """Yield the rules of a layer's weight and bias; ``weight`` is the weight's layout where it differs."""
    weight = weight or (_turned(layout) if turned else layout)
    for suffix, chosen in (("weight", weight), ("bias", layout)):
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


def _apply(rule: Rule, change: Callable, arrays, shape: tuple[int, ...]):
    """Apply one side of a rule; an array of the wrong number of axes or elements is the file's fault, not ours."""
    try:
        return change(arrays)
    except (ValueError, IndexError):
        raise _misfit(rule, shape) from None


def _misfit(rule: Rule, shape: tuple[int, ...]) -> ConversionError:
    return ConversionError(f"'{rule.ours}' of shape {shape} does not fit the model's configuration")


def check_names(tensors: Mapping[str, np.ndarray], expected: set[str]) -> None:
    """Raise ConversionError, with some of their names, if tensors are missing or left over."""
    missing, unexpected = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unexpected:
        parts = {"missing": missing, "unexpected": unexpected}
        told = "; ".join(f"{what}: {', '.join(names[:3])} ({len(names)})" for what, names in parts.items() if names)
        raise ConversionError(f"these are not the weights of this DiT configuration ({told})")
