"""Random draws that depend on what they are for, never on when or where they are made.

Each draw has a key ``(seed, stream, step)`` and a position, fed to a counter-based generator. A resumed run, another
number of ranks or another batch size therefore sees the same numbers.
"""

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


def permutation(count: int, *key: int) -> np.ndarray:
    """Return the numbers below ``count``, int64, in an order that depends on ``key`` alone.

    By sorting a raw stream, because NumPy promises raw streams to stay the same over versions, and
    ``Generator.permutation`` not.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")
