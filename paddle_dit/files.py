"""Writing files so that a crash leaves the old one or the new one, and naming their content by a hash."""

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from paddle_dit.errors import ConfigError, PaddleDiTError

PARTIAL = ".partial"  # ends the names of files that are being written


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe(path: Path) -> dict:
    """Return a file's size and hash, as indexes and manifests keep them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def digest_of(values: object) -> str:
    """Return the SHA-256 of plain values, whatever their order and spaces in a JSON file."""
    as_read = json.loads(json.dumps(values))  # where every key is text, by which it is sorted
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside ``path``, flush, rename: the new file is there whole, or the old one still is."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    with partial.open("wb") as file:
        write(file)
    flush_to_disk(partial)
    partial.replace(path)


@contextmanager
def appears_whole(final: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a path beside ``final`` at which a file or folder may be made: it gets its name at the end, or is deleted.

    What a process that was killed left of the same name is removed first, if it was one of this machine.

    Args:
        final: a folder that is there is replaced, and deleted only once the new one has its name. Parents are made.
        replace: False, for folders alone: whatever has come there meanwhile stays, unless it is an empty folder.

    Raises:
        ConfigError: something is there that may not be replaced; what was made is deleted.
    """
    final = final.resolve()
    beginning = f".{final.name}.tmp-{_machine()}-"
    partial = final.with_name(f"{beginning}{os.getpid()}")
    new_parents = [parent for parent in final.parents if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in list(final.parent.iterdir()):
        if path.name.startswith(beginning) and not _works(path.name.removeprefix(beginning)):
            _remove(path)
    try:
        yield partial
        if replace:
            old = final.with_name(f".{final.name}.old-{os.getpid()}")
            if final.exists():
                final.rename(old)
            partial.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            _rename_to_nothing(partial, final)
    except BaseException:
        _remove(partial)
        with suppress(OSError):  # of a folder that somebody else has put something into
            for parent in new_parents:
                parent.rmdir()
        raise


def _machine() -> str:
    """Return a mark of the place in which the numbers of processes count: the machine, or a container on it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _works(number: str) -> bool:
    """Whether the process of this number may be at work; this one has just begun, so what has its number is older."""
    if not number.isdecimal():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return int(number) != os.getpid()


def _rename_to_nothing(folder: Path, final: Path) -> None:
    """Rename a folder; the system refuses where a file or a folder with something in it is."""
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ConfigError(f"{final} was made by another program meanwhile; choose another folder") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, values: object) -> None:
    """Replace ``path`` by ``values`` as JSON."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def check_writable(folder: Path, flag: str) -> None:
    """Refuse an output folder that cannot be made or written, before anything heavy starts.

    Args:
        folder: need not exist yet.
        flag: the option that named it, for the message.

    Raises:
        ConfigError: a parent is a file, or there is no permission.
    """
    present = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not present.is_dir():
        raise ConfigError(f"{flag} {folder}: {present} is a file; choose another folder")
    if not os.access(present, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {folder}: no permission to write in {present}; choose another folder")


def read_json(path: Path, error_type: type[PaddleDiTError]) -> dict:
    """Read a JSON object; a file that is missing, not JSON, or no object is an ``error_type``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_type(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise error_type(f"{path} is not valid JSON") from None
    if not isinstance(values, dict):
        raise error_type(f"{path} must hold a JSON object")
    return values
