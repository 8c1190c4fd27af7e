"""The files of a VAE: those of ppdiffusers, diffusers and CompVis alike, told apart by their content."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from paddle_dit.errors import ConversionError
from paddle_dit.files import read_json
from paddle_dit.models.vae_names import COMPVIS_MARK, infer_config, to_ppdiffusers
from paddle_dit.readers import STOCK_WEIGHTS, SafetensorsFile
from paddle_dit.weight_files import Shards, find_weights, read_table

LDM = "first_stage_model."  # what precedes a VAE's names in a checkpoint of latent diffusion
_TRAINING = ("loss.", "model_ema.")  # of the VAE, of no use here


def weights_file(place: Path) -> Path:
    """Return the file of weights, or the index of several, of a VAE's folder; a file is itself.

    Raises:
        ConversionError: there is none, or several and no rule to choose.
    """
    found = place if place.is_file() else find_weights(place)
    if found is None:
        raise ConversionError(f"{place} holds no weights; place {' or '.join(STOCK_WEIGHTS.values())} there")
    return found


def described(place: Path) -> dict:
    """Return the configuration of a VAE's folder or file, as its ``config.json`` or else its tensors say.

    Raises:
        ConversionError: it is another model's, or cannot be read.
    """
    path = place / "config.json" if place.is_dir() else place.with_name("config.json")
    config = read_json(path, ConversionError) if path.is_file() else {}
    if not path.is_file() or (place.is_file() and config.get("_class_name") != "AutoencoderKL"):
        config = infer_config(read_vae_weights(place))  # it may lie among files of other models
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ConversionError(f"{place} holds a {config['_class_name']}, not an AutoencoderKL; give a VAE's folder")
    return config


def read_vae_weights(place: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a VAE's folder or file under ppdiffusers' names, float32.

    Raises:
        ConversionError: they cannot be read, are not finite, or are no VAE's.
    """
    path = weights_file(place)
    table = read_table(path)
    turned = _is_pytorch(path, table)
    if isinstance(table, dict) and isinstance(table.get("state_dict"), dict):
        table = table["state_dict"]
    if not isinstance(table, Mapping):
        raise ConversionError(f"{path} holds a {type(table).__name__}, not a table of tensors")
    names = [name for name in table if isinstance(name, str) and not name.startswith(_TRAINING)]
    prefix = LDM if any(name.startswith(LDM) for name in names) else ""
    chosen = {name.removeprefix(prefix): table[name] for name in names if name.startswith(prefix)}
    chosen = {name: array for name, array in chosen.items() if isinstance(array, np.ndarray)}
    try:
        return to_ppdiffusers(chosen, turned or COMPVIS_MARK in chosen)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None


def _is_pytorch(path: Path, table: object) -> bool:
    """Return whether linear weights are PyTorch's; those of this model are square and do not show it."""
    if isinstance(table, Shards):
        return _is_pytorch(table.first, read_table(table.first))
    if isinstance(table, SafetensorsFile):  # ppdiffusers' rule: anything but "pd" or "np" is PyTorch's
        return table.metadata.get("format", "pt") not in ("pd", "np")
    with path.open("rb") as file:
        return file.read(2) == b"PK"
