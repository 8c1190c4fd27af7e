"""The table of tensors in a weights file: which of several, and what its names begin with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_dit.conversion.architecture import Description, describe_arguments
from paddle_dit.errors import CheckpointError, ConversionError
from paddle_dit.models.vae_weights import LDM
from paddle_dit.pickles import shown
from paddle_dit.readers import PARAMETER_NAMES
from paddle_dit.weight_files import read_table

_WRAPPERS = ("module.", "_orig_mod.", "_layers.")  # of data parallelism and compilation, before every name
# Tables in a training checkpoint: the paper's code and fast-DiT have both, PaddleMIX has its averages in a file apart.
_KINDS = {"ema": ("ema", "data"), "model": ("model",)}


class Renamed(Mapping):
    """Some tensors of a table under other names; none is read before it is asked for."""

    def __init__(self, tensors: Mapping[str, np.ndarray], names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]


@dataclass(frozen=True)
class Table:
    """Tensors under their names in a model.

    Attributes:
        tensors: name -> array, read when it is asked for where the file allows it.
        kind: what held them, for the user.
        description: what the file says of the model besides.
        notes: what was set aside, a line each.
    """

    tensors: Mapping[str, np.ndarray]
    kind: str = "state dict"
    description: Description | None = None
    notes: tuple[str, ...] = ()


def open_table(path: Path, weights: str) -> Table:
    """Return the tensors of the model that a weights file, or an index of several, holds.

    Args:
        path: see :func:`~paddle_dit.weight_files.read_table`.
        weights: "ema" or "model"; a file that holds just one kind and does not say which is taken as it is.

    Raises:
        CheckpointError: a training checkpoint without these weights.
        ConversionError: the file cannot be read or holds no tensors.
    """
    values = read_table(path)
    if not isinstance(values, Mapping):
        raise ConversionError(f"{path} holds a {type(values).__name__}, not a table of tensors")
    names = [name for name in values if name != PARAMETER_NAMES]
    inner = {name: values[name] for name in names if isinstance(values, dict) and _is_table(values[name])}
    if inner:
        return _choose(path, values, inner, weights)
    for name in names:
        if isinstance(values, dict) and not (isinstance(name, str) and isinstance(values[name], np.ndarray)):
            raise ConversionError(f"{path}: entry '{shown(name)}' is no tensor; give a file of weights only")
    return _unwrapped(path, Table(Renamed(values, {name: name for name in names})), weights)


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, np.ndarray) for item in value.values())


def _choose(path: Path, values: dict, inner: dict, weights: str) -> Table:
    if isinstance(values.get("state_dict"), dict):
        return _unwrapped(path, Table(values["state_dict"], "checkpoint of PyTorch Lightning"), weights)
    found = next((name for name in _KINDS[weights] if name in inner), None)
    if found is None:
        for other, names in _KINDS.items():
            if set(names) & inner.keys():
                raise CheckpointError(f"{path} holds no {weights} weights; ask for --weights {other}")
        tables = ", ".join(shown(name) for name in list(inner)[:4])
        raise ConversionError(f"{path} holds tables of tensors ({tables}), none of which is called model or ema")
    kind = f"training checkpoint, {weights} weights"
    table = Table(inner[found], kind, describe_arguments(values.get("args"), path.name))
    return _unwrapped(path, table, weights, chosen=True)


def _unwrapped(path: Path, table: Table, weights: str, chosen: bool = False) -> Table:
    """Take off what stands before the names; ``chosen`` tells that the table is known to be of these weights."""
    names = {name: name for name in table.tensors}
    while prefix := next((mark for mark in _WRAPPERS if names and all(name.startswith(mark) for name in names)), None):
        names = {name.removeprefix(prefix): old for name, old in names.items()}
    for part in ("transformer.", LDM):
        if not any(name.startswith(part) for name in names):
            continue
        taken = {name.removeprefix(part): old for name, old in names.items() if name.startswith(part)}
        rest = [name for name in names if not name.startswith(part)]
        if part != LDM and not chosen:  # PaddleMIX's trainer
            average = {name: names.get(f"model_ema.{name.replace('.', '')}") for name in taken}
            if weights == "ema" and None in average.values():
                raise CheckpointError(f"{path} holds no ema weights; ask for --weights model")
            taken = average if weights == "ema" else taken
            table = replace(table, kind=f"trainer checkpoint, {weights} weights")
            foreign = [name for name in rest if not name.startswith(("vae.", "model_ema."))]
            taken |= {name: names[name] for name in foreign}  # so that they are found to be left over
        notes = (f"set aside beside the model: {len(rest)}, such as '{rest[0]}'",) if rest else ()
        return replace(table, tensors=Renamed(table.tensors, taken), notes=notes)
    return replace(table, tensors=Renamed(table.tensors, names))
