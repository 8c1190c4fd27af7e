"""Images become latents within the training loop."""

from collections.abc import Callable

import numpy as np

from paddle_dit.config import ModelInfo
from paddle_dit.data.source import LatentSource
from paddle_dit.data.subset import Subset
from paddle_dit.errors import ConfigError
from paddle_dit.half_precision import GuardedPrecision
from paddle_dit.models.vae import encode, fit_vae, load_vae, normalized
from paddle_dit.randomness import Stream, standard_normal
from paddle_dit.training.precision import Precision

_AT_ONCE = 16  # images through the VAE: its activations are large, and a model's must fit beside it


def load_vae_of(info: ModelInfo, name: str | None = None):
    """Load the VAE that made a model's latents, or another one that decodes them.

    Args:
        info: of the model.
        name: folder or hub name; by default the one that the data names.

    Raises:
        ConversionError, ConfigError: it is not known, cannot be loaded, or does not fit.
    """
    name = name or (info.vae or {}).get("name")
    if name is None:
        raise ConfigError("the data does not say which VAE made the latents; give --vae-name-or-path FOLDER")
    vae = load_vae(name)
    fit_vae(vae, info.config.in_channels, info.vae)
    return vae


class Encoder:
    """A VAE that encodes this rank's images; calling it gives their latents.

    Latents are drawn from the VAE's distribution, so an image has others each time: which, depends on seed, step and
    position alone.

    Attributes:
        vae: see :func:`paddle_dit.models.vae.load_vae`.

    Args:
        info: of the model; its VAE is loaded.
        seed: of the draws.
        precision: what the VAE computes in; its weights stay float32. What overflows is encoded again in float32.
        report: is told so, in a line, the first time.
        vae: that VAE, where it has been loaded already.

    Raises:
        ConversionError, ConfigError: the VAE cannot be loaded or does not fit, or half precision without a GPU.
    """

    def __init__(
        self, info: ModelInfo, seed: int, precision: Precision, report: Callable[[str], None] = print, vae=None
    ):
        self._shape, self._seed = info.config.sample_shape, seed
        self._precision = GuardedPrecision(precision.dtype, "this VAE", report)
        self.vae = vae or load_vae_of(info)

    def __call__(self, images: np.ndarray, step: int, positions: np.ndarray) -> np.ndarray:
        """Encode a rank's share of a batch.

        Args:
            images: uint8 ``[b, S, S, 3]``.
            step: number of the update, from 0.
            positions: int64 ``[b]``, places in the global batch.

        Returns:
            float32 ``[b, C, h, w]``, multiplied by the VAE's scaling factor.
        """
        return self._encode(images, Stream.POSTERIOR, step, positions)

    def fixed(self, source: LatentSource) -> "EncodedImages":
        """Return a source of images as one of latents that are the same each time."""
        return EncodedImages(source, lambda images, indices: self._encode(images, Stream.VALIDATION, 2, indices))

    def _encode(self, images: np.ndarray, stream: Stream, step: int, positions: np.ndarray) -> np.ndarray:
        noise = standard_normal(self._seed, stream, step, positions, self._shape)
        parts = [slice(start, start + _AT_ONCE) for start in range(0, len(images), _AT_ONCE)]
        return np.concatenate(
            [encode(self.vae, normalized(images[part]), noise[part], self._precision) for part in parts]
        )


class EncodedImages(Subset):
    """The latents of all images of a source, encoded whenever they are gathered.

    Args:
        source: of images.
        encode: called as ``encode(images, indices)``.
    """

    def __init__(self, source: LatentSource, encode: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        super().__init__(source, np.arange(len(source)), "encoded")
        self.kind, self._encode = "latents", encode

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 latents ``[B, C, h, w]`` and int64 labels ``[B]``; errors as the source's."""
        images, labels = super().gather(indices, flipped)
        return self._encode(images, indices), labels
