"""The VAE between images and latents: ppdiffusers' AutoencoderKL, loaded without trusting its files."""

import re
from pathlib import Path

import numpy as np

from paddle_dit.checkpoint import load_weights
from paddle_dit.errors import ConfigError, ConversionError
from paddle_dit.files import read_json
from paddle_dit.readers import STOCK_WEIGHTS, read_stock_weights

_ROOT = Path(__file__).resolve().parents[2]
_HUB_NAME = re.compile(r"(?!data/)\w[\w.-]*/\w[\w.-]*")  # data/ is this project's own folder
_FILES = f"config.json and {' or '.join(STOCK_WEIGHTS.values())}"


def load_vae(name_or_path: str | Path):
    """Return a ppdiffusers ``AutoencoderKL`` in evaluation mode.

    Args:
        name_or_path: a folder of ``save_pretrained``, a folder with such a ``vae/`` in it (a DiTPipeline's), or the
            hub name of a model, which is downloaded once. ``data/...`` is also looked for at this project's root, so
            that a run that names its VAE so can be used from anywhere.

    Raises:
        ConversionError: no such folder or model, or files that are missing, damaged or of another class.
    """
    folder = _find_folder(str(name_or_path))
    config = read_json(folder / "config.json", ConversionError)
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ConversionError(f"{folder} holds a {config['_class_name']}, not an AutoencoderKL; give a VAE's folder")
    tensors = read_stock_weights(folder)
    from ppdiffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_config(config)
    except Exception as error:  # the class checks nothing, so wrong values fail anywhere in it
        raise ConversionError(f"{folder / 'config.json'} does not describe an AutoencoderKL ({error})") from None
    vae._convert_deprecated_attention_blocks(tensors)  # files from before ppdiffusers 0.24 name attention otherwise
    load_weights(vae, tensors, folder)
    vae.eval()
    return vae


def check_fits(vae, in_channels: int, trained: dict | None = None) -> None:
    """Raise ConfigError unless the VAE decodes the latents of a model.

    Args:
        vae: see :func:`load_vae`.
        in_channels: channels of the model's latents.
        trained: what is known of the VAE that made the training latents; its "scaling_factor" must be this VAE's.
    """
    if vae.config.latent_channels != in_channels:
        raise ConfigError(
            f"the VAE's latents have {vae.config.latent_channels} channels, the model's {in_channels}; give the VAE "
            "that made the training latents"
        )
    wanted, given = (trained or {}).get("scaling_factor"), vae.config.scaling_factor
    if wanted is not None and abs(wanted - given) > 1e-4 * abs(wanted):
        raise ConfigError(
            f"this VAE scales latents by {given:.5g}, the one of the training latents ({trained.get('name')}) by "
            f"{wanted:.5g}; give that one with --vae"
        )


def decode(vae, latents, batch_size: int = 8) -> np.ndarray:
    """Turn latents into images.

    Args:
        vae: see :func:`load_vae`.
        latents: float ``[N, C, h, w]``, N > 0, scaled as the model was trained on them; an array or a tensor.
        batch_size: latents decoded at once.

    Returns:
        uint8 ``[N, H, W, 3]``, ``127.5 x + 128`` clamped to 0 .. 255, as the paper's evaluation rounds.

    Raises:
        ConfigError: latents of another number of channels.
    """
    import paddle

    latents = np.asarray(latents, dtype=np.float32)
    check_fits(vae, latents.shape[1])
    images = []
    with paddle.no_grad():
        for start in range(0, len(latents), batch_size):
            batch = paddle.to_tensor(latents[start : start + batch_size]) / vae.config.scaling_factor
            pixels = (vae.decode(batch).sample.astype("float32") * 127.5 + 128).clip(0, 255)
            images.append(pixels.transpose([0, 2, 3, 1]).numpy().astype(np.uint8))  # (n, H, W, 3)
    return np.concatenate(images)


def encode(vae, images, noise=None) -> np.ndarray:
    """Turn images into latents, all at once.

    Args:
        vae: see :func:`load_vae`.
        images: float32 ``[N, 3, H, W]`` in [-1, 1]; an array or a tensor.
        noise: standard normal ``[N, C, h, w]`` to draw from the posterior, or None for its mean.

    Returns:
        float32 ``[N, C, h, w]``, multiplied by the VAE's scaling factor.

    Raises:
        ConfigError: images of another number of channels.
    """
    import paddle

    images = np.asarray(images, dtype=np.float32)
    if images.shape[1] != vae.config.in_channels:
        raise ConfigError(f"the VAE takes images of {vae.config.in_channels} channels, got {images.shape[1]}")
    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(images)).latent_dist
        latents = posterior.mean
        if noise is not None:
            latents = latents + posterior.std * paddle.to_tensor(np.asarray(noise, dtype=np.float32))
        return (latents * vae.config.scaling_factor).numpy()


def _find_folder(name: str) -> Path:
    places = [Path(name), _ROOT / name] if name.startswith("data/") else [Path(name)]
    for folder in (folder for place in places for folder in (place, place / "vae")):
        if (folder / "config.json").is_file():
            return folder
    if any(place.exists() for place in places):
        raise ConversionError(f"{name} holds no VAE; place {_FILES} there")
    if not _HUB_NAME.fullmatch(name):
        raise ConversionError(f"no such VAE folder: {name}; give a folder with {_FILES}, or a hub name")
    return _download(name)


def _download(name: str) -> Path:
    """Return the folder in ppdiffusers' cache that holds the hub's model, downloading what is missing."""
    # ppdiffusers' own from_pretrained would unpickle what it downloads, so only its download is used.
    from ppdiffusers.utils import PPDIFFUSERS_CACHE, _get_model_file

    folder = Path(PPDIFFUSERS_CACHE) / name
    for choices in (["config.json"], list(STOCK_WEIGHTS.values())):
        if not any((folder / file).is_file() or _fetched(_get_model_file, name, file) for file in choices):
            raise ConversionError(
                f"no folder {name}, and the hub's model of that name could not be fetched; place {_FILES} "
                f"into {folder}, or into any folder and name that"
            )
    return folder


def _fetched(get_model_file, name: str, file: str) -> bool:
    try:
        get_model_file(name, weights_name=file, resume_download=True)
    except OSError:  # ppdiffusers turns "not there" and "no network" alike into this
        return False
    return True
