"""Errors that a user can mend: one family, one line each, exit code 2.

Anything else that is raised is a bug and keeps its traceback.
"""

import atexit
import difflib
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable

_MENDS = {
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "choose a path whose links end somewhere",
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
}


class PaddleDiTError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and the mend."""


class ConfigError(PaddleDiTError):
    """A flag, recipe or model configuration that cannot be used."""


class DataError(PaddleDiTError):
    """Latents, labels or images that are missing, damaged or do not fit."""


class CheckpointError(PaddleDiTError):
    """A checkpoint that is missing, damaged or of another run or model."""


class NonFiniteLossError(PaddleDiTError):
    """A loss, or its gradient, that is NaN or infinite, found before it could reach the weights.

    Attributes:
        step: number of the update, from 0.
        positions: places of the samples in the global batch; empty for a gradient, which is of all of them.
    """

    def __init__(self, step: int, positions: list[int]):
        super().__init__(step, positions)  # so that it can be sent to other ranks
        self.step, self.positions = step, positions

    def __str__(self) -> str:
        return f"the {'loss' if self.positions else 'gradient'} is not finite at step {self.step}"


class GenerationError(PaddleDiTError):
    """What was drawn is no image."""


class ConversionError(PaddleDiTError):
    """Weights that cannot be converted exactly."""


class DeployError(PaddleDiTError):
    """An engine that cannot be built, opened or trusted."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate the ``main`` of a script: a :class:`PaddleDiTError` becomes one line on stderr and exit code 2.

    So does Ctrl-C, with code 130, where the script has no better answer.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            _in_one_line(main, *args, **kwargs)
        finally:
            distributed = sys.modules.get("paddle.distributed")
            if distributed and distributed.is_initialized():
                _leave_the_others(sys.exc_info()[1])

    return run


def _in_one_line(main: Callable[..., None], *args, **kwargs) -> None:
    try:
        main(*args, **kwargs)
    except PaddleDiTError as error:
        sys.stdout.flush()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "paddle_dit"):
            raise
        print(f"error: {package} is not installed here; pip install what requirements.txt has", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # of "| head": whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _MENDS:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}; {_MENDS[error.errno]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _leave_the_others(error: BaseException | None) -> None:
    """End this process as Python would, but leave out what C++ does at the end of a process.

    The thread in which Paddle's rank 0 serves the others outlives what it logs with: it aborts, with exit code -6,
    where another rank hangs up at that moment.
    """
    status = 0
    if isinstance(error, SystemExit):
        status = int(error.code or 0)
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
