"""The VAE between images and latents: ppdiffusers' AutoencoderKL, loaded without trusting its files."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.checkpoint import load_weights
from paddle_dit.errors import ConfigError, ConversionError
from paddle_dit.files import sha256
from paddle_dit.half_precision import GuardedPrecision
from paddle_dit.models.tiling import LARGEST_TILE, decode_batches
from paddle_dit.models.vae_files import (
    check_scaling_factor,
    find_place,
    is_scaling_factor,
    read_config,
    same_signal_handlers,
)
from paddle_dit.models.vae_weights import read_vae_weights, weights_file

OVERRIDDEN = "config_scaling_factor"  # in what data and models keep of a VAE: the factor that was not used
_LOG_VARIANCES = (-30.0, 20.0)  # AutoencoderKL clamps them so


@dataclass(frozen=True)
class VaeFiles:
    """What the files of a VAE say of it, without loading it.

    Attributes:
        name: as it was asked for.
        latent_channels: of its latents.
        factor: by which it shrinks images.
        scaling_factor: what its latents are multiplied by.
        fingerprint: SHA-256 of its weights and of the factors; empty where it was not asked for.
        config_scaling_factor: the scaling factor of its config.json, where another is used.
    """

    name: str
    latent_channels: int
    factor: int
    scaling_factor: float
    fingerprint: str
    config_scaling_factor: float | None = None

    def record(self, image_size: int) -> dict:
        """Return what data and models keep of the VAE that made latents of images of a size; see :func:`fit_vae`."""
        values = {"name": self.name, "scaling_factor": self.scaling_factor, "image_size": image_size}
        return values if self.config_scaling_factor is None else {**values, OVERRIDDEN: self.config_scaling_factor}


def find_vae(name_or_path: str | Path, scaling_factor: float | None = None, *, fingerprint: bool = True) -> VaeFiles:
    """Find the files of a VAE that encodes RGB images; nothing is loaded, and Paddle not needed but for a download.

    Args:
        name_or_path: as for :func:`load_vae`.
        scaling_factor: likewise.
        fingerprint: read the weights for it.

    Raises:
        ConversionError: no such folder or model, or its configuration is not an AutoencoderKL's for RGB images.
        ConfigError: a scaling factor that is no such.
    """
    place = find_place(str(name_or_path))
    config = read_config(place)
    own = float(config["scaling_factor"])
    scale = own if scaling_factor is None else float(scaling_factor)
    check_scaling_factor(scale)
    blocks = len(config["block_out_channels"])
    digest = ""
    if fingerprint:
        digest = hashlib.sha256(f"{sha256(weights_file(place))} {blocks} {scale!r}".encode()).hexdigest()
    overridden = None if scale == own else own
    return VaeFiles(str(name_or_path), config["latent_channels"], 2 ** (blocks - 1), scale, digest, overridden)


def load_vae(name_or_path: str | Path, scaling_factor: float | None = None):
    """Return a ppdiffusers ``AutoencoderKL`` in evaluation mode; nothing else in the process changes by it.

    Args:
        name_or_path: a folder of ppdiffusers' or diffusers' ``save_pretrained``, a folder with such a ``vae/`` in it (a
            pipeline's), a file of weights (CompVis's ``.ckpt`` too), or the hub name of a model, which is downloaded
            once. ``data/...`` is also looked for at this project's root, so that a run that names its VAE so can be
            used from anywhere.
        scaling_factor: what latents are multiplied by. Default: what its config.json says.

    Raises:
        ConversionError: no such folder or model, or files that are missing, damaged or of another class.
        ConfigError: a scaling factor that is no such.
    """
    place = find_place(str(name_or_path))
    config, tensors = read_config(place), read_vae_weights(place)
    if scaling_factor is not None:
        check_scaling_factor(scaling_factor)
        config["scaling_factor"] = scaling_factor
    with same_signal_handlers(), _same_random_state():
        from ppdiffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_config(config)
        except Exception as error:  # the class checks nothing, so wrong values fail anywhere in it
            raise ConversionError(f"the config.json of {place} does not describe an AutoencoderKL ({error})") from None
    load_weights(vae, tensors, place)
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


def factor_of(vae) -> int:
    """Return by how much a VAE shrinks images, height and width alike."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_fits(vae, in_channels: int, trained: dict | None = None) -> None:
    """Raise ConfigError unless the VAE decodes the latents of a model.

    Args:
        vae: see :func:`load_vae`.
        in_channels: channels of the model's latents.
        trained: what is known of the VAE that made the training latents, see :meth:`VaeFiles.record`. This VAE's
            scaling factor must be that one's: the factor that was used, or the overridden one of its config.json.
    """
    if vae.config.latent_channels != in_channels:
        raise ConfigError(
            f"the VAE's latents have {vae.config.latent_channels} channels, the model's {in_channels}; give the VAE "
            "that made the training latents"
        )
    trained, given = trained or {}, vae.config.scaling_factor
    used = trained.get("scaling_factor")
    own = trained.get(OVERRIDDEN, used)
    if used is None:
        return
    for factor in (used, own):
        if not is_scaling_factor(factor):
            raise ConfigError(f"what the model says of its VAE is damaged: {factor!r} is no scaling factor; restore it")
    if not any(abs(factor - given) <= 1e-4 * factor for factor in (used, own)):
        raise ConfigError(
            f"this VAE scales latents by {given:.5g}, the one of the training latents ({trained.get('name')}) by "
            f"{own:.5g}; give that one with --vae, or, if it is this one, write {own:.5g} into its config.json"
        )


def fit_vae(vae, in_channels: int, trained: dict | None = None) -> None:
    """Check that a VAE decodes the latents of a model, and let it divide them by what they were multiplied by.

    That is its own scaling factor unless it was overridden for the training latents: then the VAE's configuration is
    changed, in place, and so is what ``vae.save_pretrained`` writes.

    Args:
        vae: see :func:`load_vae`.
        in_channels: channels of the model's latents.
        trained: see :func:`check_fits`.

    Raises:
        ConfigError: it does not.
    """
    check_fits(vae, in_channels, trained)
    if trained and OVERRIDDEN in trained and trained.get("scaling_factor") is not None:
        vae.register_to_config(scaling_factor=float(trained["scaling_factor"]))


def decode(
    vae, latents, batch_size: int = 8, *, precision: GuardedPrecision | None = None, tile: int = LARGEST_TILE
) -> np.ndarray:
    """Turn latents into images.

    Args:
        vae: see :func:`load_vae`.
        latents: float ``[N, C, h, w]``, N > 0, scaled as the model was trained on them; an array or a tensor.
        batch_size: latents decoded at once, if they are no larger than a tile; else it is one by one.
        precision: what the VAE computes in. Default: float32.
        tile: latents larger than this, in height or width, are decoded in overlapping tiles no larger, which are
            blended. Attention and GroupNorm see a tile alone, so colours differ a little from those of the whole.

    Returns:
        uint8 ``[N, H, W, 3]``, ``127.5 x + 128`` clamped to 0 .. 255, as the paper's evaluation rounds.

    Raises:
        ConfigError: latents of another number of channels.
    """
    import paddle

    latents, precision = np.asarray(latents, dtype=np.float32), precision or GuardedPrecision()
    check_fits(vae, latents.shape[1])

    def decode_part(part: np.ndarray) -> np.ndarray:
        part = paddle.to_tensor(part)
        return precision.compute(lambda: vae.decode(part).sample).numpy()

    return decode_batches(
        decode_part,
        latents,
        scaling_factor=vae.config.scaling_factor,
        factor=factor_of(vae),
        batch_size=batch_size,
        tile=tile,
    )


def normalized(pixels: np.ndarray):
    """Return uint8 pixels ``[N, H, W, 3]`` as a VAE takes them: a float32 tensor ``[N, 3, H, W]`` in [-1, 1]."""
    import paddle

    images = paddle.to_tensor(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).astype("float32")
    return images / 127.5 - 1


def moments(vae, images, precision: GuardedPrecision | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return what a VAE makes of images, all at once: the mean and log-variance of their latents, not scaled.

    Args:
        vae: see :func:`load_vae`.
        images: ``[N, 3, H, W]`` in [-1, 1]; an array, or a float32 tensor, which stays on its device.
        precision: what the VAE computes in; its weights stay float32. Default: float32.

    Returns:
        two arrays, float32 ``[N, C, h, w]``.

    Raises:
        ConfigError: images of another number of channels.
    """
    import paddle

    if not isinstance(images, paddle.Tensor):
        images = paddle.to_tensor(np.asarray(images, dtype=np.float32))
    if images.shape[1] != vae.config.in_channels:
        raise ConfigError(f"the VAE takes images of {vae.config.in_channels} channels, got {images.shape[1]}")
    precision = precision or GuardedPrecision()
    # As the network gives them: a log-variance that overflowed would look finite once it is clamped.
    parameters = precision.compute(lambda: vae.encode(images).latent_dist.parameters).numpy()
    mean, log_variance = np.split(parameters, 2, axis=1)
    return mean, np.clip(log_variance, *_LOG_VARIANCES)


def draw(mean: np.ndarray, log_variance: np.ndarray, noise: np.ndarray, scaling_factor: float) -> np.ndarray:
    """Return latents ``[N, C, h, w]`` drawn from a VAE's distribution by standard normal ``noise``, all float32."""
    return (mean + np.exp(log_variance / 2) * noise) * np.float32(scaling_factor)


def encode(vae, images, noise=None, precision: GuardedPrecision | None = None) -> np.ndarray:
    """Turn images into latents, all at once.

    Args:
        vae: see :func:`load_vae`.
        images: as for :func:`moments`.
        noise: standard normal ``[N, C, h, w]`` to draw from the posterior, or None for its mean.
        precision: as for :func:`moments`.

    Returns:
        float32 ``[N, C, h, w]``, multiplied by the VAE's scaling factor.

    Raises:
        ConfigError: images of another number of channels.
    """
    mean, log_variance = moments(vae, images, precision)
    if noise is None:
        return mean * np.float32(vae.config.scaling_factor)
    return draw(mean, log_variance, np.asarray(noise, dtype=np.float32), vae.config.scaling_factor)
