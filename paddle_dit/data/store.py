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

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paddle_dit.data.npy import non_finite_rows
from paddle_dit.data.store_index import (
    DTYPES,
    FORMAT_VERSION,
    INDEX,
    KINDS,
    LABELS,
    check_labels,
    index_text,
    map_file,
    read_index,
    write_file,
)
from paddle_dit.errors import DataError


class PackedStore:
    """Read-only packed store; a :class:`paddle_dit.data.source.LatentSource`.

    Opening maps the files and checks all that can be checked without reading samples, which
    :mod:`paddle_dit.data.verify` does; ``gather`` reads only what it is asked for. The attributes are ``kind``,
    ``sample_shape``, ``num_classes``, ``label_names`` (id -> name, or ``None``), ``labels`` (int64 ``[N]``), ``vae``,
    ``has_flip`` and ``index`` (the whole of ``index.json``).

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
        check_labels(self.labels, self.num_classes, self.folder / self.index["labels"]["file"])
        sums = [entry["sha256"] for entry in [*self.index["shards"], self.index["labels"]]]
        self.fingerprint = hashlib.sha256("".join(sums).encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.index["num_samples"]

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
        sample_shape: ``(C, h, w)`` of one latent, or ``(2C, h, w)`` for moments.
        num_classes: labels are in ``[0, num_classes)``.
        dtype: ``"float16"`` or ``"float32"``, as stored.
        kind: ``"latents"`` (multiplied by the scaling factor) or ``"moments"`` (as the VAE gives them).
        label_names: id -> name.
        vae: ``{"name": ..., "scaling_factor": ..., "image_size": ...}``.
        source: where the samples come from, in words.
        shard_size: samples per file.
        flip: whether each sample comes with that of its mirrored image.
        overwrite: replace a store that is already there.

    Raises:
        DataError: a store is there already, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        dtype: str = "float16",
        kind: str = "latents",
        label_names: Mapping[int, str] | None = None,
        vae: Mapping[str, Any] | None = None,
        source: str = "",
        shard_size: int = 16_384,
        flip: bool = False,
        overwrite: bool = False,
    ) -> None:
        if kind not in KINDS or dtype not in DTYPES:
            raise ValueError(f"kind must be one of {KINDS} and dtype one of {DTYPES}, not {kind!r} and {dtype!r}")
        self.folder = Path(folder)
        self._index = {
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
        }
        if not all(0 <= int(label) < num_classes for label in label_names or ()):
            raise DataError(f"label_names has ids outside [0, {num_classes}); give one name per class at most")
        json.dumps(self._index)  # what cannot be written should be known before hours of work, not after
        self._labels: list[np.ndarray] = []
        self._filled = 0
        # np.empty touches no memory until a row is written, so a small store stays small.
        keys = ["shards", "flip_shards"] if flip else ["shards"]
        self._buffers = {key: np.empty((shard_size, *sample_shape), dtype) for key in keys}
        self._prepare_folder(overwrite)

    def append(self, samples: np.ndarray, labels: np.ndarray, flipped: np.ndarray | None = None) -> None:
        """Add ``samples [B, *sample_shape]`` with integer ``labels [B]`` (and ``flipped``, shaped as ``samples``).

        Raises:
            DataError: labels out of range, or values that are not finite in the store's dtype.
        """
        labels = np.asarray(labels, np.int64)
        parts = dict(zip(self._buffers, [samples] if flipped is None else [samples, flipped], strict=True))
        for part in parts.values():
            if part.shape != (len(labels), *self._index["sample_shape"]):
                raise ValueError(f"samples are {part.shape} for {len(labels)} labels of {self._index['sample_shape']}")
        check_labels(labels, self._index["num_classes"], self.folder)
        with np.errstate(over="ignore"):  # an overflow to infinity is reported below, with its sample
            parts = {key: part.astype(self._index["dtype"], copy=False) for key, part in parts.items()}
        for part in parts.values():
            bad = non_finite_rows(part)
            if len(bad):
                number = self._index["num_samples"] + bad[0]
                raise DataError(
                    f"sample {number} is not finite in {self._index['dtype']}; check the image or use float32"
                )
        self._labels.append(labels)
        self._index["num_samples"] += len(labels)
        self._fill(parts)

    def close(self) -> None:
        """Write what is left, the labels and, last, the index; nothing may be appended afterwards."""
        if not self._labels:
            raise DataError(f"no sample was given for {self.folder}; an empty store is not written")
        if self._filled:
            self._flush()
        labels = np.concatenate(self._labels)
        self._index["labels"] = write_file(self.folder / LABELS, functools.partial(np.save, arr=labels))
        write_file(self.folder / INDEX, lambda file: file.write(index_text(self._index)))

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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / INDEX).unlink(missing_ok=True)
            # Without an index, shards are the leftovers of an interrupted run or of the store being replaced.
            for path in self.folder.iterdir():
                if re.fullmatch(r"((latents|moments)(_flip)?-\d{5}|labels)\.npy(\.partial)?", path.name):
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
        for key, buffer in self._buffers.items():
            prefix = self._index["kind"] + ("_flip" if key == "flip_shards" else "")
            path = self.folder / f"{prefix}-{len(self._index[key]):05d}.npy"
            entry = write_file(path, functools.partial(np.save, arr=buffer[: self._filled]))
            self._index[key].append({"length": self._filled, **entry})
        self._filled = 0
