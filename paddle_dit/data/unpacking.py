"""From a packed store to npy pairs, fast-DiT's layout: resumable, and never taken for whole before it is."""

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paddle_dit.data import shards
from paddle_dit.data.npy import non_finite_rows
from paddle_dit.data.npy_pairs import NpyPairs
from paddle_dit.data.packing import (
    BLOCK,
    Advance,
    Conversion,
    check_apart,
    first_difference,
    identity_of,
    probed,
)
from paddle_dit.data.shards import PLAN, StorePlan
from paddle_dit.data.source import open_source
from paddle_dit.data.store_index import new_index
from paddle_dit.errors import DataError


class Unpacking(Conversion):
    """npy pairs in the making; a context manager that holds the folder.

    They are written in folders named ``*.partial``, which nothing takes for npy pairs, and renamed at the end. Those
    that an earlier start left are compared with what they should be, so that ``done`` is 0 at first.

    Args:
        path: the packed store.
        folder: where the pairs' two folders will be; made if need be.
        name: of the data set: ``<name>_features`` and ``<name>_labels``.
        dtype: of the latents.
        report: is told, in one line, of mirrored samples that are left out, and of another process that ended without
            releasing the folder.

    Raises:
        DataError: the store cannot be read or holds no latents, or the folder holds something else.
        ConfigError: another process is writing into the folder.
    """

    def __init__(
        self, path: Path, folder: Path, name: str, dtype: str = "float32", report: Callable[[str], None] = print
    ) -> None:
        self.folder, self.dtype = check_apart(path, folder), dtype
        self.source = open_source(path)
        if self.source.kind != "latents":
            raise DataError(f"{path} holds {self.source.kind}; npy pairs hold latents: give a store of latents")
        if self.source.has_flip:
            report("npy pairs have no mirrored samples: those of the store are left out")
        self.total = len(self.source)
        self._features, self._labels = folder / f"{name}_features", folder / f"{name}_labels"
        index = new_index(sample_shape=self.source.sample_shape, num_classes=1, dtype=dtype)
        self._plan = StorePlan(index, self.total, self.total, {**identity_of(self.source), "name": name})
        self.hold(report, lambda: self._are_whole() or shards.begin(folder, self._plan))

    def run(self, advance: Advance = lambda amount: None) -> NpyPairs:
        """Write what is left and return the pairs, opened.

        Args:
            advance: is told how many more samples are done, ``total`` in all.

        Raises:
            DataError: a sample cannot be read, or the disk is full; the same command continues.
        """
        if not self.whole:
            self.check_source()
            try:
                self._write(advance)
            except OSError as error:
                raise DataError(
                    f"cannot write {error.filename or self.folder}: {error.strerror or error}; free some space, then "
                    "run the same command again"
                ) from None
            self.whole = True
        return NpyPairs(self.folder)

    def _are_whole(self) -> bool:
        """Say whether the very pairs are there already."""
        there = [part.exists() for part in (self._features, self._labels)]
        if not any(there) or (self.folder / PLAN).exists():
            return False
        if all(there):
            pairs = NpyPairs(self.folder)
            same = len(pairs) == self.total and pairs.sample_shape == self.source.sample_shape
            if same and first_difference(self.source, pairs, self.dtype, probed(self.total)) is None:
                return True
        raise DataError(f"{self.folder} already holds {self._features.name}; choose another folder")

    def _write(self, advance: Advance) -> None:
        folders = {final: final.with_name(f"{final.name}.partial") for final in (self._features, self._labels)}
        for final, partial in folders.items():
            if not final.exists():  # else the end of an earlier start was cut off between the two
                partial.mkdir(exist_ok=True)
        features, labels = (final if final.exists() else partial for final, partial in folders.items())
        latent, label = _header((1, *self.source.sample_shape), self.dtype), _header((1,), "int64")
        for start in range(0, self.total, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, self.total))
            samples, classes = self.source.gather(numbers)
            with np.errstate(over="ignore"):
                samples = samples.astype(self.dtype)
            bad = non_finite_rows(samples)
            if len(bad):
                raise DataError(f"sample {numbers[bad[0]]} holds more than {self.dtype} can; use --dtype float32")
            for row, number in enumerate(numbers):
                _put(f"{features}{os.sep}{number}.npy", latent + samples[row].tobytes())
                _put(f"{labels}{os.sep}{number}.npy", label + classes[row].tobytes())
            advance(len(numbers))
        os.sync()  # once for all: waiting for each of millions of small files would take hours
        for final, partial in folders.items():
            if partial.exists():
                partial.rename(final)
        (self.folder / PLAN).unlink()


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    """Return the header of a ``.npy`` file: it is the same for all, and making it costs more than the writing."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def _put(path: str, content: bytes) -> None:
    """Write a file unless it holds ``content`` already; one that cannot be written is not left half written."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        if file.read() == content:
            return
    try:
        with open(path, "wb", buffering=0) as file:
            if file.write(content) < len(content):
                raise OSError(None, "only a part could be written", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
