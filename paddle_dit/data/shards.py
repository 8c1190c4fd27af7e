"""Writing a packed store shard by shard: in any order, by any number of processes, continued after any kill.

::

    plan.json               what is being written; first
    latents-00012.npy ...   as in the finished store
    shard-00012.json        what shard 12 holds; after its files, so that it is there exactly when they are

Shard k of a plan takes the samples ``[k * shard_size, (k + 1) * shard_size)``. One process, the one that holds the
folder's lock, calls :func:`begin` before any other writes, and :func:`finish` after all; in between, anyone may write
any shard. What a finished folder holds depends on the plan and the samples alone.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddle_dit.data.store_index import (
    INDEX,
    as_stored,
    index_text,
    read_signed,
    shard_files,
    write_arrays,
    write_file,
    write_index,
)
from paddle_dit.errors import DataError
from paddle_dit.files import PARTIAL, flush_to_disk, sha256

PLAN = "plan.json"
_HALF_WRITTEN = "a store half written: run the command that began it again, which continues, or remove the folder"
_VERSION = 2
_OWN = re.compile(
    r"((latents|moments)(_flip)?-\d{5,}\.npy|labels\.npy|(shard-\d{5,}|plan|index)\.json)(\.(\d+\.)?partial)?"
)
_SIDECAR = re.compile(r"shard-(\d{5,})\.json")
_TOLD, _WIDEST = 4, 40  # differences between two plans that a line tells, and the characters of a value
_ROWS = 512  # taken at once for the sums, which are in float64


@dataclass(frozen=True)
class StorePlan:
    """What a store will hold, known before its first shard is written.

    Attributes:
        index: of the empty store, from :func:`paddle_dit.data.store_index.new_index`.
        num_samples: how many there will be, those that will be skipped included.
        shard_size: samples per shard; the last has the rest.
        job: whatever else decides the content (the source's fingerprint, a seed, flags): plain JSON values.
    """

    index: Mapping[str, Any]
    num_samples: int
    shard_size: int
    job: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise DataError(f"the shard size must be 1 or more, got {self.shard_size}")

    @property
    def num_shards(self) -> int:
        """How many shards there will be."""
        return -(-self.num_samples // self.shard_size)

    def span(self, number: int) -> range:
        """Return the samples of a shard."""
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, self.num_samples))

    @functools.cached_property
    def text(self) -> bytes:
        """What stands in ``plan.json``."""
        rest = {"num_samples": self.num_samples, "shard_size": self.shard_size, "job": dict(self.job)}
        return index_text({"plan_version": _VERSION, **rest, "index": dict(self.index)})

    @functools.cached_property
    def name(self) -> str:
        """The plan's hash: what the sidecars know it by."""
        return hashlib.sha256(self.text).hexdigest()


@dataclass(frozen=True)
class Summary:
    """What was written.

    Attributes:
        num_samples: without those skipped.
        mean: of each channel, float64 ``[C]``, as stored; mirrored samples are left out.
        std: likewise.
        skipped: names of the samples that were skipped.
    """

    num_samples: int
    mean: np.ndarray
    std: np.ndarray
    skipped: tuple[str, ...]


def begin(folder: Path, plan: StorePlan) -> bool:
    """Claim ``folder`` for a plan, or find it claimed for the same one; only by the holder of the folder's lock.

    Returns:
        Whether the store is already whole, because only the end of :func:`finish` was left to do.

    Raises:
        DataError: the folder holds a store, another plan's shards or shards of none, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in own_files(folder):
            if path.name.endswith(PARTIAL):
                path.unlink()
        if (folder / PLAN).exists() and _claimed(folder, plan):
            if (folder / INDEX).exists():
                _remove_traces(folder)
            return (folder / INDEX).exists()
        halves = [path for path in folder.glob(f"*{PARTIAL}") if path.is_dir()]
        present = sorted(path.name for path in [*own_files(folder), *halves])
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    if INDEX in present:
        raise DataError(f"{folder} already holds a store; choose another folder")
    if present:
        raise DataError(
            f"{folder} holds {present[0]} but no {PLAN}: half written by another command or version; remove the "
            "folder or choose another"
        )
    write_file(folder / PLAN, lambda file: file.write(plan.text))
    return False


def write_shard(
    folder: Path,
    plan: StorePlan,
    number: int,
    samples: np.ndarray,
    labels: np.ndarray,
    flipped: np.ndarray | None = None,
    skipped: Sequence[str] = (),
) -> None:
    """Write a shard; when this returns it is finished, and a kill before leaves it unfinished.

    Args:
        folder: claimed for the plan by :func:`begin`.
        plan: what the store will hold.
        number: of the shard, from 0.
        samples: floats ``[n, *sample_shape]``, in the order of ``plan.span(number)``.
        labels: integers ``[n]``.
        flipped: the mirrored samples, shaped as ``samples``, if the plan has them.
        skipped: names of the samples of the span that are left out; ``n`` and these make up the span.

    Raises:
        DataError: a sample is not finite in the store's dtype, a label is no class, or the disk is full; the shard is
            unfinished then.
    """
    labels, span = np.asarray(labels, np.int64), plan.span(number)
    if len(labels) + len(skipped) != len(span):
        raise ValueError(f"shard {number} takes {len(span)} samples, got {len(labels)} and {len(skipped)} skipped")
    given = [samples] if flipped is None else [samples, flipped]
    arrays = as_stored(
        folder, plan.index, dict(zip(shard_files(plan.index, number), given, strict=True)), labels, span.start
    )
    sums = _sums(arrays["shards"])
    values = {
        "plan": plan.name,
        "files": write_arrays(folder, plan.index, number, arrays) if len(labels) else {},
        "labels": labels.tolist(),
        "sum": sums[0].tolist(),
        "sum_of_squares": sums[1].tolist(),
        "skipped": list(skipped),
    }
    write_file(_sidecar(folder, number), lambda file: file.write(index_text(values)))


def finished_shards(folder: Path, plan: StorePlan, *, hashes: bool = False) -> set[int]:
    """Return the numbers of the shards that need not be written again.

    Args:
        folder: where they are.
        plan: what the store will hold.
        hashes: read them and compare their sha256 too, as a job that continues should; else only their sizes.

    Raises:
        DataError: a shard is of another plan.
    """
    return {number for number, _ in _finished(folder, plan, hashes)}


def finish(folder: Path, plan: StorePlan) -> Summary:
    """Turn the shards into a store: write the labels and the index, and remove what only the writing needed.

    The names of the samples that were left out stand in the index, as ``skipped``.

    Raises:
        DataError: shards are missing or of another plan, no sample is left, or the disk is full; nothing is lost.
    """
    shards = dict(_finished(folder, plan, hashes=False))
    missing = [number for number in range(plan.num_shards) if number not in shards]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {plan.num_shards} shards, the first is shard {missing[0]}; run the "
            "command that writes them again"
        )
    ordered = [shards[number] for number in range(plan.num_shards)]
    index = {**plan.index, "skipped": [name for shard in ordered for name in shard["skipped"]]}
    for key in shard_files(index, 0):
        index[key] = [shard["files"][key] for shard in ordered if shard["files"]]
    labels = np.array([label for shard in ordered for label in shard["labels"]], np.int64)
    if not len(labels):
        raise DataError(
            f"{folder}: all {plan.num_samples:,} samples were skipped; mend what they are made of, remove the folder, "
            "then run the same command again"
        )
    write_index(folder, index, labels)
    flush_to_disk(folder)
    _remove_traces(folder)
    return _summary(ordered, index, len(labels))


def own_files(folder: Path) -> list[Path]:
    """Return the files in a folder that writing a store makes, finished or not."""
    return [path for path in folder.iterdir() if _OWN.fullmatch(path.name)]


def sidecars(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the number and sidecar of each shard that has one, in order."""
    for path in sorted(folder.iterdir()):
        if named := _SIDECAR.fullmatch(path.name):
            yield int(named[1]), path


def check_not_half_written(folder: Path, mend: str = "") -> None:
    """Raise DataError for a folder whose store is not finished; ``mend`` is another way on, for the message."""
    if (folder / PLAN).exists() and not (folder / INDEX).exists():
        raise DataError(f"{folder} holds {_HALF_WRITTEN}{mend}")


def _finished(folder: Path, plan: StorePlan, hashes: bool) -> Iterable[tuple[int, dict]]:
    """Yield the number and sidecar of each finished shard."""
    for number, path in sidecars(folder):
        values = read_signed(path)
        if values is None:
            continue  # damaged: the shard is written again
        if values.get("plan") != plan.name or number >= plan.num_shards:
            raise DataError(f"{path} is of another run than {folder / PLAN}; remove it, and its shard is written again")
        if all(_fits(folder / entry["file"], entry, hashes) for entry in values["files"].values()):
            yield number, values


def _fits(path: Path, entry: Mapping[str, Any], hashes: bool) -> bool:
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    return not hashes or sha256(path) == entry["sha256"]


def _claimed(folder: Path, plan: StorePlan) -> bool:
    """Say whether the folder is this plan's already; one in which nothing was finished is emptied.

    Raises:
        DataError: it holds shards of another plan; what differs is said.
    """
    if (folder / PLAN).read_bytes() == plan.text:
        return True
    if not any(sidecars(folder)) and not any(path.is_dir() or path.name == INDEX for path in folder.iterdir()):
        for path in own_files(folder):
            path.unlink()
        return False
    former, mend = read_signed(folder / PLAN), "remove the folder or choose another"
    if former is None:
        raise DataError(f"{folder / PLAN} is damaged; {mend}")
    if former.get("plan_version") != _VERSION:
        raise DataError(f"{folder} was half written by another version of this program; finish it there, or {mend}")
    lines = _differences(former, json.loads(plan.text))
    told = "; ".join(lines[:_TOLD]) + (f" and {len(lines) - _TOLD} more" if len(lines) > _TOLD else "")
    raise DataError(f"{folder} holds a store half written with other settings ({told}); run the former command, {mend}")


def _differences(former: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in {**former, **present}:
        before, now = former.get(name), present.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += _differences(before, now)
        elif before != now and name != "sha256":
            lines.append(f"{name} was {_short(before)}, now {_short(now)}")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST // 2]}…"


def _sidecar(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.json"


def _remove_traces(folder: Path) -> None:
    """Remove the sidecars and, last, the plan: until then the same command finds out that the store is whole."""
    for _, path in sidecars(folder):
        path.unlink()
    (folder / PLAN).unlink()


def _sums(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the sum of squares of each channel, float64 ``[C]``."""
    sums = np.zeros((2, samples.shape[1]))
    for start in range(0, len(samples), _ROWS):
        rows = samples[start : start + _ROWS].astype(np.float64)
        sums += rows.sum(axis=(0, 2, 3)), np.square(rows).sum(axis=(0, 2, 3))
    return sums[0], sums[1]


def _summary(shards: Sequence[Mapping[str, Any]], index: Mapping[str, Any], count: int) -> Summary:
    values = count * math.prod(index["sample_shape"][1:])
    mean = np.sum([shard["sum"] for shard in shards], axis=0) / values
    variance = np.sum([shard["sum_of_squares"] for shard in shards], axis=0) / values - mean**2
    return Summary(count, mean, np.sqrt(np.maximum(variance, 0)), tuple(index["skipped"]))
