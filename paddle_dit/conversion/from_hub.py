"""Which files of a hub model hold a DiT: of all the forms that it may be stored in, the one that is read best."""

import re
from collections.abc import Sequence
from pathlib import Path

from paddle_dit.checkpoint import MANIFEST
from paddle_dit.errors import CheckpointError, ConversionError
from paddle_dit.hub import fetch, is_hub_name

_WEIGHTS = (  # names in a folder of ppdiffusers or diffusers, the best first
    "diffusion_paddle_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model_state.pdparams",
    "diffusion_pytorch_model.bin",
)
_NEEDED = "config.json and the weights (diffusion_pytorch_model.safetensors, say), or one .pt file,"


def find_model(path_or_name: str | Path) -> Path:
    """Return the file or folder that a user means: one that is there, else a hub model's, downloaded once.

    Raises:
        CheckpointError: there is nothing of that name, and it cannot be a hub model's either.
        ConversionError: the hub has no such model, or none that is a DiT, or cannot be reached.
    """
    path = Path(path_or_name)
    if path.exists():
        return path
    if not is_hub_name(str(path_or_name)):
        raise CheckpointError(f"there is no file or folder {path_or_name}; give one that is there, or a hub name")
    return fetch(str(path_or_name), dit_files, _NEEDED)


def dit_files(files: Sequence[str]) -> list[str]:
    """Return which of a hub model's files to fetch: a DiT's weights in one form, and what describes them.

    Raises:
        ConversionError: none is a form that is known, or several single files could be meant.
    """
    if MANIFEST in files:  # a checkpoint of ours is verified whole
        return [file for file in files if "/" not in file]
    about = [file for file in ("model_index.json", "config.json", "transformer/config.json") if file in files]
    for folder in ("transformer/", ""):
        for name in _WEIGHTS:
            stem, _, ending = name.rpartition(".")
            if folder + name in files:
                return [*about, folder + name]
            if f"{folder}{name}.index.json" in files:
                piece = re.compile(rf"{folder}{stem}-\d+-of-\d+\.{ending}")
                return [*about, f"{folder}{name}.index.json", *filter(piece.fullmatch, files)]
    single = [file for file in files if file.endswith((".pt", ".safetensors", ".pdparams")) and "/" not in file]
    if len(single) != 1:
        found = f"{len(single)} single files ({', '.join(single[:3])})" if single else "no weights"
        raise ConversionError(f"the hub's model holds {found}; download the one that is meant and name it")
    return [*about, *single]
