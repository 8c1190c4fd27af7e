"""What ``index.json`` of a packed store says, and how it and the files that it names are checked and written."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from paddle_dit.data.npy import map_npy
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
_VAE_TYPES = {"name": (str, ""), "scaling_factor": (int | float, 1.0), "image_size": (int, 1)}  # each may be absent
_FILE_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # none leads out of the folder
_SHA256 = re.compile("[0-9a-f]{64}")
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
    names, vae, files = index["label_names"] or {}, index["vae"] or {}, [*shards, *flips, index["labels"]]
    consistent = {
        "kind": index["kind"] in KINDS,
        "dtype": index["dtype"] in DTYPES,
        "sample_shape": len(index["sample_shape"]) == 3
        and all(type(n) is int and n > 0 for n in index["sample_shape"]),
        "num_samples": index["num_samples"] == sum(lengths) > 0 and min(lengths) > 0,
        "num_classes": 0 < index["num_classes"] < 2**31,
        "label_names": all(
            label.isdecimal() and len(label) < 20 and int(label) < index["num_classes"] and isinstance(name, str)
            for label, name in names.items()
        ),
        "flip_shards": [entry["length"] for entry in flips] == (lengths if index["has_flip"] else []),
        "vae": all(isinstance(vae.get(key, absent), kinds) for key, (kinds, absent) in _VAE_TYPES.items()),
        "file": len({entry["file"] for entry in files}) == len(files)
        and all(_FILE_NAME.fullmatch(entry["file"]) for entry in files),
        "sha256": all(_SHA256.fullmatch(entry["sha256"]) for entry in files),
    }
    for key, holds in consistent.items():
        if not holds:
            raise DataError(f"{path}: '{key}' contradicts the rest or is not allowed; {MEND}")
    return index


def _check_types(mapping: object, types: Mapping[str, Any], path: Path) -> None:
    if not isinstance(mapping, dict):
        raise DataError(f"{path} is not an index of a packed store; {MEND}")
    for key, expected in types.items():
        value = mapping.get(key, ...)
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise DataError(f"{path} lacks a valid '{key}'; {MEND}")


def index_text(index: Mapping[str, Any]) -> bytes:
    """Return what stands in ``index.json``: ``index``, and the sha256 of its text as a last key."""
    digest = hashlib.sha256(_as_json(index)).hexdigest()
    return _as_json({**index, "sha256": digest}) + b"\n"


def _as_json(index: Mapping[str, Any]) -> bytes:
    return json.dumps(index, indent=1, ensure_ascii=False).encode(errors="surrogatepass")


def map_file(folder: Path, entry: Mapping[str, Any], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Map the array in a file of the store, whose entry in the index is given, read-only.

    Raises:
        DataError: the file is missing, of another size than the entry says, no ``.npy`` file, or its array is not of
            this shape and dtype.
    """
    path = folder / entry["file"]
    if not path.is_file():
        raise DataError(f"{path} is missing; {MEND}")
    if path.stat().st_size != entry["bytes"]:
        raise DataError(f"{path} has {path.stat().st_size} bytes, {INDEX} says {entry['bytes']}; {MEND}")
    array = map_npy(path)
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " in Fortran's order"
        stated = f"{dtype} {list(shape)}"
        raise DataError(f"{path} is {array.dtype} {list(array.shape)}{order}, expected {stated}; {MEND}")
    return array


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
