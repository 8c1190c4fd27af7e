"""Some samples of a source as a source of their own: to hold samples out of training."""

import numpy as np

from paddle_dit.data.source import LatentSource
from paddle_dit.errors import DataError
from paddle_dit.randomness import permutation


class Subset:
    """The samples ``indices`` of another source; a :class:`paddle_dit.data.source.LatentSource`.

    Attributes:
        indices: int64 ``[n]``, places in ``whole``.
    """

    def __init__(self, whole: LatentSource, indices: np.ndarray, name: str):
        self.whole, self.indices = whole, indices
        self.kind, self.sample_shape, self.vae = whole.kind, whole.sample_shape, whole.vae
        self.has_flip = whole.has_flip
        self.num_classes, self.label_names = whole.num_classes, whole.label_names
        self.labels = None if whole.labels is None else whole.labels[indices]
        self.fingerprint = f"{whole.fingerprint}/{name}"

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return samples and labels as the whole source does."""
        return self.whole.gather(self.indices[indices], flipped)


def origin(source: LatentSource, indices: np.ndarray) -> tuple[LatentSource, np.ndarray]:
    """Return the source that subsets, one of another, are taken from, and the places of some samples in it."""
    while isinstance(source, Subset):
        source, indices = source.whole, source.indices[indices]
    return source, indices


def hold_out(source: LatentSource, count: int) -> tuple[Subset, Subset]:
    """Split a source into the samples to train on and ``count`` held-out ones.

    The choice depends on the number of samples alone, so that runs of all seeds are compared on the same ones.

    Raises:
        DataError: nothing would be left to train on.
    """
    if count >= len(source):
        raise DataError(
            f"the data has {len(source)} samples, too few to hold out {count}; use a smaller --held-out-samples, or "
            "--eval-path with samples of their own"
        )
    shuffled = permutation(len(source), len(source))
    name = f"{count} held out"
    return Subset(source, np.sort(shuffled[count:]), f"without {name}"), Subset(source, np.sort(shuffled[:count]), name)


def spread(source: LatentSource, count: int) -> Subset:
    """Return at most ``count`` samples, evenly spaced over the source."""
    count = min(count, len(source))
    return Subset(source, np.arange(count) * len(source) // count, f"{count} evenly spaced")
