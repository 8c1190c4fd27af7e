"""What ``index.json`` of a packed store says, how it is checked, and how the files it names are written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from paddle_dit.errors import DataError
from paddle_dit.files import describe, replace_file

FORMAT_VERSION = 1
INDEX = "index.json"
LABELS = "labels.npy"
KINDS = ("latents", "moments")
DTYPES = ("float16", "float32")

_INDEX_TYPES = {
    "format_version": int,
    "kind": str,
    "scaled": bool,
    "sample_shape": list,
    "dtype": str,
    "num_samples": int,
    "num_classes": int,
    "label_names": (dict, type(None)),
    "vae": (dict, type(None)),
    "source": str,
    "has_flip": bool,
    "shards": list,
    "flip_shards": list,
    "labels": dict,
}
_FILE_TYPES = {"file": str, "bytes": int, "sha256": str}
MEND = "copy or make the store again"


def read_index(folder: str | Path) -> dict[str, Any]:
    """Read and check ``index.json``: keys, types, and that its parts agree; opens no other file.

    Raises:
        DataError: there is none, or it is not what a store of this version writes.
    """
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: no packed store, or one only half written; {MEND}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {MEND}") from None
    if isinstance(index, dict) and index.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {index['format_version']}, not {FORMAT_VERSION}; use the version that wrote it"
        )
    _check_types(index, _INDEX_TYPES, path)
    shards, flips = index["shards"], index["flip_shards"]
    for entry in [*shards, *flips]:
        _check_types(entry, {**_FILE_TYPES, "length": int}, path)
    _check_types(index["labels"], _FILE_TYPES, path)
    lengths = [entry["length"] for entry in shards]
    names = index["label_names"] or {}
    consistent = {
        "kind": index["kind"] in KINDS,
        "dtype": index["dtype"] in DTYPES,
        "sample_shape": len(index["sample_shape"]) == 3
        and all(isinstance(n, int) and n > 0 for n in index["sample_shape"]),
        "num_samples": index["num_samples"] == sum(lengths) > 0 and min(lengths) > 0,
        "label_names": all(
            label.isdecimal() and int(label) < index["num_classes"] and isinstance(name, str)
            for label, name in names.items()
        ),
        "flip_shards": [entry["length"] for entry in flips] == (lengths if index["has_flip"] else []),
        "file": all(Path(entry["file"]).name == entry["file"] for entry in [*shards, *flips, index["labels"]]),
    }
    for key, holds in consistent.items():
        if not holds:
            raise DataError(f"{path}: '{key}' contradicts the rest or is not allowed; {MEND}")
    return index


def _check_types(mapping: object, types: Mapping[str, Any], path: Path) -> None:
    if not isinstance(mapping, dict):
        raise DataError(f"{path} is not an index of a packed store; {MEND}")
    for key, expected in types.items():
        if not isinstance(mapping.get(key, ...), expected):
            raise DataError(f"{path} lacks a valid '{key}'; {MEND}")


def check_labels(labels: np.ndarray, num_classes: int, where: Path) -> None:
    """Raise DataError naming the first of ``labels [N]`` outside ``[0, num_classes)``."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{where}: sample {wrong[0]} has label {labels[wrong[0]]}, outside [0, {num_classes}); mend the labels"
        )


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> dict[str, Any]:
    """Write a file of the store whole or not at all, and return its entry for the index.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    try:
        replace_file(path, write)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from None
    return {"file": path.name, **describe(path)}
