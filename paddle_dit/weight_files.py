"""Which file of a folder holds a model's weights, and tables of tensors that are cut into several files."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from paddle_dit.errors import ConversionError
from paddle_dit.files import read_json
from paddle_dit.readers import STOCK_WEIGHTS, read_by_content

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pdparams")
_INDEX = ".index.json"
_PART = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state)[\w.-]*")

# The names of a model's weights in a folder of diffusers and of ppdiffusers, each in the order in which it looks.
_FAMILIES = (
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    tuple(STOCK_WEIGHTS.values()),
)


class Shards(Mapping):
    """Tensors that lie in several files beside their index, each read when it is asked for.

    Raises:
        ConversionError: the index is damaged, names missing files or files outside of its folder, or does not agree
            with what they hold.
    """

    def __init__(self, index: Path):
        placed = read_json(index, ConversionError).get("weight_map")
        plain = isinstance(placed, dict) and all(isinstance(file, str) for file in placed.values())
        if not plain or not placed or not all(re.fullmatch(r"\w[\w.-]*", file) for file in placed.values()):
            raise ConversionError(f"{index} must have a weight_map from tensors to files beside it; fetch it again")
        files = sorted(set(placed.values()))
        lost = [file for file in files if not (index.parent / file).is_file()]
        if lost:
            raise ConversionError(
                f"{index} names {len(files)} files, of which {len(lost)} are missing: {', '.join(lost[:3])}; fetch them"
            )
        tables = {file: read_by_content(index.parent / file) for file in files}
        for file, table in tables.items():
            wanted = {name for name, place in placed.items() if place == file}
            if not isinstance(table, Mapping) or table.keys() != wanted:
                raise ConversionError(f"{index.parent / file} does not hold the tensors that {index.name} says")
        self.first = index.parent / files[0]
        self._placed, self._tables = placed, tables

    def __iter__(self) -> Iterator[str]:
        return iter(self._placed)

    def __len__(self) -> int:
        return len(self._placed)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tables[self._placed[name]][name]


def find_weights(folder: Path) -> Path | None:
    """Return the file that holds a folder's weights, or the index of several; None where there is none.

    Raises:
        ConversionError: there are several, and no rule says which of them is meant.
    """
    files = sorted(path.name for path in folder.iterdir() if _is_weights(path))
    if len(files) <= 1:
        return folder / files[0] if files else None
    for family in _FAMILIES:
        plain = {file.removesuffix(_INDEX) for file in files}
        if plain <= set(family):
            first = next(name for name in family if name in plain)
            return folder / (first if first in files else first + _INDEX)
    raise ConversionError(
        f"{folder} holds {len(files)} files of weights ({', '.join(files[:4])}{', …' if len(files) > 4 else ''}), and "
        "one was expected; name the one that you mean"
    )


def read_table(path: Path) -> object:
    """Read what :func:`find_weights` returned, or any weights file; see :func:`~paddle_dit.readers.read_by_content`."""
    return Shards(path) if path.name.endswith(_INDEX) else read_by_content(path)


def _is_weights(path: Path) -> bool:
    name = path.name.removesuffix(_INDEX)
    known = name.endswith(SUFFIXES) and not _PART.search(name) and not _NOT_WEIGHTS.fullmatch(name)
    return known and not name.startswith(".") and path.is_file()
