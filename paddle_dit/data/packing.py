"""From npy pairs to a packed store: resumable, and compared with the source sample by sample."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paddle_dit.data import npy_pairs, shards
from paddle_dit.data.labels import imagenet_labels
from paddle_dit.data.npy import non_finite_rows
from paddle_dit.data.shards import PLAN, StorePlan
from paddle_dit.data.source import LatentSource, open_source
from paddle_dit.data.store import PackedStore
from paddle_dit.data.store_index import INDEX, MEND, differing, new_index, plain_name
from paddle_dit.errors import DataError
from paddle_dit.files import read_json, sha256
from paddle_dit.folder_lock import LOCK, FolderLock
from paddle_dit.models.vae import OVERRIDDEN, find_vae
from paddle_dit.models.vae_files import is_here

BLOCK = 256  # samples read at once
_PROBED = 16  # samples that tell sources with the same file names apart

Advance = Callable[[int], object]


class Conversion:
    """What packing and unpacking share: a folder held while it is written, and the comparison at the end.

    Attributes:
        source: what is read.
        folder: where the result is.
        dtype: of the result's samples.
        total: samples of the source.
        done: those that an earlier start is known to have written.
    """

    source: LatentSource
    folder: Path
    dtype: str
    total: int
    done = 0
    whole = False

    def hold(self, report: Callable[[str], None], begin: Callable[[], bool]) -> None:
        """Lock the folder, then ``begin``; keep the lock unless that fails.

        Raises:
            ConfigError: another process holds it.
            DataError: it cannot be written, or ``begin`` refuses it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder, "the folder", report)
        except OSError as error:
            raise DataError(f"cannot write {self.folder}: {error.strerror}; choose another folder") from None
        with contextlib.ExitStack() as undo:
            undo.callback(self._release)
            self.whole = begin()
            undo.pop_all()
        self.done = self.total if self.whole else self.done

    def check_source(self) -> None:
        """Raise DataError where a packed source is not as it was written: its result would vouch for the damage."""
        if isinstance(self.source, PackedStore):
            for entry in [*self.source.index["shards"], *self.source.index["flip_shards"]]:
                path = self.source.folder / entry["file"]
                if sha256(path) != entry["sha256"]:
                    raise DataError(f"{path} has changed: its sha256 is not that in {INDEX}; {MEND}")

    def compare(self, result: LatentSource, advance: Advance = lambda amount: None) -> None:
        """Read every sample of source and result and compare them, mirrored ones too where the result has them.

        Args:
            result: what was written.
            advance: is told how many more samples are done, ``total`` in all.

        Raises:
            DataError: the first difference; the source's samples are rounded to the result's dtype before.
        """
        for start in range(0, self.total, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, self.total))
            different = first_difference(self.source, result, self.dtype, numbers)
            if different is not None:
                raise DataError(f"sample {different} differs from its source; remove {self.folder} and start anew")
            advance(len(numbers))

    def __enter__(self):
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let others have the folder."""
        self._release()

    def _release(self) -> None:
        (self.folder / LOCK).unlink(missing_ok=True)
        self._lock.release()


class Packing(Conversion):
    """A packed store in the making; a context manager that holds the folder.

    Args:
        path: the source: npy pairs, or a store to be packed anew.
        folder: where the store will be; made if need be.
        dtype: ``"float16"`` or ``"float32"``.
        shard_size: samples per file.
        num_classes: how many there are; npy pairs do not say. Default: what ``label_names`` has ids for.
        label_names: id -> name. Default: the source's.
        vae: name and scaling_factor, those that are known. Default: the source's. Where the VAE is on this machine, its
            files tell the rest.
        report: is told, in one line, of another process that ended without releasing the folder.

    Raises:
        DataError: the source cannot be read, or the folder holds something else.
        ConfigError: another process is packing into the folder.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        *,
        dtype: str = "float16",
        shard_size: int = 16_384,
        num_classes: int | None = None,
        label_names: Mapping[int, str] | None = None,
        vae: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.folder = check_apart(path, folder)
        self.source = _open(path, num_classes, label_names)
        index = new_index(
            sample_shape=self.source.sample_shape,
            num_classes=self.source.num_classes,
            dtype=dtype,
            kind=self.source.kind,
            label_names=self.source.label_names if label_names is None else label_names,
            vae=_vae_of(self.source, vae),
            source=self.source.index["source"]
            if isinstance(self.source, PackedStore)
            else f"npy pairs {plain_name(path.resolve().name)}",
            flip=self.source.has_flip,
        )
        self._path, self.total, self.dtype = path, len(self.source), dtype
        self._plan = StorePlan(index, self.total, shard_size, identity_of(self.source))
        self._finished: set[int] = set()
        self.hold(report, self._begin)

    def run(self, advance: Advance = lambda amount: None) -> PackedStore:
        """Write what is left and return the store, opened.

        Args:
            advance: is told how many more samples are done, ``total - done`` in all.

        Raises:
            DataError: a sample cannot be read or stored, or the disk is full; the same command continues.
        """
        if not self.whole:
            self.check_source()
            for number in sorted(set(range(self._plan.num_shards)) - self._finished):
                shards.write_shard(self.folder, self._plan, number, *self._read(self._plan.span(number), advance))
            shards.finish(self.folder, self._plan)
            self.whole = True
        return PackedStore(self.folder)

    def _read(self, span: range, advance: Advance) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return a shard's samples in the store's dtype, their labels and, where there are any, the mirrored ones."""
        parts = [np.empty((len(span), *self.source.sample_shape), self._plan.index["dtype"]) for _ in range(2)]
        labels = np.empty(len(span), np.int64)
        for start in range(0, len(span), BLOCK):
            rows = slice(start, min(start + BLOCK, len(span)))
            numbers = np.arange(span.start + rows.start, span.start + rows.stop)
            for part, flipped in zip(parts, _sides(self.source, numbers), strict=False):
                samples, labels[rows] = self.source.gather(numbers, flipped)
                with np.errstate(over="ignore"):
                    part[rows] = samples
                bad = non_finite_rows(part[rows])
                if len(bad):
                    raise DataError(
                        f"{_name(self.source, self._path, numbers[bad[0]])} holds {np.abs(samples[bad[0]]).max():.6g}, "
                        f"which {part.dtype} cannot; use --dtype float32 in another folder, or mend the sample"
                    )
            advance(len(numbers))
        return parts[0], labels, parts[1] if self.source.has_flip else None

    def _begin(self) -> bool:
        if self._is_packed() or shards.begin(self.folder, self._plan):
            return True
        self._finished = shards.finished_shards(self.folder, self._plan, hashes=True)
        self.done = sum(len(self._plan.span(number)) for number in self._finished)
        return False

    def _is_packed(self) -> bool:
        """Say whether the folder already holds this very store: its index as planned, and the same samples."""
        if not (self.folder / INDEX).exists() or (self.folder / PLAN).exists():
            return False
        store, plan = PackedStore(self.folder), self._plan
        lengths = [len(plan.span(number)) for number in range(plan.num_shards)]
        if differing(store.index, plan.index) or [entry["length"] for entry in store.index["shards"]] != lengths:
            return False
        return first_difference(self.source, store, plan.index["dtype"], probed(self.total)) is None


def read_label_names(name: str | None) -> dict[int, str] | None:
    """Return the class names that ``--label-names`` asks for.

    Args:
        name: "imagenet", a JSON file of ``{"0": "tench", ...}``, or None.

    Raises:
        DataError: no such file, or one that holds something else.
    """
    if name is None or name == "imagenet":
        return None if name is None else imagenet_labels()
    table = read_json(Path(name), DataError)
    if not table or not all(
        key.isdecimal() and str(int(key[:9])) == key and isinstance(value, str) for key, value in table.items()
    ):
        raise DataError(f'--label-names {name} must hold names by class id, such as {{"0": "tench"}}')
    return {int(key): value for key, value in table.items()}


def _vae_of(source: LatentSource, given: Mapping[str, Any] | None) -> dict | None:
    """Return what the index says of the VAE: what the source knew, but for what is given."""
    if not given:
        return source.vae
    known = {**(source.vae or {}), **given}
    known.pop(OVERRIDDEN, None)  # of the source's VAE or factor
    if not known.get("name") or not is_here(known["name"]):
        return known
    vae = find_vae(known["name"], known.get("scaling_factor"), fingerprint=False)
    return vae.record(vae.factor * source.sample_shape[1])


def _open(path: Path, num_classes: int | None, label_names: Mapping[int, str] | None) -> LatentSource:
    if num_classes is None and label_names and not (path / INDEX).exists():
        num_classes = max(label_names) + 1
    source = open_source(path, num_classes=num_classes)
    if source.num_classes is None:
        raise DataError(f"{path}: npy pairs do not say how many classes there are; give --num-classes (ImageNet: 1000)")
    return source


def check_apart(path: Path, folder: Path) -> Path:
    """Return ``folder``, once it is found to be another than the source's."""
    if folder.resolve() == path.resolve():
        raise DataError(f"{folder} is the source itself; choose another folder for the result")
    return folder


def identity_of(source: LatentSource) -> dict[str, str]:
    """Name the source's content: npy pairs' fingerprint is of the file names alone, so some samples are added."""
    digest = hashlib.sha256()
    for array in source.gather(probed(len(source))):
        digest.update(array.tobytes())
    return {"source_fingerprint": source.fingerprint, "source_samples": digest.hexdigest()}


def probed(count: int) -> np.ndarray:
    """Return the places, int64, of a few of ``count`` samples: for a cheap look at what they are."""
    return np.unique(np.linspace(0, count - 1, _PROBED).astype(np.int64))


def _sides(source: LatentSource, numbers: np.ndarray) -> Iterator[np.ndarray | None]:
    """Yield what to pass as ``flipped`` to get the samples and, where there are any, the mirrored ones."""
    yield None
    if source.has_flip:
        yield np.ones(len(numbers), bool)


def first_difference(source: LatentSource, result: LatentSource, dtype: str, numbers: np.ndarray) -> int | None:
    """Return the first of the samples ``numbers [B]`` that is not ``source``'s rounded to ``dtype``, or None."""
    for flipped in _sides(result, numbers):
        samples, labels = source.gather(numbers, flipped)
        found, found_labels = result.gather(numbers, flipped)
        with np.errstate(over="ignore"):
            rounded = samples.astype(dtype)
        same = (rounded.astype(np.float32) == found).all(axis=(1, 2, 3)) & (labels == found_labels)
        if not same.all():
            return int(numbers[np.argmin(same)])
    return None


def _name(source: LatentSource, path: Path, number: int) -> str:
    """Name a sample for people: of npy pairs by its file."""
    if isinstance(source, PackedStore):
        return f"sample {number} of {path}"
    features = npy_pairs.find_pair(path)[0]
    return f"{features / npy_pairs.sort_stems(npy_pairs.list_stems(features)[0])[number]}.npy (sample {number})"
