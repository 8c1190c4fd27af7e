"""Packed latent store: a folder of large plain ``.npy`` files that describes itself.

::

    index.json                 what the folder holds, with the length and sha256 of every file and its own; last
    latents-00000.npy ...      [n,C,h,w] float16 or float32, ALREADY MULTIPLIED by the VAE's scaling factor
    latents_flip-00000.npy ... the same for the mirrored images (optional)
    labels.npy                 [N] int64

A store of kind ``moments`` has ``moments-00000.npy [n,2C,h,w]`` instead: mean and log-variance of the VAE's
distribution along the channels, not scaled (``"scaled": false``); whoever draws a latent from them multiplies it by
the scaling factor. ``sample_shape`` is the shape of one stored sample in both kinds. NumPy alone can read it all.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paddle_dit.data.npy import non_finite_rows
from paddle_dit.data.shards import check_not_half_written, own_files
from paddle_dit.data.store_index import (
    INDEX,
    MEND,
    as_stored,
    check_labels,
    first_sample,
    map_file,
    new_index,
    read_index,
    shard_files,
    write_arrays,
    write_index,
)
from paddle_dit.errors import DataError
from paddle_dit.files import sha256


class PackedStore:
    """Read-only packed store; a :class:`paddle_dit.data.source.LatentSource`.

    Opening maps the files and checks all that can be checked without reading more than the labels and a sample of each
    file; :mod:`paddle_dit.data.verify` reads everything. ``gather`` reads only what it is asked for. The attributes are
    ``kind``, ``sample_shape``, ``num_classes``, ``label_names`` (id -> name, or ``None``), ``labels`` (int64 ``[N]``),
    ``vae``, ``has_flip`` and ``index`` (the whole of ``index.json``).

    Args:
        folder: where ``index.json`` lies.

    Raises:
        DataError: no store, or one whose files are missing, damaged or not as the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.kind: str = self.index["kind"]
        self.sample_shape: tuple[int, ...] = tuple(self.index["sample_shape"])
        self.num_classes: int = self.index["num_classes"]
        names = self.index["label_names"]
        self.label_names = None if names is None else {int(label): name for label, name in names.items()}
        self.vae: dict | None = self.index["vae"]
        self.has_flip: bool = self.index["has_flip"]
        self._entries = [*self.index["shards"], *self.index["flip_shards"]]
        self._shards = [
            map_file(self.folder, entry, (entry["length"], *self.sample_shape), self.index["dtype"])
            for entry in self._entries
        ]
        lengths = [entry["length"] for entry in self.index["shards"]]
        self._starts = np.cumsum([0, *lengths[:-1]])
        self.labels = map_file(self.folder, self.index["labels"], (len(self),), "int64").copy()
        self._check_content()
        sums = [entry["sha256"] for entry in [*self.index["shards"], self.index["labels"]]]
        self.fingerprint = hashlib.sha256("".join(sums).encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.index["num_samples"]

    def _check_content(self) -> None:
        """Raise DataError for files of another run that have the form of this one's, as far as a glance can tell."""
        entry = self.index["labels"]
        check_labels(self.labels, self.num_classes, self.folder / entry["file"])
        if sha256(self.folder / entry["file"]) != entry["sha256"]:
            raise DataError(self._is_foreign(entry))
        for shard, entry in zip(self._shards, self._entries, strict=True):
            if "first_sample" in entry and entry["first_sample"] != first_sample(shard):
                raise DataError(self._is_foreign(entry))

    def _is_foreign(self, entry: Mapping[str, Any]) -> str:
        path = self.folder / entry["file"]
        return f"{path} is not the file that {INDEX} describes: of another run, or changed; {MEND}"

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Read one batch.

        Args:
            indices: integers ``[B]`` in ``[0, N)``.
            flipped: booleans ``[B]``: which samples to take from the mirrored images; the store must have them.

        Returns:
            float32 samples ``[B, *sample_shape]`` (of a ``moments`` store the moments) and int64 labels ``[B]``.

        Raises:
            IndexError: an index out of range.
            DataError: a sample holds NaN or infinity.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"sample indices must be in [0, {len(self)})")
        shard = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[shard]
        if flipped is not None:
            if not self.has_flip:
                raise ValueError("the store holds no mirrored samples")
            shard = shard + np.asarray(flipped, bool) * len(self._starts)
        samples = np.empty((len(indices), *self.sample_shape), np.float32)
        for number in np.unique(shard):
            here = shard == number
            samples[here] = self._shards[number][rows[here]]
        bad = non_finite_rows(samples)
        if len(bad):
            path = self.folder / self._entries[shard[bad[0]]]["file"]
            raise DataError(f"sample {indices[bad[0]]} in {path} holds NaN or infinity; extract the features again")
        return samples, self.labels[indices]


class StoreWriter:
    """Write a packed store; a context manager that streams, holding one shard in memory (two with ``flip``).

    ``index.json`` is written last, so that an interrupted store is never taken for a whole one. Leaving the ``with``
    block by an exception writes no index.

    Args:
        folder: made if need be.
        shard_size: samples per file.
        overwrite: replace a store that is already there.
        content: ``sample_shape``, ``num_classes`` and whatever else
            :func:`paddle_dit.data.store_index.new_index` takes.

    Raises:
        DataError: a store is there already, or the folder cannot be written.
    """

    def __init__(
        self, folder: str | Path, *, shard_size: int = 16_384, overwrite: bool = False, **content: Any
    ) -> None:
        self._index = new_index(**content)
        form = (shard_size, *self._index["sample_shape"]), self._index["dtype"]
        self.folder = Path(folder)
        self._labels: list[np.ndarray] = []
        self._num_samples = self._filled = 0
        # np.empty touches no memory until a row is written, so a small store stays small.
        self._buffers = {key: np.empty(*form) for key in shard_files(self._index, 0)}
        self._prepare_folder(overwrite)

    def append(self, samples: np.ndarray, labels: np.ndarray, flipped: np.ndarray | None = None) -> None:
        """Add ``samples [B, *sample_shape]`` with integer ``labels [B]`` (and ``flipped``, shaped as ``samples``).

        Raises:
            DataError: labels out of range, or values that are not finite in the store's dtype.
        """
        labels = np.asarray(labels, np.int64)
        parts = dict(zip(self._buffers, [samples] if flipped is None else [samples, flipped], strict=True))
        parts = as_stored(self.folder, self._index, parts, labels, self._num_samples)
        self._labels.append(labels)
        self._num_samples += len(labels)
        self._fill(parts)

    def close(self) -> None:
        """Write what is left, the labels and, last, the index; nothing may be appended afterwards."""
        if self._filled:
            self._flush()
        write_index(self.folder, self._index, np.concatenate([np.empty(0, np.int64), *self._labels]))

    def __enter__(self) -> "StoreWriter":
        """Return itself."""
        return self

    def __exit__(self, exception_type: type | None, *_: object) -> None:
        """Close, unless an exception leaves the store incomplete."""
        if exception_type is None:
            self.close()

    def _prepare_folder(self, overwrite: bool) -> None:
        if (self.folder / INDEX).exists() and not overwrite:
            raise DataError(f"{self.folder} already holds a store; choose another folder or allow overwriting it")
        if not overwrite:
            check_not_half_written(self.folder, ", or choose another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / INDEX).unlink(missing_ok=True)
            # Without an index, shards are the leftovers of an interrupted run or of the store being replaced.
            for path in own_files(self.folder):
                path.unlink()
        except OSError as error:
            raise DataError(f"cannot write {self.folder}: {error.strerror}; choose another folder") from None

    def _fill(self, parts: dict[str, np.ndarray]) -> None:
        """Copy ``parts`` into the buffers, writing a shard whenever they are full."""
        count, done = len(next(iter(parts.values()))), 0
        while done < count:
            room = len(self._buffers["shards"]) - self._filled
            take = min(room, count - done)
            for key, part in parts.items():
                self._buffers[key][self._filled : self._filled + take] = part[done : done + take]
            self._filled += take
            done += take
            if take == room:
                self._flush()

    def _flush(self) -> None:
        arrays = {key: buffer[: self._filled] for key, buffer in self._buffers.items()}
        for key, entry in write_arrays(self.folder, self._index, len(self._index["shards"]), arrays).items():
            self._index[key].append(entry)
        self._filled = 0
