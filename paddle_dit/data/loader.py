"""Batches in exact order, prefetched by threads.

Threads suffice: gathering a batch is mostly copying and file reading, and starting them costs nothing. They hide the
reading behind the training step and where a disk makes them wait; npy pairs in a warm cache gain nothing from a second.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from paddle_dit.data.moments import MomentSampler
from paddle_dit.data.order import SampleOrder
from paddle_dit.data.source import LatentSource
from paddle_dit.randomness import Stream, uniform


class Batch(NamedTuple):
    """One rank's part of a global batch of ``b`` samples."""

    step: int
    latents: np.ndarray  # float32 [b,C,h,w]; of an ImageSource uint8 [b,S,S,3], to be encoded
    labels: np.ndarray  # int64 [b]
    positions: np.ndarray  # int64 [b], in the global batch; independent of the number of ranks


class BatchLoader:
    """Endless iterator over the batches of one rank from ``start_step`` on; a context manager.

    Args:
        source: where the latents are.
        order: which samples each step takes.
        rank: this process.
        world_size: number of processes.
        start_step: the first step to yield; resuming needs nothing else.
        num_workers: threads that read ahead, two batches each; 0 reads in the caller's thread.
        seed: decides, with step and position, whether a sample is taken mirrored, where the source has that too, and
            which latent is drawn from its moments. None: samples come as they are stored.

    An error in a thread is raised by ``next`` at the step it belongs to.
    """

    def __init__(
        self,
        source: LatentSource,
        order: SampleOrder,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        self._source, self._order = source, order
        self._rank, self._world_size = rank, world_size
        self._next_step, self._seed = start_step, seed
        self._flips = seed is not None and source.has_flip
        self._draw = MomentSampler(source, seed) if seed is not None and source.kind == "moments" else None
        self._depth = 2 * num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="batch-loader") if num_workers else None
        self._pending: deque = deque()  # (step, positions, future), oldest first
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        """Return itself: a second loop goes on where the first stopped."""
        return self

    def __next__(self) -> Batch:
        """Return the next step's batch; raises DataError if it cannot be read, StopIteration once closed."""
        if self._closed:
            raise StopIteration
        if self._pool is None:
            step, indices, positions = self._take_step()
            return Batch(step, *self._read(step, indices, positions), positions)
        while len(self._pending) < self._depth:
            step, indices, positions = self._take_step()
            self._pending.append((step, positions, self._pool.submit(self._read, step, indices, positions)))
        step, positions, future = self._pending.popleft()
        return Batch(step, *future.result(), positions)

    def close(self) -> None:
        """Stop the threads and wait for the batch each is reading; may be called twice."""
        self._closed = True
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchLoader":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _read(self, step: int, indices: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flipped = uniform(self._seed, Stream.FLIPS, step, positions) < 0.5 if self._flips else None
        samples, labels = self._source.gather(indices, flipped)
        return samples if self._draw is None else self._draw(samples, indices, step, positions), labels

    def _take_step(self) -> tuple[int, np.ndarray, np.ndarray]:
        step = self._next_step
        indices, positions = self._order.local_batch(step, self._rank, self._world_size)
        self._next_step += 1
        return step, indices, positions
