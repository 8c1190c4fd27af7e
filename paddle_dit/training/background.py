"""Work in a thread: one piece at a time, and its failure is never overlooked."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_one

from tqdm import tqdm


class Background:
    """Does pieces of work in a thread, one after the other. A context manager."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._pending: Future | None = None

    def do(self, work: Callable[[], object]) -> None:
        """Wait for the piece before, then start this one; raises what the one before raised."""
        self.wait()
        self._pending = self._pool.submit(work)

    @property
    def busy(self) -> bool:
        """Whether a piece is being done."""
        return self._pending is not None and not self._pending.done()

    @property
    def has_failed(self) -> bool:
        """Whether the piece has ended by an exception, which :meth:`wait` will raise."""
        return self._pending is not None and not self.busy and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait for the piece that is being done, and raise what it raised."""
        for _ in self.waiting():
            pass

    def waiting(self) -> Iterator[None]:
        """Wait likewise, and yield every second: for what must be done meanwhile."""
        while self.busy:
            wait_for_one([self._pending], timeout=1.0)
            yield
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Background":
        """Return itself."""
        return self

    def __exit__(self, exception_type: type | None, *_: object) -> None:
        """Wait; where another exception is on its way, what this raises is printed instead."""
        try:
            self.wait()
        except Exception as error:
            if exception_type is None:
                raise
            tqdm.write(f"and in the background: {error}", file=sys.stderr)
        finally:
            self._pool.shutdown()
