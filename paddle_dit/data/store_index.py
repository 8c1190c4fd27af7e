"""What ``index.json`` of a packed store says, and how it and the files that it names are checked and written."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from paddle_dit.data.npy import map_npy, non_finite_rows
from paddle_dit.errors import DataError
from paddle_dit.files import PARTIAL, describe, flush_to_disk

FORMAT_VERSION = 1
INDEX = "index.json"
LABELS = "labels.npy"
KINDS = ("latents", "moments")
DTYPES = ("float16", "float32")

_FILLED_IN = ("num_samples", "shards", "flip_shards", "skipped")  # while the store is written
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


def new_index(
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    dtype: str = "float16",
    kind: str = "latents",
    label_names: Mapping[int, str] | None = None,
    vae: Mapping[str, Any] | None = None,
    source: str = "",
    flip: bool = False,
) -> dict[str, Any]:
    """Return the index of a store that holds nothing yet.

    Args:
        sample_shape: ``(C, h, w)`` of one latent, or ``(2C, h, w)`` for moments.
        num_classes: labels are in ``[0, num_classes)``.
        dtype: ``"float16"`` or ``"float32"``, as stored.
        kind: ``"latents"`` (multiplied by the scaling factor) or ``"moments"`` (as the VAE gives them).
        label_names: id -> name.
        vae: ``{"name": ..., "scaling_factor": ..., "image_size": ...}``.
        source: where the samples come from, in words.
        flip: whether each sample comes with that of its mirrored image.

    Raises:
        DataError: names for ids that are no classes, or a name that is no Unicode.
    """
    if kind not in KINDS or dtype not in DTYPES:
        raise ValueError(f"kind must be one of {KINDS} and dtype one of {DTYPES}, not {kind!r} and {dtype!r}")
    if not all(0 <= int(label) < num_classes for label in label_names or ()):
        raise DataError(f"label_names has ids outside [0, {num_classes}); give one name per class at most")
    index = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "scaled": kind == "latents",
        "sample_shape": [int(size) for size in sample_shape],
        "dtype": dtype,
        "num_samples": 0,
        "num_classes": int(num_classes),
        "label_names": None if label_names is None else {str(label): name for label, name in label_names.items()},
        "vae": None if vae is None else dict(vae),
        "source": source,
        "has_flip": flip,
        "shards": [],
        "flip_shards": [],
        "skipped": [],
    }
    _as_json(index)  # what cannot be written should be known before hours of work, not after
    return index


def read_index(folder: str | Path) -> dict[str, Any]:
    """Read and check ``index.json``: keys, types, and that its parts agree; opens no other file.

    Raises:
        DataError: there is none, or it is not what a store of this version writes.
    """
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        _as_json(index)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: no packed store, or one only half written; {MEND}") from None
    except (OSError, ValueError, RecursionError, DataError) as error:
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
    skipped = index.get("skipped", [])  # as "extraction", which only an extraction has, it may be absent
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
        "skipped": isinstance(skipped, list) and all(isinstance(name, str) for name in skipped),
        "extraction": isinstance(index.get("extraction", {}), dict),
    }
    for key, holds in consistent.items():
        if not holds:
            raise DataError(f"{path}: '{key}' contradicts the rest or is not allowed; {MEND}")
    return index


def differing(index: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    """Return the keys in which a finished store's index is another than planned, but for what is filled in later."""
    return [key for key, value in planned.items() if key not in _FILLED_IN and index.get(key) != value]


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


def _as_json(index: object) -> bytes:
    """Return UTF-8, or raise DataError for what Python makes of names that are none and JSON may hold all the same."""
    try:
        return json.dumps(index, indent=1, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        line = f"{error.object[: error.start].splitlines()[-1]}{error.object[error.start :].splitlines()[0]}"
        raise DataError(f"{line.strip()!a} is no text in Unicode; give it another name") from None


def plain_name(name: str | bytes) -> str:
    """Return the name of a file as text that any JSON reader takes: bytes that are no UTF-8 are written out."""
    return os.fsencode(name).decode(errors="backslashreplace")


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


def first_sample(array: np.ndarray) -> str:
    """Return the sha256 of the first of the samples ``[n, *sample_shape]``: it tells the shards of two runs apart."""
    return hashlib.sha256(array[:1].tobytes()).hexdigest()


def check_labels(labels: np.ndarray, num_classes: int, where: Path, first: int = 0) -> None:
    """Raise DataError naming the first of ``labels [N]``, of the samples from ``first`` on, that is no class."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{where}: sample {first + wrong[0]} has label {labels[wrong[0]]}, outside [0, {num_classes}); "
            "mend the labels"
        )


def as_stored(
    folder: Path, index: Mapping[str, Any], arrays: Mapping[str, np.ndarray], labels: np.ndarray, first: int
) -> dict[str, np.ndarray]:
    """Return ``arrays [n, *sample_shape]`` in the store's dtype, once they and ``labels [n]`` are found good.

    Args:
        folder: for the message.
        index: of the store.
        arrays: by the index's keys.
        labels: int64 ``[n]``.
        first: number of the first sample, for the message.

    Raises:
        DataError: a label is no class, or a sample is not finite in the store's dtype.
    """
    for array in arrays.values():
        if array.shape != (len(labels), *index["sample_shape"]):
            raise ValueError(f"samples are {array.shape} for {len(labels)} labels of {index['sample_shape']}")
    check_labels(labels, index["num_classes"], folder, first)
    with np.errstate(over="ignore"):  # an overflow to infinity is reported below, with its sample
        stored = {key: array.astype(index["dtype"], copy=False) for key, array in arrays.items()}
    for array in stored.values():
        bad = non_finite_rows(array)
        if len(bad):
            raise DataError(
                f"sample {first + bad[0]} is not finite in {index['dtype']}; check the image or use float32"
            )
    return stored


def shard_files(index: Mapping[str, Any], number: int) -> dict[str, str]:
    """Return the names of the files of a shard: key of the index -> name."""
    keys = {"shards": "", "flip_shards": "_flip"} if index["has_flip"] else {"shards": ""}
    return {key: f"{index['kind']}{mirrored}-{number:05d}.npy" for key, mirrored in keys.items()}


def write_arrays(
    folder: Path, index: Mapping[str, Any], number: int, arrays: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Write the files of a shard and return their entries, by the keys of the index as ``arrays [n, *sample_shape]``.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    return {
        key: {
            "length": len(arrays[key]),
            "first_sample": first_sample(arrays[key]),
            **write_file(folder / name, functools.partial(_write_npy, arrays[key])),
        }
        for key, name in shard_files(index, number).items()
    }


def write_index(folder: Path, index: Mapping[str, Any], labels: np.ndarray) -> None:
    """Write ``labels [N]`` and, last of a store, an index whose shards are all written.

    Raises:
        DataError: there is no sample, or the files cannot be written.
    """
    if not len(labels):
        raise DataError(f"no sample was given for {folder}; an empty store is not written")
    entry = write_file(folder / LABELS, functools.partial(_write_npy, labels))
    text = index_text({**index, "num_samples": len(labels), "labels": entry})
    write_file(folder / INDEX, lambda file: file.write(text))


def _write_npy(array: np.ndarray, file: BinaryIO) -> None:
    """Write what ``np.save`` would, but for its silence where the disk is full at the last bytes."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(np.ascontiguousarray(array).data)


def read_signed(path: Path) -> dict[str, Any] | None:
    """Read what :func:`index_text` wrote, or return None where it is not as it was written."""
    try:
        content = path.read_bytes()
        values = json.loads(content)
        del values["sha256"]
        return values if index_text(values) == content else None
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> dict[str, Any]:
    """Write a file of the store whole or not at all, and return its entry for the index.

    Two processes that write the same file at once do not disturb each other: each writes beside it under a name of its
    own, and the last to rename wins.

    Raises:
        DataError: the disk is full or the folder cannot be written; nothing of the new file is left.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        try:
            with partial.open("wb") as file:
                write(file)
            flush_to_disk(partial)
            entry = {"file": path.name, **describe(partial)}
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from None
    return entry
