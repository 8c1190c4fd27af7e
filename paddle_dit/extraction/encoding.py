"""From pixels to what a store keeps of them: the VAE, and noise that depends on the seed and the image alone."""

from collections.abc import Callable, Sequence

import numpy as np

from paddle_dit.checkpoint import fingerprint
from paddle_dit.errors import ConfigError
from paddle_dit.half_precision import GuardedPrecision
from paddle_dit.models.vae import draw, factor_of, moments, normalized
from paddle_dit.randomness import Stream, standard_normal
from paddle_dit.runtime import choose_device


class Encoder:
    """A VAE's encoder; calling it gives stored samples.

    Attributes:
        device: "cpu" or "gpu".
        sample_shape: of one sample: ``(C, h, w)`` of latents, ``(2C, h, w)`` of moments.

    Args:
        vae: see :func:`paddle_dit.models.vae.load_vae`.
        image_size: side of the images in pixels.
        kind: ``"latents"`` (drawn, times the scaling factor) or ``"moments"`` (mean and log-variance as they are).
        seed: of the noise.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``; not run on a GPU yet.
        report: is told, in a line, of the first overflow.

    Raises:
        ConfigError: images of this size do not fit the VAE, or half precision without a GPU.
    """

    def __init__(
        self,
        vae,
        image_size: int,
        kind: str = "latents",
        seed: int = 0,
        precision: str = "fp32",
        report: Callable[[str], None] = print,
    ) -> None:
        self.vae, self.kind, self._seed = vae, kind, seed
        self._precision = GuardedPrecision(precision, "this VAE", report)
        self.device = choose_device()
        factor = factor_of(vae)
        if image_size % factor:
            below = image_size // factor * factor
            raise ConfigError(
                f"--image-size {image_size} is not divisible by {factor}, by which this VAE shrinks images; choose "
                f"{below or factor} or {below + factor}"
            )
        self._latent_shape = (vae.config.latent_channels, image_size // factor, image_size // factor)
        channels = vae.config.latent_channels * (2 if kind == "moments" else 1)
        self.sample_shape = (channels, *self._latent_shape[1:])

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by."""
        return float(self.vae.config.scaling_factor)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the VAE's weights."""
        return fingerprint(self.vae)

    def __call__(self, pixels: np.ndarray, numbers: Sequence[int], mirrored: bool = False) -> np.ndarray:
        """Encode a batch at once.

        Args:
            pixels: uint8 ``[B, S, S, 3]``.
            numbers: of the images, ``[B]``: with the seed, they decide the noise.
            mirrored: encode the mirrored images, with noise of their own.

        Returns:
            float32 ``[B, *sample_shape]``.
        """
        pixels = pixels[:, :, ::-1] if mirrored else pixels
        mean, log_variance = moments(self.vae, normalized(pixels), self._precision)
        if self.kind == "moments":
            return np.concatenate([mean, log_variance], axis=1)
        noise = standard_normal(self._seed, Stream.ENCODING, int(mirrored), numbers, mean.shape[1:])
        return draw(mean, log_variance, noise, self.scaling_factor)
