"""One process at a time writes into a folder."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from paddle_dit.errors import ConfigError

LOCK = ".lock"


class FolderLock:
    """Held from its making to :meth:`release`, or to the end of the process, however it ends.

    The kernel's lock on ``<folder>/.lock`` is what holds; the file's text only says who has it. The file stays.

    Args:
        folder: must exist.
        flag: the option that named it, for the message.
        report: is told, in one line, of a holder that ended without releasing it, and of a file system without locks.

    Raises:
        ConfigError: a living process holds it, here or, where the file system tells, on another machine.
    """

    def __init__(self, folder: Path, flag: str, report: Callable[[str], None] = print):
        self._folder, self._flag, self._report = folder, flag, report
        self._take()

    def _take(self) -> None:
        folder, flag, report = self._folder, self._flag, self._report
        self._file = (folder / LOCK).open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            self._file.close()
            raise ConfigError(
                f"{flag} {folder} is in use by {holder or 'another process'}; wait for it, stop it, or choose another "
                "folder"
            ) from None
        except OSError as error:
            report(f"warning: {folder} cannot be locked ({error.strerror}): see that no other run writes there")
        else:
            if holder := self._holder():
                report(f"{folder} was in use by {holder}, which ended without a word: taking over")
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")

    def keep(self) -> None:
        """Lock anew where the folder has been moved away, making it again; raises ConfigError as at first."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), (self._folder / LOCK).stat()):
                return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file.close()
        self._take()

    def release(self) -> None:
        """Let others have the folder; may be called twice."""
        if not self._file.closed:
            with contextlib.suppress(OSError):  # the folder may be gone, or its disk full
                self._write("")
            self._file.close()

    def _holder(self) -> str | None:
        """Return who wrote the lock's text, or None where it was released or says nothing of the kind."""
        self._file.seek(0)
        try:
            values = json.loads(self._file.read())
            return f"process {int(values['pid'])} on {' '.join(str(values['host']).split())}"
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def _write(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()
