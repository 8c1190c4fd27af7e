"""Large images from overlapping tiles, so that what a tile takes bounds the memory, whatever the image."""

import itertools
import math
from collections.abc import Callable

import numpy as np


def cut(size: int, largest: int) -> list[tuple[int, int]]:
    """Cut a line into the fewest pieces, all of one length, of which neighbours overlap.

    Args:
        size: length of the line.
        largest: length that no piece exceeds, at least 2; a quarter of it is the least overlap.

    Returns:
        start and stop of each piece.
    """
    overlap = largest // 4
    count = max(1, math.ceil((size - overlap) / (largest - overlap)))
    length = min(size, math.ceil((size + (count - 1) * overlap) / count))
    starts = [number * (size - length) // max(1, count - 1) for number in range(count)]
    return [(start, start + length) for start in starts]


def blending_weights(pieces: list[tuple[int, int]], factor: int) -> list[np.ndarray]:
    """Return a weight for each pixel of each piece: linear where two overlap, and 1 in all at every pixel.

    Args:
        pieces: see :func:`cut`.
        factor: pixels per unit of the line.

    Returns:
        float32 ``[factor * length]`` for each piece.
    """
    weights = [np.ones((stop - start) * factor, np.float32) for start, stop in pieces]
    for number, ((_, stop), (start, _)) in enumerate(itertools.pairwise(pieces)):
        shared = (stop - start) * factor
        rising = ((np.arange(shared) + 0.5) / max(shared, 1)).astype(np.float32)
        weights[number][len(weights[number]) - shared :] *= 1 - rising
        weights[number + 1][:shared] *= rising
    return weights


def decode_tiles(decode: Callable, latents, largest: int, factor: int) -> np.ndarray:
    """Decode latents tile by tile, and blend the tiles.

    Args:
        decode: turns ``[N, C, h, w]`` into float32 ``[N, c, factor * h, factor * w]``.
        latents: ``[N, C, h, w]``, an array or a tensor.
        largest: side of a tile, in latents, at most.
        factor: by which ``decode`` enlarges.

    Returns:
        float32 ``[N, c, factor * h, factor * w]``.
    """
    rows, columns = (cut(size, largest) for size in latents.shape[2:])
    vertical, horizontal = blending_weights(rows, factor), blending_weights(columns, factor)
    whole = None
    for (top, bottom), down in zip(rows, vertical, strict=True):
        for (left, right), across in zip(columns, horizontal, strict=True):
            tile = np.asarray(decode(latents[:, :, top:bottom, left:right]))
            if whole is None:
                whole = np.zeros((*tile.shape[:2], *(factor * size for size in latents.shape[2:])), np.float32)
            place = (..., slice(top * factor, bottom * factor), slice(left * factor, right * factor))
            whole[place] += tile * down[:, None] * across
    return whole
