"""Finding Inception's weights: a file that the user names, the cache, or the public address."""

import contextlib
import hashlib
import os
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from paddle_dit.errors import ConfigError
from paddle_dit.files import PARTIAL, replace_file, sha256

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
_SECONDS = 30  # without an answer
_BLOCK = 1 << 20


def cached_weights() -> Path:
    """Return where the downloaded file lies, or will: in ``$PADDLE_DIT_CACHE``, by default ``~/.cache/paddle_dit``."""
    folder = os.environ.get("PADDLE_DIT_CACHE") or Path.home() / ".cache" / "paddle_dit"
    return Path(folder) / FILE


def find_weights(path: Path | None = None, report: Callable[[str], None] = print) -> tuple[Path, str]:
    """Return the weights' file and its SHA-256, downloading it once if no path is given.

    Args:
        path: a file of one's own, of the same tensors; any weights are taken, and named by their hash.
        report: is told what is downloaded.

    Raises:
        ConfigError: there is no such file, or it is not in the cache and cannot be downloaded whole.
    """
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"no Inception weights at {path}; get {URL}, or leave --inception out to download it")
        return path, sha256(path)
    path = cached_weights()
    if not path.is_file():
        report(f"downloading {URL} to {path}")
        _download(path)
    found = sha256(path)
    if found != SHA256:
        raise ConfigError(
            f"{path} is not the public Inception (its SHA-256 is {found}); remove it, to download it again"
        )
    return path, found


def _download(path: Path) -> None:
    def copy(file) -> None:
        digest = hashlib.sha256()
        with urllib.request.urlopen(URL, timeout=_SECONDS) as answer:
            while block := answer.read(_BLOCK):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != SHA256:
            raise OSError(f"what came has the SHA-256 {digest.hexdigest()}, not {SHA256}")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, copy)
    except (OSError, HTTPException) as error:  # urllib's own errors are of the first kind
        with contextlib.suppress(OSError):
            path.with_name(f"{path.name}{PARTIAL}").unlink(missing_ok=True)
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the Inception weights cannot be downloaded ({reason}): place {URL} at {path}, or name it with --inception"
        ) from None
