"""``--train-only``: which parameters train, and what a run saves by leaving the others as they are."""

import difflib
import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from paddle_dit.config import DiTConfig
from paddle_dit.errors import ConfigError
from paddle_dit.models.refit import LABELS, parameter_shapes
from paddle_dit.training.costs import Memory, Setup, memory, train_flops


def trained_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Return the names of the parameters that train: those that match any pattern, or all without patterns.

    Args:
        names: of all parameters.
        patterns: ``*bias*``, ``blocks.2?.attn.*``: shell patterns for whole names, case matters.

    Raises:
        ConfigError: a pattern matches nothing; the nearest parts of names are told.
    """
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"--train-only '{pattern}' matches no parameter{_hint(pattern, names)}")
    return {name for name in names if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


def _hint(pattern: str, names: list[str]) -> str:
    pieces = {".".join(parts[:end]) for name in names for parts in [name.split(".")] for end in range(1, len(parts))}
    pieces |= {piece for name in names for piece in name.split(".") if not piece.isdecimal()}
    bare = pattern.strip("*.")
    near = difflib.get_close_matches(bare, sorted(pieces), n=3, cutoff=0.5)
    shown = ", ".join(f"'*{piece}*'" for piece in ([bare] if bare in pieces else near)) or "'*bias*', 'y_embedder*'"
    return f"; try {shown}"


def freeze(model, patterns: Sequence[str]) -> None:
    """Let only the parameters that match train, if there are patterns: the others get no gradient and no state.

    Call it before the optimizer is built, and after the model is laid out on the ranks, which makes new parameters.
    """
    parameters = dict(model.named_parameters())
    trained = trained_names(parameters, patterns)
    for name, parameter in parameters.items():
        parameter.stop_gradient = name not in trained


def count_trained(config: DiTConfig, patterns: Sequence[str]) -> tuple[int, int]:
    """Return how many parameters train and how many there are, without the fixed position table."""
    shapes = parameter_shapes(config)
    trained = trained_names(shapes, patterns)
    return sum(math.prod(shapes[name]) for name in trained), sum(map(math.prod, shapes.values()))


def memory_of(config: DiTConfig, setup: Setup, patterns: Sequence[str]) -> Memory:
    """Return the bytes of training on each card: frozen weights have neither gradients nor the optimizer's moments.

    Their averages and, under O2, their float32 copies stay, so that checkpoints hold them exactly. The activations are
    those of training everything, so an upper bound.

    Raises:
        ConfigError: as of :func:`~paddle_dit.training.costs.memory`.
    """
    whole = memory(config, setup)
    if not patterns:
        return whole
    shapes = parameter_shapes(config)
    own = sum(math.prod(shapes[name]) // _pieces(name, setup) for name in trained_names(shapes, patterns))
    return replace(whole, gradients=(2 if setup.halves else 4) * own, optimizer=8 * own)


def _pieces(name: str, setup: Setup) -> int:
    """Return among how many tensor-parallel ranks a parameter is divided."""
    if setup.tensor_parallel_degree == 1:
        return 1
    from paddle_dit.training.parallel import cut_of

    return setup.tensor_parallel_degree if cut_of(name) else 1


def flops_of(config: DiTConfig, patterns: Sequence[str], recompute_every: int = 0) -> float:
    """Return the FLOPs of training on one image, at most: a frozen matrix needs no gradient of its own.

    That is one of its three products. Below the first parameter that trains the second is not needed either, which is
    not counted.
    """
    shapes, tokens = parameter_shapes(config), math.prod(config.grid)
    trained = trained_names(shapes, patterns)
    frozen = [name for name, shape in shapes.items() if name not in trained and len(shape) == 2 and name != LABELS]
    saved = sum(math.prod(shapes[name]) * (1 if _per_sample(name) else tokens) for name in frozen)
    return train_flops(config, recompute_every) - 2.0 * saved


def _per_sample(name: str) -> bool:
    """Whether a matrix is applied to the conditioning, once per sample, not to every token."""
    return "adaLN" in name or name.startswith("t_embedder")
