"""What a network must offer, so that the figures can be computed of its features."""

from typing import NamedTuple, Protocol

import numpy as np


class FeatureBatch(NamedTuple):
    """The features of some images, float32.

    Attributes:
        pool: ``[N, D]``, of FID, precision and recall.
        spatial: ``[N, S]``, of sFID, flattened with the channels last.
        logits: ``[N, classes]``, of the Inception Score, without the last layer's bias.
    """

    pool: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


class Features(Protocol):
    """A network.

    Attributes:
        about: says what it is, to people and to whoever compares files: ``name``, ``weights`` (SHA-256), ``resize``.
        sizes: D and S.
        few: with fewer images than that, a warning says that the figures cannot be compared with published ones.
        any_size: whether images of different sizes may be compared.
        batch_size: images that it takes at once by default.
    """

    about: dict[str, str]
    sizes: tuple[int, int]
    few: int
    any_size: bool
    batch_size: int

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raise DataError unless uint8 images of this shape, those of ``name``, can be taken."""

    def __call__(self, images: np.ndarray) -> FeatureBatch:
        """Return the features of uint8 ``[N, *shape]``."""
