"""Random draws that depend on what they are for, never on when or where they are made.

Each draw has a key ``(seed, stream, step)`` and a position, fed to a counter-based generator. A resumed run, another
number of ranks or another batch size therefore sees the same numbers.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Independent sources of randomness under one seed."""

    TRAINING = 0
    GENERATION = 1
    VALIDATION = 2
    FLIPS = 3
    ENCODING = 4
    POSTERIOR = 5
    LABELS = 6


MAX_SEED = 2**56 - 1  # the stream takes 8 of the key's 64 bits


def generator(seed: int, stream: Stream, step: int, position: int) -> np.random.Generator:
    """Return the generator of one sample (``position``) in one training step, or of one image to draw.

    The position sits in the top word of Philox's 256-bit counter, so streams of neighbours never overlap.
    """
    key = np.array([(int(seed) << 8) | int(stream), int(step)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, int(position)]))


def standard_normal(seed: int, stream: Stream, step: int, positions: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Return float32 noise ``[B, *shape]``, the row of each of ``positions [B]`` by its own :func:`generator`."""
    noise = np.empty((len(positions), *shape), np.float32)
    for row, position in zip(noise, positions, strict=True):
        generator(seed, stream, step, position).standard_normal(out=row, dtype=np.float32)
    return noise


class ImageNoise:
    """The noise that images are drawn with: each one's depends on the seed and its own number alone.

    Args:
        seed: of the images.
        indices: numbers of the images, ``[N]``.
        shape: of one latent.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]):
        self._generators = [generator(seed, Stream.GENERATION, 0, index) for index in indices]
        self._shape = tuple(shape)

    def __call__(self) -> np.ndarray:
        """Return the next standard normal noise, float32 ``[N, *shape]``; the first is what the sampler starts from."""
        return np.stack([one.standard_normal(self._shape, dtype=np.float32) for one in self._generators])


def uniform(seed: int, stream: Stream, step: int, positions: np.ndarray) -> np.ndarray:
    """Return float64 numbers in [0, 1) for ``positions [B]``, all by one generator of the step.

    Other positions than those asked for change nothing: the number at position ``p`` is always the step's ``p``-th.
    """
    return generator(seed, stream, step, 0).random(int(np.max(positions, initial=-1)) + 1)[positions]


def permutation(count: int, *key: int) -> np.ndarray:
    """Return the numbers below ``count``, int64, in an order that depends on ``key`` alone.

    By sorting a raw stream, because NumPy promises raw streams to stay the same over versions, and
    ``Generator.permutation`` not.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")
