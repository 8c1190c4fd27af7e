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
        self._file = (folder / LOCK).open("a+", encoding="utf-8")
        self._file.seek(0)
        holder = _holder(self._file.read())
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{flag} {folder} is in use by {holder or 'another process'}; wait for it, stop it, or choose another "
                "folder"
            ) from None
        except OSError as error:
            report(f"warning: {folder} cannot be locked ({error.strerror}): see that no other run writes there")
        else:
            if holder:
                report(f"{folder} was in use by {holder}, which ended without a word: taking over")
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")

    def release(self) -> None:
        """Let others have the folder; may be called twice."""
        if not self._file.closed:
            with contextlib.suppress(OSError):  # the folder may be gone, or its disk full
                self._write("")
            self._file.close()

    def _write(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()


def _holder(text: str) -> str | None:
    """Return who wrote a lock's text, or None where it was released."""
    try:
        values = json.loads(text)
        return f"process {int(values['pid'])} on {values['host']}"
    except (ValueError, KeyError, TypeError):
        return None
