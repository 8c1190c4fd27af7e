"""Processes that write parts of one result and meet in its folder alone, by files.

Rank 0 holds the folder's lock. Once it has begun, it says so in ``.meeting.json``, which names the work, this start and
the parts that are finished already; the others wait for that, since until then rank 0 clears away what an earlier start
left half written. A rank that fails leaves its message for rank 0, whose output is the one that people read.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from paddle_dit.errors import DataError, PaddleDiTError
from paddle_dit.files import read_json, write_json
from paddle_dit.folder_lock import LOCK, FolderLock

NOTICE, FAILURE = ".meeting.json", ".meeting-failure.json"
_START = 1800.0  # seconds: reading terabytes to see what an earlier start finished takes rank 0 a while
_QUIET = 60.0  # seconds without a new part after which rank 0 says for whom it waits, if parts usually take less
_INTERVAL = 0.2

Stop = Callable[[], object]


class StoppedError(Exception):
    """The work was asked to stop, and has: what is finished stays, and the same command continues."""


@dataclass(frozen=True)
class Place:
    """Which of several processes this is.

    Attributes:
        rank: from 0.
        world_size: how many there are.
        launch: what all processes of one start have in common.
    """

    rank: int = 0
    world_size: int = 1
    launch: str = ""

    @classmethod
    def from_environment(cls) -> "Place":
        """Return what ``paddle.distributed.launch`` says."""
        values = os.environ
        rank, world_size = int(values.get("PADDLE_TRAINER_ID", "0")), int(values.get("PADDLE_TRAINERS_NUM", "1"))
        return cls(rank, world_size, values.get("PADDLE_TRAINER_ENDPOINTS", ""))

    @property
    def is_main(self) -> bool:
        """Whether this rank begins and finishes the work."""
        return self.rank == 0


class Work(Protocol):
    """What is written, part by part.

    Attributes:
        folder: of the result.
        flag: the option that named it, for messages.
    """

    folder: Path
    flag: str

    @property
    def name(self) -> str:
        """What tells this work from any other: two of the same settings have the same."""

    @property
    def num_parts(self) -> int:
        """How many parts there are, numbered from 0."""

    def span(self, number: int) -> range:
        """Return the items of a part."""

    def is_whole(self) -> bool:
        """Say whether the finished result is there already; DataError where the folder holds another."""

    def begin(self) -> bool:
        """Claim the folder; say whether only the last cleaning up was left to do. DataError if it is another's."""

    def finished(self) -> set[int]:
        """Return the numbers of the parts that are there and, by their hashes, as they were written."""

    def sidecars(self) -> Iterator[tuple[int, Path]]:
        """Yield number and path of the file that is there once a part is finished."""


class Meeting:
    """The processes of one start, seen from one of them.

    Attributes:
        place: of this process.
        finished: numbers of the parts that earlier starts finished; known after :meth:`begin`.

    Args:
        work: what is written.
        place: of this process.
        report: is told, in a line, what is unusual.
    """

    def __init__(self, work: Work, place: Place, report: Callable[[str], None] = print) -> None:
        self.place, self.finished = place, frozenset()
        self._folder, self._work, self._report = work.folder, work, report
        self._lock: FolderLock | None = None
        self._notice: dict = {}
        self._looked, self._present = 0.0, frozenset()

    def hold(self) -> None:
        """On rank 0, lock the folder, making it if need be.

        Raises:
            ConfigError: another process holds it.
            DataError: it cannot be written.
        """
        if self.place.is_main:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock = FolderLock(self._folder, self._work.flag, self._report)
                self._clear()
            except OSError as error:
                raise DataError(f"cannot write {self._folder}: {error.strerror}; choose another folder") from None

    def begin(self, stop: Stop) -> bool:
        """Claim the folder, or, on other ranks, wait until rank 0 has; say whether the result is whole.

        Args:
            stop: says whether to stop.

        Raises:
            DataError: the folder holds something else, or rank 0 does not begin.
            StoppedError: ``stop`` said so.
        """
        if not self.place.is_main:
            return self._wait_for_start(stop)
        if self._work.is_whole() or self._work.begin():
            return True
        self.finished = frozenset(self._work.finished())
        for number, path in self._work.sidecars():  # from now on, a sidecar that is there is of a finished part
            if number not in self.finished:
                path.unlink()
        self._notice = {
            "work": self._work.name,
            "launch": self.place.launch,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "finished": sorted(self.finished),
        }
        write_json(self._folder / NOTICE, self._notice)
        return False

    def share(self) -> list[int]:
        """Return the numbers of the parts that this process is to write."""
        own = range(self.place.rank, self._work.num_parts, self.place.world_size)
        return [number for number in own if number not in self.finished]

    def check(self, stop: Stop) -> None:
        """Notice that another rank, or whoever sent a signal, wants an end.

        Raises:
            DataError: on rank 0, another rank failed.
            StoppedError: ``stop`` said so, or rank 0 has ended, whose output says why.
        """
        if self.place.is_main:
            if failure := self._read(FAILURE):
                raise DataError(f"rank {failure.get('rank')}: {failure.get('error')}")
        elif self._read(NOTICE) != self._notice:
            self._report("rank 0 has ended, its output says why")
            raise StoppedError
        if stop():
            raise StoppedError

    def done(self, age: float = 1.0) -> frozenset[int]:
        """Return the numbers of the parts that are finished, as seen at most ``age`` seconds ago."""
        if time.monotonic() - self._looked >= age:
            self._present = frozenset(number for number, _ in self._work.sidecars())
            self._looked = time.monotonic()
        return self._present

    def wait_for_all(self, stop: Stop, look: Callable[[], object]) -> None:
        """On rank 0, return when every part is finished.

        Args:
            stop: says whether to stop.
            look: is called again and again.

        Raises:
            DataError: another rank failed.
            StoppedError: ``stop`` said so.
        """
        seen, since, quiet = frozenset(), time.monotonic(), _QUIET
        while len(present := self.done(age=0)) < self._work.num_parts:
            self.check(stop)
            look()
            silent = time.monotonic() - since
            if present != seen:
                seen, since, quiet = present, time.monotonic(), max(_QUIET, 2 * silent)
            elif silent > quiet:
                self._tell_missing(seen, silent)
                quiet *= 2
            time.sleep(_INTERVAL)
        look()

    def fail(self, error: Exception) -> None:
        """Leave the message of what ended this rank to rank 0, if that still is there."""
        if self._notice and not self.place.is_main and self._read(NOTICE) == self._notice:
            with contextlib.suppress(OSError):
                write_json(self._folder / FAILURE, {"rank": self.place.rank, "error": str(error)})

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._clear()
                (self._folder / LOCK).unlink(missing_ok=True)
            self._lock.release()

    def _clear(self) -> None:
        for path in self._folder.glob(".meeting*"):
            path.unlink()

    def _read(self, name: str) -> dict:
        try:
            return read_json(self._folder / name, DataError)
        except DataError:
            return {}

    def _wait_for_start(self, stop: Stop) -> bool:
        end, told = time.monotonic() + _START, time.monotonic() + _QUIET
        while time.monotonic() < end:
            if stop():
                raise StoppedError
            notice = self._read(NOTICE)
            if notice.get("launch") == self.place.launch and _may_live(notice):
                if notice.get("work") != self._work.name:
                    raise DataError(
                        f"rank 0 and rank {self.place.rank} were started with different options, weights or images"
                    )
                self._notice, self.finished = notice, frozenset(notice["finished"])
                return False
            if self._work.is_whole():
                return True
            if time.monotonic() > told:
                self._report("waiting for rank 0, which may be reading what an earlier start finished")
                told = end
            time.sleep(_INTERVAL)
        raise DataError(f"rank 0 has not begun within {_START / 60:.0f} minutes; its output says why, start all anew")

    def _tell_missing(self, seen: frozenset[int], seconds: float) -> None:
        missing = sorted(set(range(self._work.num_parts)) - seen)
        ranks = sorted({number % self.place.world_size for number in missing})
        self._report(
            f"waiting for {len(missing)} parts of rank {', '.join(map(str, ranks))}: none was finished for "
            f"{seconds:.0f} s; if such a rank has died, stop this one and run the same command again"
        )


class SharedJob:
    """Work in the making, seen from one of the processes that share it; a context manager. Rank 0 holds the folder.

    Attributes:
        is_main: whether this process begins and finishes the work.
        total: items in all.
        done: items that earlier starts finished; known after :meth:`begin`.
        whole: whether the finished result is there; likewise.

    Args:
        work: what is written.
        total: items in all.
        place: of this process.
        report: is told, in a line, what is unusual.
    """

    def __init__(self, work: Work, total: int, place: Place, report: Callable[[str], None]) -> None:
        self.is_main, self.total, self.done, self.whole = place.is_main, total, 0, False
        self._spans, self._meeting = work.span, Meeting(work, place, report)
        self._told = self._current = 0  # items: all that were told of, and those of the present part

    def begin(self, stop: Stop = lambda: False) -> None:
        """Claim the folder; on other ranks, wait until rank 0 has.

        Args:
            stop: says whether to stop.

        Raises:
            ConfigError: another process writes into the folder.
            DataError: the folder holds something else or cannot be written, or rank 0 does not begin.
            StoppedError: ``stop`` said so.
        """
        self._meeting.hold()
        self.whole = self._meeting.begin(stop)
        self._told = self.done = self.total if self.whole else self._count(self._meeting.finished)

    def __enter__(self) -> "SharedJob":
        """Return itself."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        """Let others have the folder; tell rank 0 what went wrong."""
        if isinstance(error, PaddleDiTError):
            self._meeting.fail(error)
        self._meeting.close()

    def _tell(self, advance: Callable[[float], object]) -> None:
        """Tell how many more items are done: of finished parts, whoever wrote them, and of the present one."""
        now = max(self._told, self._count(self._meeting.done()) + self._current)
        advance(now - self._told)
        self._told = now

    def _count(self, numbers: frozenset[int]) -> int:
        return sum(len(self._spans(number)) for number in numbers)


def _may_live(notice: dict) -> bool:
    """Whether who wrote a notice may still be there: it may be of a start that was killed."""
    return notice["host"] != socket.gethostname() or Path(f"/proc/{notice['pid']}").exists()
