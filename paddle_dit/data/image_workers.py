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
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from paddle_dit.data.images import check_image_size, read_image
from paddle_dit.errors import DataError

_CHUNK = 8  # images to a message: many enough to make its cost small, few enough to share the work evenly
_START = "import sys; sys.path[:] = sys.argv[2:]; from paddle_dit.data.image_workers import serve; serve(sys.argv[1])"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Decoders:
    """Processes that decode images, for as many threads as want some; a context manager.

    A process is started when it is first needed. Signals that ask to stop are left to the consumer: the processes end
    when it closes this, or dies.

    Args:
        image_size: side of the images in pixels.
        num_workers: processes; 0 decodes in the caller.
    """

    def __init__(self, image_size: int, num_workers: int = 0) -> None:
        self._image_size, self._num_workers = image_size, num_workers
        self._workers: list[subprocess.Popen] = []
        self._idle: SimpleQueue[subprocess.Popen | None] = SimpleQueue()  # None: there will be no more
        self._lock, self._closed = threading.Lock(), False

    def read(self, paths: Sequence[str | Path]) -> list[np.ndarray | DataError]:
        """Let a process that is idle read some images; waits for one.

        Returns:
            of each its pixels, uint8 ``[S, S, 3]``, or the DataError that says why it cannot be read.

        Raises:
            DataError: the process died.
        """
        if not self._num_workers:
            return [_read(path, self._image_size) for path in paths]
        worker = self._take()
        try:
            pickle.dump(paths, worker.stdin)
            worker.stdin.flush()
            return pickle.load(worker.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = _exit_code(worker)
            end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise DataError(
                f"a process that decodes images {end} within {paths[0]} to {paths[-1]}; if memory ran out, use fewer "
                "workers; then run the same command again"
            ) from None
        except BaseException:  # its answer, or the rest of it, must not be taken for that to another question
            worker.kill()
            worker.wait()  # until then it could take another question, and its old answer be read
            raise
        finally:
            self._idle.put(worker)

    def _take(self) -> subprocess.Popen:
        with self._lock:
            if not self._closed and self._idle.empty() and len(self._workers) < self._num_workers:
                self._workers.append(_start_worker(self._image_size))
                return self._workers[-1]
        worker = self._idle.get()
        if worker is None:
            self._idle.put(None)
            raise DataError("the processes that decode images have been ended")
        return worker

    def close(self) -> None:
        """End the processes at once, and whatever waits for them by a DataError; may be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for worker in self._workers:
            worker.kill()
        for _ in self._workers:
            worker = self._idle.get()  # nobody reads from its pipes any more
            worker.wait()
            worker.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
        self._idle.put(None)

    def __enter__(self) -> "Decoders":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


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

    Raises:
        DataError: from the start, an image size that no VAE takes; from ``next``, a process died.
    """

    def __init__(
        self, paths: Iterable[str | Path], image_size: int, num_workers: int = 0, ahead: int | None = None
    ) -> None:
        check_image_size(image_size)
        self._paths, self._decoders = iter(paths), Decoders(image_size, num_workers)
        self._depth = max(num_workers, -(-ahead // _CHUNK)) if ahead else 2 * num_workers
        self._ready: Iterator[np.ndarray | DataError] = iter(())
        self._pending: deque[Future] = deque()  # chunks, oldest first
        self._closed = False
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="image-reader") if num_workers else None

    def __iter__(self) -> Iterator[np.ndarray | DataError]:
        """Return itself: a second loop goes on where the first stopped."""
        return self

    def __next__(self) -> np.ndarray | DataError:
        """Return the next image or its error; raises DataError if a process died, StopIteration at the end."""
        if self._closed:
            raise StopIteration
        if self._threads is None:
            return self._decoders.read([next(self._paths)])[0]
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
        self._decoders.close()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "ImageReader":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _read_ahead(self) -> None:
        while len(self._pending) < self._depth and (chunk := list(itertools.islice(self._paths, _CHUNK))):
            self._pending.append(self._threads.submit(self._decoders.read, chunk))


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
