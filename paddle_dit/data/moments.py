"""Latents drawn from stored moments: the mean and log-variance of a VAE's distribution, along the channels, unscaled.

Whoever reads the same sample twice may draw another latent from it, as a VAE in the training loop would.
"""

import math
from pathlib import Path

import numpy as np

from paddle_dit.data.mixture import Mixture
from paddle_dit.data.npy import non_finite_rows
from paddle_dit.data.source import LatentSource, latent_shape_of
from paddle_dit.data.subset import Subset, origin
from paddle_dit.errors import DataError
from paddle_dit.models.vae import draw
from paddle_dit.randomness import Stream, standard_normal


def check_moments(source: LatentSource, folder: str | Path) -> None:
    """Check that latents can be drawn from moments.

    Raises:
        DataError: the VAE's scaling factor is not known, or the channels are not means and as many log-variances.
    """
    if source.sample_shape[0] % 2:
        raise DataError(
            f"moments in {folder} are {list(source.sample_shape)}, an odd number of channels, so not means and as many "
            "log-variances; extract the features again"
        )
    factor = (source.vae or {}).get("scaling_factor")
    if factor is None:
        raise DataError(
            f"{folder} holds moments and does not say their VAE's scaling factor, which latents are multiplied by; "
            "pack it anew with scripts/pack_features.py --dtype float32 --scaling-factor, or extract the features again"
        )
    if not (math.isfinite(factor) and factor > 0):
        raise DataError(f"{folder} says the VAE's scaling factor is {factor}, not above 0; extract the features again")


def mean_latents(samples: np.ndarray, kind: str, scaling_factor: float) -> np.ndarray:
    """Return samples of a kind as latents that a VAE decodes: of moments ``[B, 2C, h, w]`` the means, scaled."""
    return samples if kind == "latents" else np.split(samples, 2, axis=1)[0] * np.float32(scaling_factor)


class MomentSampler:
    """Draws latents from the moments that a source gathers.

    Args:
        source: of moments that pass :func:`check_moments`.
        seed: of the noise; with the stream, step and position of a sample it decides what is drawn.
        stream: which of the seed's streams.
    """

    def __init__(self, source: LatentSource, seed: int, stream: Stream = Stream.POSTERIOR):
        self._source, self._seed, self._stream = source, seed, stream
        self._shape, self._scaling_factor = latent_shape_of(source), source.vae["scaling_factor"]

    def __call__(self, moments: np.ndarray, indices: np.ndarray, step: int, positions: np.ndarray) -> np.ndarray:
        """Draw a latent for each sample, the one that the VAE in the training loop draws for the same place.

        Args:
            moments: float32 ``[B, 2C, h, w]``, as gathered.
            indices: int64 ``[B]``, of these samples in the source.
            step: number of the update, from 0.
            positions: int64 ``[B]``, places in the global batch.

        Returns:
            float32 ``[B, C, h, w]``, multiplied by the VAE's scaling factor.

        Raises:
            DataError: a latent is not finite; the sample is named.
        """
        mean, log_variance = np.split(moments, 2, axis=1)
        noise = standard_normal(self._seed, self._stream, step, positions, self._shape)
        with np.errstate(over="ignore", invalid="ignore"):
            latents = draw(mean, log_variance, noise, self._scaling_factor)
        bad = non_finite_rows(latents)
        if len(bad):
            raise DataError(
                f"sample {_name(self._source, indices[bad[0]])} has moments up to {np.abs(moments[bad[0]]).max():.4g}, "
                "from which no finite latent can be drawn; extract the features again"
            )
        return latents


class DrawnLatents(Subset):
    """The latents of all samples of a source of moments: one for each sample, the same whenever it is gathered.

    Args:
        source: of moments that pass :func:`~paddle_dit.data.moments.check_moments`.
        seed: of the draws.
    """

    def __init__(self, source: LatentSource, seed: int):
        super().__init__(source, np.arange(len(source)), "drawn")
        self.kind, self.sample_shape = "latents", latent_shape_of(source)
        self._draw = MomentSampler(source, seed, Stream.VALIDATION)

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 latents ``[B, C, h, w]`` and int64 labels ``[B]``; errors as the source's."""
        moments, labels = super().gather(indices, flipped)
        return self._draw(moments, indices, 2, indices), labels  # 2, as for images: a draw apart from validation's own


def _name(source: LatentSource, index: int) -> str:
    source, index = origin(source, index)
    return source.name(index) if isinstance(source, Mixture) else f"{index} of {source.folder}"
