"""From labelled images to a packed store of what a VAE makes of them, by any number of processes.

Every shard is written whole by one process, its images always cut into the same batches, since the last bits of what a
VAE gives depend on the batch. Noise depends on the seed and the image. So the finished folder has the same bytes
whatever processes wrote it, and however often they were killed.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.data import shards
from paddle_dit.data.image_workers import ImageReader
from paddle_dit.data.images import find_images
from paddle_dit.data.npy import non_finite_rows
from paddle_dit.data.shards import PLAN, StorePlan, Summary
from paddle_dit.data.store import PackedStore
from paddle_dit.data.store_index import INDEX, differing, new_index, plain_name, read_index, shard_files
from paddle_dit.errors import DataError
from paddle_dit.extraction.encoding import Encoder
from paddle_dit.extraction.options import ExtractionOptions
from paddle_dit.extraction.summary import PREVIEW, write_preview
from paddle_dit.meeting import Place, SharedJob, Stop
from paddle_dit.models.vae import find_vae, load_vae

_BLOCK = 4096  # bytes, of which file systems give a small file at least one
_IMAGES_AHEAD = 2  # batches that are read while the VAE works

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Result:
    """What an extraction ends with, on rank 0.

    Attributes:
        store: the packed store.
        summary: of what was written; None where the store was whole already.
    """

    store: PackedStore
    summary: Summary | None


@dataclass(frozen=True)
class _StoreWork:
    """A store's shards as the parts that processes share."""

    folder: Path
    plan: StorePlan
    is_whole: Callable[[], bool]
    flag = "--features-path"

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def num_parts(self) -> int:
        return self.plan.num_shards

    def span(self, number: int) -> range:
        return self.plan.span(number)

    def begin(self) -> bool:
        return shards.begin(self.folder, self.plan)

    def finished(self) -> set[int]:
        return shards.finished_shards(self.folder, self.plan, hashes=True)

    def sidecars(self) -> Iterator[tuple[int, Path]]:
        return shards.sidecars(self.folder)


class Extraction(SharedJob):
    """A packed store of features in the making; a context manager. On rank 0 it holds the folder.

    Attributes:
        is_main: whether this process is rank 0.
        total: images.
        done: those that earlier starts finished; known after :meth:`begin`.
        whole: whether the store is finished already; likewise.
        images: the :class:`~paddle_dit.data.images.ImageFolder`.
        encoder: see :class:`~paddle_dit.extraction.encoding.Encoder`.
        seconds: spent on shards so far, by this process.
        waited: those of them that the VAE waited for images, the first batch left out, for which the readers start.

    Args:
        options: see there.
        place: of this process among all.
        report: is told, in a line, what is unusual.

    Raises:
        ConfigError: an option that cannot be used, or another process writes into the folder.
        ConversionError: the VAE cannot be loaded.
        DataError: the images cannot be listed, or the disk is too full for the result. Nothing has been written.
    """

    def __init__(
        self, options: ExtractionOptions, place: Place | None = None, report: Callable[[str], None] = print
    ) -> None:
        options.check()
        self._options, self._report = options, report
        place = place or Place.from_environment()
        self.images = find_images(options.data_path, report if place.is_main else lambda line: None)
        vae = load_vae(options.vae, options.scaling_factor)
        self.encoder = Encoder(vae, options.image_size, options.store, options.seed, options.precision, report)
        self.seconds = self.waited = 0.0
        self._plan = self._make_plan(len(self.images))
        work = _StoreWork(options.folder, self._plan, self._is_whole)
        super().__init__(work, len(self.images), place, report)
        self._warn_of_odd_latents()
        if self.is_main and not self._is_whole():
            self._check_space()

    def run(self, advance: Advance = lambda amount: None, stop: Stop = lambda: False) -> Result | None:
        """Write what is left of this process's share; on rank 0 wait for the others, finish, and return the store.

        Args:
            advance: is told how many more images are done by all processes; on rank 0 ``total - done`` in all.
            stop: says whether to stop; asked between batches.

        Raises:
            DataError: an image cannot be read, the disk is full, or another rank failed; the same command continues.
            StoppedError: ``stop`` said so.
        """
        summary = None
        if not self.whole:
            self._write_share(advance, stop)
            if not self.is_main:
                return None
            self._meeting.wait_for_all(stop, lambda: self._tell(advance))
            summary = self._finish()
            self.whole = True
        if not self.is_main:
            return None
        store = PackedStore(self._options.folder)
        if not (store.folder / PREVIEW).exists():
            write_preview(store, self.images, self._options.image_size, self.encoder.vae)
        return Result(store, summary)

    def _warn_of_odd_latents(self) -> None:
        side, size = self.encoder.sample_shape[1], self._options.image_size
        if self.is_main and side % 2:
            step = size // side
            self._report(
                f"warning: latents will be {side} x {side}, which no preset can cut into its patches; images of"
                f" {size - step} or {size + step} pixels would do"
            )

    def _make_plan(self, total: int) -> StorePlan:
        options, encoder = self._options, self.encoder
        index = new_index(
            sample_shape=encoder.sample_shape,
            num_classes=self.images.num_classes,
            dtype=options.stored_dtype,
            kind=options.store,
            label_names={label: plain_name(name) for label, name in self.images.label_names.items()},
            vae=find_vae(options.vae, options.scaling_factor, fingerprint=False).record(options.image_size),
            source=f"images {plain_name(options.data_path.resolve().name)}",
            flip=options.flip,
        )
        index["extraction"] = {  # all else that decides the bytes
            "images": self.images.fingerprint,
            "vae": encoder.fingerprint(),
            "seed": options.seed,
            "batch_size": options.batch_size,
            "shard_size": options.shard_size,
            "precision": options.precision,
            "device": encoder.device,
            "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        }
        return StorePlan(index, total, options.shard_size, {})

    def _is_whole(self) -> bool:
        """Say whether the folder holds the very store that is asked for.

        Raises:
            DataError: it holds another one.
        """
        folder = self._options.folder
        if not (folder / INDEX).exists() or (folder / PLAN).exists():
            return False
        if different := differing(read_index(folder), self._plan.index):
            raise DataError(f"{folder} already holds a store, of another {', '.join(different)}; choose another folder")
        return True

    def _check_space(self) -> None:
        options = self._options
        values = math.prod(self.encoder.sample_shape)
        size = np.dtype(options.stored_dtype).itemsize
        needed = self.total * (values * size * (2 if options.flip else 1) + 32)  # labels stand in two files
        if options.format == "npy":
            needed += self.total * (-(-(values * size + 128) // _BLOCK) + 1) * _BLOCK
        present = next(path for path in (options.folder, *options.folder.absolute().parents) if path.is_dir())
        if present == options.folder:  # what is there already needs no more
            there = options.features_path.rglob("*") if options.format == "npy" else shards.own_files(options.folder)
            needed -= sum(path.stat().st_size for path in there if path.is_file())
        free = shutil.disk_usage(present).free
        if free < needed:
            raise DataError(
                f"{options.features_path} will take {needed / 2**20:,.0f} MiB more, and {free / 2**20:,.0f} MiB are "
                "free there; free some space or choose another folder"
            )

    def _write_share(self, advance: Advance, stop: Stop) -> None:
        numbers, options = self._meeting.share(), self._options
        paths = (self.images.file(image) for number in numbers for image in self._plan.span(number))
        ahead = max(_IMAGES_AHEAD * options.batch_size, 16 * options.workers)
        with ImageReader(paths, options.image_size, options.workers, ahead) as reader:
            for number in numbers:
                started = time.perf_counter()
                arrays, labels, skipped = self._encode_shard(number, reader, advance, stop)
                shards.write_shard(
                    options.folder, self._plan, number, arrays[0], labels, *arrays[1:2] or (None,), skipped
                )
                self._current = 0
                self.seconds += time.perf_counter() - started

    def _encode_shard(
        self, number: int, reader: ImageReader, advance: Advance, stop: Stop
    ) -> tuple[list[np.ndarray], np.ndarray, list[str]]:
        """Return a shard's samples, and the mirrored ones where they are asked for; labels; names of those skipped."""
        span, index = self._plan.span(number), self._plan.index
        shape = (len(span), *index["sample_shape"])
        arrays = [np.empty(shape, index["dtype"]) for _ in shard_files(index, number)]
        images: list[int] = []
        skipped: list[str] = []
        for start in range(span.start, span.stop, self._options.batch_size):
            self._meeting.check(stop)
            asked = range(start, min(start + self._options.batch_size, span.stop))
            good, pixels = self._read(asked, reader, skipped)
            rows = slice(len(images), len(images) + len(good))
            images += good
            if good:
                for mirrored, array in enumerate(arrays):
                    array[rows] = self._as_stored(self.encoder(np.stack(pixels), good, bool(mirrored)), good)
            self._current += len(asked)
            self._tell(advance)
        return [array[: len(images)] for array in arrays], self.images.labels[images], skipped

    def _read(self, asked: range, reader: ImageReader, skipped: list[str]) -> tuple[list[int], list[np.ndarray]]:
        """Return the numbers and pixels of the images that can be read; the names of others go to ``skipped``."""
        started = time.perf_counter()
        good, pixels = [], []
        for image in asked:
            found = next(reader)
            if not isinstance(found, DataError):
                good.append(image)
                pixels.append(found)
            elif self._options.on_error == "stop":
                raise DataError(f"{found}, or leave such images out with --on-error skip")
            else:
                self._report(f"skipped: {found}")
                skipped.append(plain_name(self.images.paths[image]))
        if self._current or self.seconds:
            self.waited += time.perf_counter() - started
        return good, pixels

    def _as_stored(self, samples: np.ndarray, images: list[int]) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = samples.astype(self._plan.index["dtype"])
        bad = non_finite_rows(stored)
        if len(bad):
            value = np.abs(samples[bad[0]]).max()
            mend = "use --dtype float32 in another folder" if np.isfinite(value) else "this VAE cannot encode it"
            raise DataError(
                f"the VAE makes {value:.6g} of {self.images.file(images[bad[0]])}, which {stored.dtype} cannot hold; "
                f"{mend}"
            )
        return stored

    def _finish(self) -> Summary:
        return shards.finish(self._options.folder, self._plan)
