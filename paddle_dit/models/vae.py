"""The VAE between images and latents: ppdiffusers' AutoencoderKL, loaded without trusting its files."""

import contextlib
import fcntl
import hashlib
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.checkpoint import load_weights
from paddle_dit.errors import ConfigError, ConversionError
from paddle_dit.files import sha256
from paddle_dit.models.vae_files import read_vae_config, read_vae_weights, vae_weights_file
from paddle_dit.readers import STOCK_WEIGHTS

_ROOT = Path(__file__).resolve().parents[2]
_HUB_NAME = re.compile(r"(?!data/)\w[\w.-]*/\w[\w.-]*")  # data/ is this project's own folder
_FILES = f"config.json and {' or '.join(STOCK_WEIGHTS.values())}"


@dataclass(frozen=True)
class VaeFiles:
    """What the files of a VAE say of it, without loading it.

    Attributes:
        name: as it was asked for.
        latent_channels: of its latents.
        factor: by which it shrinks images.
        scaling_factor: what its latents are multiplied by.
        fingerprint: SHA-256 of its weights and of the factors; empty where it was not asked for.
    """

    name: str
    latent_channels: int
    factor: int
    scaling_factor: float
    fingerprint: str


def find_vae(name_or_path: str | Path, *, fingerprint: bool = True) -> VaeFiles:
    """Find the files of a VAE that encodes RGB images; nothing is loaded, and Paddle not needed but for a download.

    Args:
        name_or_path: as for :func:`load_vae`.
        fingerprint: read the weights for it.

    Raises:
        ConversionError: no such folder or model, or its configuration is not an AutoencoderKL's for RGB images.
    """
    folder = _find_folder(str(name_or_path))
    config = read_vae_config(folder)
    blocks, channels = config.get("block_out_channels", [64]), config.get("latent_channels", 4)
    scale = config.get("scaling_factor", 0.18215)
    good = isinstance(blocks, list) and blocks and isinstance(channels, int) and channels > 0
    if not good or not isinstance(scale, int | float) or not 0 < scale < 1e6:
        raise ConversionError(f"{folder / 'config.json'} does not describe an AutoencoderKL; restore it")
    if config.get("in_channels", 3) != 3:
        raise ConversionError(f"{folder} takes images of {config['in_channels']} channels; give a VAE for RGB images")
    digest = ""
    if fingerprint:
        weights = vae_weights_file(folder)
        digest = hashlib.sha256(f"{sha256(weights)} {len(blocks)} {float(scale)!r}".encode()).hexdigest()
    return VaeFiles(str(name_or_path), channels, 2 ** (len(blocks) - 1), float(scale), digest)


def load_vae(name_or_path: str | Path):
    """Return a ppdiffusers ``AutoencoderKL`` in evaluation mode; nothing else in the process changes by it.

    Args:
        name_or_path: a folder of ``save_pretrained``, a folder with such a ``vae/`` in it (a DiTPipeline's), or the
            hub name of a model, which is downloaded once. ``data/...`` is also looked for at this project's root, so
            that a run that names its VAE so can be used from anywhere.

    Raises:
        ConversionError: no such folder or model, or files that are missing, damaged or of another class.
    """
    folder = _find_folder(str(name_or_path))
    config, tensors = read_vae_config(folder), read_vae_weights(folder)
    with _same_signal_handlers(), _same_random_state():
        from ppdiffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_config(config)
        except Exception as error:  # the class checks nothing, so wrong values fail anywhere in it
            raise ConversionError(f"{folder / 'config.json'} does not describe an AutoencoderKL ({error})") from None
    load_weights(vae, tensors, folder)
    vae.eval()
    return vae


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Give back what a layer draws for its initial weights, so that a run draws the same with and without a VAE."""
    import paddle

    state = paddle.get_rng_state()
    try:
        yield
    finally:
        paddle.set_rng_state(state)


@contextlib.contextmanager
def _same_signal_handlers() -> Iterator[None]:
    """Make Paddle's switch do nothing, which PaddleNLP turns on import: a stop signal would end a run unsaved."""
    import paddle

    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # there is none to keep, and Paddle's own would be noisy
        yield
        return
    switch, paddle.disable_signal_handler = paddle.disable_signal_handler, lambda: None
    try:
        yield
    finally:
        paddle.disable_signal_handler = switch


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
        images: ``[N, 3, H, W]`` in [-1, 1]; an array, or a float32 tensor, which stays on its device.
        noise: standard normal ``[N, C, h, w]`` to draw from the posterior, or None for its mean.

    Returns:
        float32 ``[N, C, h, w]``, multiplied by the VAE's scaling factor.

    Raises:
        ConfigError: images of another number of channels.
    """
    import paddle

    if not isinstance(images, paddle.Tensor):
        images = paddle.to_tensor(np.asarray(images, dtype=np.float32))
    if images.shape[1] != vae.config.in_channels:
        raise ConfigError(f"the VAE takes images of {vae.config.in_channels} channels, got {images.shape[1]}")
    with paddle.no_grad():
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean.astype("float32")  # which half precision around this call has narrowed
        if noise is not None:
            std = posterior.std.astype("float32")
            latents = latents + std * paddle.to_tensor(np.asarray(noise, dtype=np.float32))
        return (latents * vae.config.scaling_factor).numpy()


def _find_folder(name: str) -> Path:
    places = [Path(name), _ROOT / name] if name.startswith("data/") else [Path(name)]
    if Path(name).is_file():
        return Path(name)
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
    with _same_signal_handlers():
        from ppdiffusers.utils import PPDIFFUSERS_CACHE, _get_model_file

    folder = Path(PPDIFFUSERS_CACHE) / name
    with _one_at_a_time(Path(PPDIFFUSERS_CACHE)):
        for choices in (["config.json"], list(STOCK_WEIGHTS.values())):
            if not any((folder / file).is_file() or _fetched(_get_model_file, name, file) for file in choices):
                raise ConversionError(
                    f"no folder {name}, and the hub's model of that name could not be fetched; place {_FILES} "
                    f"into {folder}, or into any folder and name that"
                )
    return folder


@contextlib.contextmanager
def _one_at_a_time(cache: Path) -> Iterator[None]:
    """Let the ranks of a machine look for a model one after another: the first downloads, the others find it."""
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(OSError):  # of a cache that cannot be written: nothing is downloaded into it
            cache.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context((cache / ".paddle_dit.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _fetched(get_model_file, name: str, file: str) -> bool:
    try:
        get_model_file(name, weights_name=file, resume_download=True)
    except OSError:  # ppdiffusers turns "not there" and "no network" alike into this
        return False
    return True
