"""Models on the Hugging Face hub: downloaded once, continued where a download broke off, found again without network.

``huggingface_hub`` does the work: its cache, its ``HF_ENDPOINT`` for mirrors, its ``HF_HUB_OFFLINE`` and its token for
models that are not public. Several processes may ask for the same model.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from paddle_dit.errors import ConversionError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SECONDS = 10  # for the hub's first answer


def is_hub_name(name: str) -> bool:
    """Whether a text can be the name of a model on the hub, ``owner/name``; a path of two parts can be too."""
    return _NAME.fullmatch(name) is not None


def fetch(name: str, choose: Callable[[Sequence[str]], Sequence[str]], needed: str) -> Path:
    """Return a folder that holds files of a hub model, downloading those that are not in the cache yet.

    Args:
        name: ``owner/name``.
        choose: takes the names of all files of the model and returns those that are wanted, or raises ConversionError.
        needed: the files that a user without network is to place by hand, for the message.

    Raises:
        ConversionError: the hub cannot be reached and the cache has nothing, or there is no such model there; the
            message says which files to place where.
    """
    from huggingface_hub import HfApi, snapshot_download

    wanted = None
    try:
        wanted = choose([file.rfilename for file in HfApi().model_info(name, timeout=_SECONDS).siblings or ()])
        return Path(snapshot_download(name, allow_patterns=[_literally(file) for file in wanted]))
    except (OSError, ValueError) as error:  # of requests, of the hub, of the disk
        reason = _in_words(error)
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        if present.issuperset(choose(sorted(present)) if wanted is None else wanted):
            return folder
    except (OSError, ValueError, ConversionError):  # it has none of the model, or only what came before a break
        pass
    raise ConversionError(
        f"there is no file or folder {name} here, and {reason}; place {needed} into a folder {name}, or into any other"
        " and name that"
    )


def _literally(file: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", file)


def _in_words(error: Exception) -> str:
    import requests
    from huggingface_hub.utils import RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return "the hub knows no such model, or does not show it without a token"
    if isinstance(error, ConnectionError | requests.ConnectionError | requests.Timeout):
        return "the hub cannot be reached"
    line = (str(error).splitlines() or [""])[0][:120]
    return f"the hub's files could not be fetched, which the same command continues ({type(error).__name__}: {line})"
