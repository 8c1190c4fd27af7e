"""Large images from overlapping tiles, so that what a tile takes bounds the memory, whatever the image."""

import itertools
import math
from collections.abc import Callable

import numpy as np

from paddle_dit.errors import GenerationError

# In the middle of a decoder every place attends to every other, so its memory grows with the fourth power of the side:
# one score for each pair is 1 GiB at 128 x 128 latents (1024 pixels at the usual factor of 8), 16 GiB at 256 x 256.
# Up to here an image is decoded whole, as the VAE was trained: attention and GroupNorm then see all of it.
LARGEST_TILE = 128


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


def decode_batches(
    decode: Callable, latents: np.ndarray, *, scaling_factor: float, factor: int, batch_size: int, tile: int
) -> np.ndarray:
    """Turn latents into pixels, batch by batch, and tile by tile where they are larger than a tile.

    Args:
        decode: turns float32 ``[n, C, h, w]``, as the VAE made them, into float32 ``[n, 3, factor * h, factor * w]``.
        latents: float32 ``[N, C, h, w]``, N > 0, scaled as a model was trained on them.
        scaling_factor: by which they were multiplied.
        factor: by which ``decode`` enlarges.
        batch_size: latents decoded at once, if they are no larger than a tile; else it is one by one.
        tile: side of a tile, in latents, at most.

    Returns:
        uint8 ``[N, H, W, 3]``, ``127.5 x + 128`` clamped to 0 .. 255, as the paper's evaluation rounds.

    Raises:
        GenerationError: pixels are NaN or infinite.
    """
    batch_size = batch_size if max(latents.shape[2:]) <= tile else 1
    images = []
    for start in range(0, len(latents), batch_size):
        pixels = decode_tiles(decode, latents[start : start + batch_size] / np.float32(scaling_factor), tile, factor)
        if not np.isfinite(pixels).all():  # which would become black
            largest = np.abs(latents[start : start + batch_size]).max()
            raise GenerationError(
                f"a drawn image came out NaN or infinite; its latents reach {largest:.3g}, and a few units are usual: "
                "lower the guidance scale, use fp32, or check the weights"
            )
        pixels = np.clip(pixels * np.float32(127.5) + np.float32(128), 0, 255)
        images.append(pixels.transpose(0, 2, 3, 1).astype(np.uint8))  # (n, H, W, 3)
    return np.concatenate(images)
