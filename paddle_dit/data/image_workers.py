"""Images decoded ahead of whoever takes them, by processes of their own.

Decoding holds Python's lock for part of the time, and it must not slow the process that feeds a GPU: hence processes.
Each is a fresh interpreter that imports NumPy and Pillow alone, at the other end of two pipes. One that is killed
closes its pipes, so that it is noticed wherever it was, in the middle of an answer too, where a ProcessPoolExecutor
hangs; and if the consumer is killed, its end is closed and the processes end themselves.
"""

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from paddle_dit.data.images import check_image_size, read_image
from paddle_dit.errors import DataError

_CHUNK = 8  # images to a message: many enough to make its cost small, few enough to share the work evenly
_START = "import sys; sys.path[:] = sys.argv[2:]; from paddle_dit.data.image_workers import serve; serve(sys.argv[1])"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ImageReader:
    """Iterator over the images in ``paths``, in their order; a context manager.

    It yields uint8 ``[S, S, 3]``, as :func:`~paddle_dit.data.images.read_image` returns them, or the DataError of an
    image that cannot be read: whether that is the end is for the consumer to decide.

    Args:
        paths: files; taken from as reading goes on.
        image_size: side of the images in pixels, a multiple of 8.
        num_workers: processes that decode; 0 decodes in the caller.
        ahead: images that may lie decoded, or be under way, beyond the chunk that is being yielded; at least eight to a
            worker. By default twice that.

    Signals that ask to stop are left to the consumer: the processes end when it closes the reader, or dies.

    Raises:
        DataError: from the start, an image size that no VAE takes; from ``next``, a process died.
    """

    def __init__(
        self, paths: Iterable[str | Path], image_size: int, num_workers: int = 0, ahead: int | None = None
    ) -> None:
        check_image_size(image_size)
        self._paths, self._image_size = iter(paths), image_size
        self._depth = max(num_workers, -(-ahead // _CHUNK)) if ahead else 2 * num_workers
        self._ready: Iterator[np.ndarray | DataError] = iter(())
        self._pending: deque[Future] = deque()  # chunks, oldest first
        self._closed = False
        self._workers = [_start_worker(image_size) for _ in range(num_workers)]
        self._idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="image-reader") if num_workers else None

    def __iter__(self) -> Iterator[np.ndarray | DataError]:
        """Return itself: a second loop goes on where the first stopped."""
        return self

    def __next__(self) -> np.ndarray | DataError:
        """Return the next image or its error; raises DataError if a process died, StopIteration at the end."""
        if self._closed:
            raise StopIteration
        if self._threads is None:
            return _read(next(self._paths), self._image_size)
        image = next(self._ready, None)
        while image is None:
            self._read_ahead()
            if not self._pending:
                raise StopIteration
            self._ready = iter(self._pending[0].result())  # stays there if it raises: so will the next call
            self._pending.popleft()
            self._read_ahead()
            image = next(self._ready, None)
        return image

    def close(self) -> None:
        """End the processes at once; may be called twice."""
        self._closed = True
        self._pending.clear()
        for worker in self._workers:
            worker.kill()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.wait()
            worker.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()

    def __enter__(self) -> "ImageReader":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _read_ahead(self) -> None:
        while len(self._pending) < self._depth and (chunk := list(itertools.islice(self._paths, _CHUNK))):
            self._pending.append(self._threads.submit(self._ask, chunk))

    def _ask(self, chunk: list[str | Path]) -> list[np.ndarray | DataError]:
        """Let a process that is idle read the images; as many threads as processes wait here."""
        worker = self._idle.get()
        try:
            pickle.dump(chunk, worker.stdin)
            worker.stdin.flush()
            return pickle.load(worker.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = _exit_code(worker)
            end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise DataError(
                f"a process that decodes images {end} within {chunk[0]} to {chunk[-1]}; if memory ran out, use fewer "
                "workers; then run the same command again"
            ) from None
        finally:
            self._idle.put(worker)


def _read(path: str | Path, image_size: int) -> np.ndarray | DataError:
    try:
        return read_image(path, image_size)
    except DataError as error:
        return error


def _exit_code(worker: subprocess.Popen) -> int:
    try:
        return worker.wait(timeout=5)
    except subprocess.TimeoutExpired:  # it lives, but something else has got among its answers
        worker.kill()
        return worker.wait()


def _start_worker(image_size: int) -> subprocess.Popen:
    # Blocked signals stay blocked in a new process: a stop that reaches the whole process group, as Ctrl-C and Paddle's
    # launcher send it, must leave the images to the consumer, who may have a step to finish.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        command = [sys.executable, "-c", _START, str(image_size), *sys.path]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def serve(image_size: str) -> None:
    """Be a process that decodes: read chunks of paths from standard input, write their images to standard output."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not get among the answers
    warnings.simplefilter("ignore")  # Pillow's, about notes in files that do not matter here
    try:
        while True:
            images = [_read(path, int(image_size)) for path in pickle.load(requests)]
            pickle.dump(images, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the consumer is gone; a usual exit would try to write once more
