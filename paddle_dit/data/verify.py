"""Verification: reads a whole data set once, block by block, and names all that is bad in it.

Opening a data set checks what is cheap and stops at the first fault. Here every byte is read, nothing stops, and each
fault is one line that says what is wrong and the mend.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from paddle_dit.data import npy_pairs
from paddle_dit.data.npy import non_finite_rows
from paddle_dit.data.shards import check_not_half_written, own_files
from paddle_dit.data.store_index import INDEX, MEND, index_text, map_file, read_index
from paddle_dit.errors import DataError

_BLOCK = 1 << 20  # bytes read at once: few enough to stay in the processor's cache between the hash and the checks
_NAMED = 5  # samples of one file that a line names

Advance = Callable[[int], object]


class StoreCheck:
    """Check of a packed store; the files may be damaged in any way as long as ``index.json`` can be read.

    Attributes:
        total: what ``problems`` will report as done in the end, in ``unit``.
        num_classes: as the index says.
        mend: what to do when there are problems.

    Args:
        folder: where ``index.json`` lies.
        num_classes: how many classes the index should say; None for any.

    Raises:
        DataError: the index is missing or damaged; no other file can be judged then.
    """

    unit = "B"
    mend = f"{MEND}, or only the files named"

    def __init__(self, folder: Path, num_classes: int | None = None) -> None:
        self.folder = folder
        self._asked_classes = num_classes
        self._index = read_index(folder)
        self.num_classes: int = self._index["num_classes"]
        self._entries = [*self._index["shards"], *self._index["flip_shards"]]
        self.total = sum(entry["bytes"] for entry in [*self._entries, self._index["labels"]])
        self._labels: Counter[int] = Counter()

    def problems(self, advance: Advance = lambda amount: None) -> Iterator[str]:
        """Read everything once; yield one line for each kind of fault in each file.

        Args:
            advance: is told how many more bytes are done, ``total`` in all.
        """
        yield from self._index_problems()
        shape, dtype, start = tuple(self._index["sample_shape"]), self._index["dtype"], 0
        for number, entry in enumerate(self._entries):
            if number == len(self._index["shards"]):
                start = 0  # mirrored samples have the numbers of the others
            bad = _Samples()
            yield from self._read(entry, (entry["length"], *shape), dtype, _look_for_non_finite(bad, start), advance)
            if bad.count:
                yield f"{self.folder / entry['file']} holds NaN or infinity in {bad}; extract the features again"
            start += entry["length"]
        entry, bad = self._index["labels"], _Samples()
        yield from self._read(entry, (self._index["num_samples"],), "int64", self._count_labels(bad), advance)
        if bad.count:
            yield f"{self.folder / entry['file']} has labels outside [0, {self.num_classes}) for {bad}; mend the labels"

    def summary(self) -> str:
        """Say what the store holds; the labels are known after ``problems``."""
        index = self._index
        mirrored = ", each with its mirrored image's" if index["has_flip"] else ""
        return (
            f"packed store of {index['num_samples']:,} {index['kind']}{mirrored}, {index['dtype']} "
            f"{index['sample_shape']}, {self.total:,} bytes; {_labels_in_words(self._labels, self.num_classes)}"
        )

    def _index_problems(self) -> Iterator[str]:
        path, index = self.folder / INDEX, {key: value for key, value in self._index.items() if key != "sha256"}
        if path.read_bytes() != index_text(index):
            yield f"{path} is not as it was written (its own sha256 differs): damaged, or edited by hand; {MEND}"
        named = {entry["file"] for entry in [*self._entries, self._index["labels"]]}
        arrays = (file for file in sorted(own_files(self.folder)) if file.suffix == ".npy")
        for stray in (file for file in arrays if file.name not in named):
            yield f"{stray} is not named in {INDEX}, so nothing reads it: of another run, or left over; remove it"
        if self._asked_classes not in (None, self.num_classes):
            yield f"{path} says {self.num_classes} classes, --num-classes {self._asked_classes}; leave the flag out"

    def _read(
        self, entry: dict, shape: tuple[int, ...], dtype: str, look: Callable[[np.ndarray, int], None], advance: Advance
    ) -> Iterator[str]:
        """Show every block of rows, with the number of its first, to ``look``; yield what is wrong with the file."""
        path, done = self.folder / entry["file"], 0
        try:
            array = map_file(self.folder, entry, shape, dtype)
            rows = max(1, _BLOCK // array[:1].nbytes)
            # Read, not mapped: a failing disk is an error here, and would be a signal that kills the process there.
            with path.open("rb") as file:
                digest = hashlib.sha256(file.read(entry["bytes"] - array.nbytes))
                for first in range(0, len(array), rows):
                    size = array[first : first + rows].nbytes
                    block = file.read(size)
                    if len(block) < size:
                        raise DataError(f"{path} became shorter while it was read; {MEND}")
                    digest.update(block)
                    look(np.frombuffer(block, dtype).reshape(-1, *shape[1:]), first)
                    advance(len(block))
                    done += len(block)
            if digest.hexdigest() != entry["sha256"]:
                yield f"{path} has changed: its sha256 is not that in {INDEX}; {MEND}"
        except DataError as error:
            yield str(error)
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror}); {MEND}"
        advance(entry["bytes"] - done)

    def _count_labels(self, bad: "_Samples") -> Callable[[np.ndarray, int], None]:
        def look(labels: np.ndarray, first: int) -> None:
            wrong = (labels < 0) | (labels >= self.num_classes)
            bad.add(first + np.flatnonzero(wrong))
            values, counts = np.unique(labels[~wrong], return_counts=True)
            self._labels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

        return look


class PairsCheck:
    """Check of fast-DiT's npy pairs, which carry no sums: every file is read and compared with the first good one.

    Attributes:
        total: what ``problems`` will report as done in the end, in ``unit``.
        num_classes: as given; None accepts any label from 0.
        mend: what to do when there are problems.

    Args:
        folder: the folder that holds the two folders.
        num_classes: labels must be in ``[0, num_classes)``.

    Raises:
        DataError: there is no such pair of folders.
    """

    unit = "pair"
    mend = "restore or extract again the files named, or remove their pairs"

    def __init__(self, folder: Path, num_classes: int | None = None) -> None:
        self.num_classes = num_classes
        self._features, self._labels_folder = npy_pairs.find_pair(folder)
        self._listed = [npy_pairs.list_stems(part) for part in (self._features, self._labels_folder)]
        self._stems = np.array(npy_pairs.sort_stems(self._listed[0][0] & self._listed[1][0]))
        self.total = len(self._stems)
        self._like: np.ndarray | None = None
        self._labels: Counter[int] = Counter()

    def problems(self, advance: Advance = lambda amount: None) -> Iterator[str]:
        """Read every pair once; yield one line for each file that is bad or does not belong.

        Args:
            advance: is told how many more pairs are done, ``total`` in all.
        """
        yield from self._stray_files()
        if not self.total:
            yield f"{self._features} and {self._labels_folder} hold no pair; extract the features first"
        for index, stem in enumerate(self._stems):
            for part, look in ((self._features, self._look_at_latent), (self._labels_folder, self._look_at_label)):
                try:
                    look(f"{part}{os.sep}{stem}.npy", index)
                except DataError as error:
                    yield str(error)
            advance(1)

    def summary(self) -> str:
        """Say what the folders hold; the latents and labels are known after ``problems``."""
        like = "" if self._like is None else f", {self._like.dtype} {list(self._like.shape)}"
        return f"{self.total:,} npy pairs{like}; {_labels_in_words(self._labels, self.num_classes)}"

    def _stray_files(self) -> Iterator[str]:
        (stems, others), (label_stems, label_others) = self._listed
        for folder, names in ((self._features, others), (self._labels_folder, label_others)):
            yield from (npy_pairs.no_npy(folder / name) for name in sorted(names))
        for stem in npy_pairs.sort_stems(stems ^ label_stems):
            folders = (self._features, self._labels_folder)
            has, lacks = folders if stem in stems else reversed(folders)
            yield f"{has / stem}.npy has no partner: {lacks.name} lacks it; add the partner or remove the file"
        for stem in npy_pairs.words_among_numbers(stems & label_stems):
            yield npy_pairs.misnamed(self._features, stem)

    def _look_at_latent(self, path: str, index: int) -> None:
        latent = npy_pairs.read_latent(path, None if self._like is None else self._like.shape)
        if self._like is None:
            self._like = latent
        if latent.dtype != self._like.dtype:
            raise DataError(f"{path} is {latent.dtype}, the first file {self._like.dtype}; extract it again")
        if len(non_finite_rows(latent[None])):
            raise DataError(npy_pairs.not_finite(path, index))

    def _look_at_label(self, path: str, index: int) -> None:
        self._labels[npy_pairs.read_label(path, index, self.num_classes)] += 1


def open_check(path: str | Path, num_classes: int | None = None) -> StoreCheck | PairsCheck:
    """Return the check of the packed store or the npy pairs in the folder ``path``.

    Args:
        path: a folder with ``index.json`` or with ``*_features/`` and ``*_labels/``.
        num_classes: how many classes there should be; None for any.

    Raises:
        DataError: there is neither, the store is half written, or its index is damaged.
    """
    path = Path(path)
    if num_classes is not None and num_classes < 1:
        raise DataError(f"--num-classes must be 1 or more, got {num_classes}")
    check_not_half_written(path)
    return (StoreCheck if (path / INDEX).exists() else PairsCheck)(path, num_classes)


class _Samples:
    """Samples that share a fault: how many they are, and the numbers of the first few."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[int] = []

    def add(self, numbers: np.ndarray) -> None:
        self.count += len(numbers)
        self._first += numbers[: _NAMED - len(self._first)].tolist()

    def __str__(self) -> str:
        if self.count == 1:
            return f"sample {self._first[0]}"
        more = ", ..." if self.count > len(self._first) else ""
        return f"{self.count:,} samples: {', '.join(map(str, self._first))}{more}"


def _look_for_non_finite(bad: _Samples, start: int) -> Callable[[np.ndarray, int], None]:
    return lambda samples, first: bad.add(start + first + non_finite_rows(samples))


def _labels_in_words(counts: Counter[int], num_classes: int | None) -> str:
    """Say how many classes occur, and how often the rarest and the commonest of them do."""
    if not counts:
        return "no label could be read"
    of = "" if num_classes is None else f" of {num_classes:,}"
    least, most = min(counts.values()), max(counts.values())
    often = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"{len(counts):,}{of} classes occur, {often} samples each"
