"""Tens of thousands of images to evaluate a model by, drawn by any number of processes.

Every part is a batch, drawn whole by one process with one thread, since the last bits depend on both. Noise and class
of image i depend on the seed and i alone. So the finished folder has the same bytes whatever processes wrote it, and
however often they were killed.
"""

import time
from collections.abc import Callable

import numpy as np

from paddle_dit.config import DiTConfig
from paddle_dit.files import check_writable
from paddle_dit.generation import draw_batches
from paddle_dit.meeting import Place, SharedJob, Stop
from paddle_dit.randomness import Stream, generator
from paddle_dit.sampling.drawing import Drawing
from paddle_dit.sampling.folder import SampleFolder
from paddle_dit.sampling.options import ManyOptions

Advance = Callable[[float], object]


def labels_of(count: int, config: DiTConfig, kind: str, seed: int) -> np.ndarray:
    """Return the classes of images, int64 ``[count]``; that of image i does not depend on ``count``.

    Args:
        count: how many.
        config: of the model; an unconditional one has its null class alone.
        kind: "uniform" draws each at random, from (seed, i); "balanced" takes the classes in turn.
        seed: of the images.
    """
    classes = config.num_classes
    if classes == 0:
        return np.full(count, config.null_class, np.int64)
    if kind == "balanced":
        return np.arange(count, dtype=np.int64) % classes
    # Raw numbers, which NumPy promises to stay the same over versions.
    raw = (generator(seed, Stream.LABELS, 0, index).bit_generator.random_raw() for index in range(count))
    return np.fromiter((number * classes >> 64 for number in raw), np.int64, count)


class ManyImages(SharedJob):
    """A set of images in the making; a context manager. On rank 0 it holds the folder.

    Attributes:
        is_main: whether this process is rank 0.
        total: images.
        done: those that earlier starts finished; known after :meth:`begin`.
        seconds: since the present start began to draw.

    Args:
        options: see there.
        place: of this process among all.
        report: is told, in a line, what is unusual.

    Raises:
        ConfigError: an option that cannot be used, or that contradicts the weights.
        CheckpointError, ConversionError: weights or VAE that are missing, damaged or cannot be read.
    """

    def __init__(self, options: ManyOptions, place: Place | None = None, report: Callable[[str], None] = print) -> None:
        options.check()
        check_writable(options.sample_dir, "--sample-dir")
        self._drawing = Drawing.open(options, options.per_proc_batch_size)
        config = self._drawing.source.info.config
        self._labels = labels_of(options.num_fid_samples, config, options.labels, options.seed)
        settings = {
            **self._drawing.record,
            "labels": options.labels,
            "num_samples": options.num_fid_samples,
            "output_format": options.output_format,
        }
        self.work = SampleFolder(options.sample_dir, settings, self._labels)
        super().__init__(self.work, len(self._labels), place or Place.from_environment(), report)
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since this start began to draw."""
        return time.perf_counter() - self._started

    def run(self, advance: Advance = lambda amount: None, stop: Stop = lambda: False) -> None:
        """Draw what is left of this process's share; on rank 0 wait for the others, and finish.

        Args:
            advance: is told how many more images are done by all processes; on rank 0 ``total - done`` in all.
            stop: says whether to stop; asked after every step of the sampler.

        Raises:
            DataError: the disk is full, or another rank failed; the same command continues.
            StoppedError: ``stop`` said so.
        """
        self._started = time.perf_counter()
        if not self.whole:
            for number in self._meeting.share():
                self._meeting.check(stop)
                self._draw_part(number, advance, stop)
            if self.is_main:
                self._meeting.wait_for_all(stop, lambda: self._tell(advance))
                self.work.finish()
        if self.is_main:
            self.work.clean()

    def _draw_part(self, number: int, advance: Advance, stop: Stop) -> None:
        span, drawing = self.work.span(number), self._drawing
        labels = self._labels[span.start : span.stop]

        def report(amount: float) -> None:
            self._current += amount
            self._tell(advance)
            self._meeting.check(stop)

        (images,) = draw_batches(
            drawing.source, labels, drawing.sampling, first_index=span.start, batch_size=len(span), report=report
        )
        records = [drawing.record_of(position, labels, span.start) for position in range(len(span))]
        self.work.write_part(number, images, records)
        self._current = 0
