"""From pixels to what a store keeps of them: the VAE, and noise that depends on the seed and the image alone."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from paddle_dit.checkpoint import fingerprint
from paddle_dit.errors import ConfigError
from paddle_dit.randomness import Stream, generator
from paddle_dit.runtime import AMP_DTYPES, choose_device


class Encoder:
    """A VAE's encoder; calling it gives stored samples.

    Attributes:
        device: "cpu" or "gpu".
        sample_shape: of one sample: ``(C, h, w)`` of latents, ``(2C, h, w)`` of moments.
        overflows: batches that float16 could not hold and that were encoded in float32 instead.

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
        self.vae, self.kind, self.overflows = vae, kind, 0
        self._seed, self._precision, self._report = seed, precision, report
        self.device = choose_device(precision)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if image_size % factor:
            below = image_size // factor * factor
            raise ConfigError(
                f"--image-size {image_size} is not divisible by {factor}, by which this VAE shrinks images; choose "
                f"{below or factor} or {below + factor}"
            )
        if vae.config.in_channels != 3:
            raise ConfigError(f"the VAE takes images of {vae.config.in_channels} channels; give one for RGB images")
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
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(127.5) - 1
        mean, log_variance = self._posterior(images)
        if self.kind == "moments":
            return np.concatenate([mean, log_variance], axis=1)
        noise = np.empty_like(mean)
        for row, number in zip(noise, numbers, strict=True):
            random = generator(self._seed, Stream.ENCODING, int(mirrored), int(number))
            random.standard_normal(out=row, dtype=np.float32)
        return draw(mean, log_variance, noise, self.scaling_factor)

    def _posterior(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moments = self._run(images, self._precision)
        if self._precision == "fp16" and not np.isfinite(moments).all():
            if not self.overflows:
                self._report(
                    "float16 overflows in this VAE: such batches are encoded in float32; --precision bf16 fits"
                )
            self.overflows += 1
            moments = self._run(images, "fp32")
        mean, log_variance = np.split(moments, 2, axis=1)
        return mean, log_variance

    def _run(self, images: np.ndarray, precision: str) -> np.ndarray:
        import paddle

        half = precision != "fp32"
        context = paddle.amp.auto_cast(dtype=AMP_DTYPES[precision], level="O1") if half else contextlib.nullcontext()
        with paddle.no_grad(), context:
            posterior = self.vae.encode(paddle.to_tensor(images)).latent_dist
        parts = [posterior.mean.astype("float32").numpy(), posterior.logvar.astype("float32").numpy()]
        return np.concatenate(parts, axis=1)


def draw(mean: np.ndarray, log_variance: np.ndarray, noise: np.ndarray, scaling_factor: float) -> np.ndarray:
    """Return latents ``[B, C, h, w]`` drawn from the VAE's distribution by standard normal ``noise``, all float32."""
    return (mean + np.exp(log_variance / 2) * noise) * np.float32(scaling_factor)
