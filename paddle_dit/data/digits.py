"""The embedded data set: 1,797 real handwritten 8x8 digits (NumPy and Pillow only).

The judge of generated digits works in the digits' own 8x8 space, so pictures come in two forms: ``enlarge`` makes the
smooth RGB picture that the VAE sees, ``shrink`` takes any such picture back. See ``data/digits_LICENSE.md``.
"""

import functools
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from paddle_dit.errors import DataError, nearest

DIGITS_FILE = Path(__file__).resolve().parents[2] / "data" / "digits.npz"
DIGITS_VAE_FOLDER = DIGITS_FILE.with_name("digits_vae")
DIGIT_NAMES = dict(enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))

SIDE = 8
INK = 16.0
# Interpolation alone flattens thin strokes, so that shrinking gives back 0.73 too little or too much on average; each
# round adds the lost part to the source. Two rounds leave 0.29; more gain little and ring visibly around strokes.
CORRECTIONS = 2


def load_digits(split: str = "all") -> tuple[np.ndarray, np.ndarray]:
    """Return the digits of one split.

    Args:
        split: ``train`` (1,497 images), ``heldout`` (300, 30 of each digit) or ``all`` (1,797).

    Returns:
        images uint8 ``[N, 8, 8]`` with ink 0..16, and labels int64 ``[N]`` in 0..9; the caller may write to both.
    """
    arrays = _arrays()
    rows = {"train": arrays["train_indices"], "heldout": arrays["heldout_indices"], "all": slice(None)}
    if split not in rows:
        raise DataError(f"unknown split '{split}'; choose train, heldout or all.{nearest(split, rows)}")
    return arrays["images"][rows[split]].copy(), arrays["labels"][rows[split]].copy()


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    try:
        with np.load(DIGITS_FILE, allow_pickle=False) as stored:
            return {name: stored[name] for name in ("images", "labels", "train_indices", "heldout_indices")}
    except FileNotFoundError:
        raise DataError(f"{DIGITS_FILE} is missing; run from a checkout or run scripts/make_digits.py") from None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{DIGITS_FILE} is damaged ({error}); make it anew with scripts/make_digits.py") from None


def enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """Enlarge 8x8 digits smoothly to grey RGB pictures.

    Args:
        images: ``[N, 8, 8]``, any real dtype, ink 0..16.
        size: side of the result in pixels, a multiple of 8.

    Returns:
        float32 ``[N, 3, size, size]`` in [-1, 1]; no ink is -1.
    """
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
        raise DataError(f"digits must have shape [N, 8, 8], not {list(images.shape)}")
    _check_size(size)
    source = images
    for _ in range(CORRECTIONS):
        source = source + images - _box_average(_interpolate(source, size))
    grey = _interpolate(source, size) * np.float32(2 / INK) - 1
    return np.repeat(grey[:, None], 3, axis=1)


def shrink(images: np.ndarray) -> np.ndarray:
    """Average RGB pictures back to 8x8 digits, the space in which the judge works.

    Args:
        images: float32 ``[N, 3, s, s]`` in [-1, 1] (values outside are clipped), ``s`` a multiple of 8.

    Returns:
        float32 ``[N, 8, 8]``, ink 0..16.
    """
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise DataError(f"pictures must have shape [N, 3, s, s], not {list(images.shape)}")
    _check_size(images.shape[2])
    return (_box_average(np.clip(images, -1, 1).mean(axis=1)) + 1) * np.float32(INK / 2)


def as_digits(images: np.ndarray) -> np.ndarray:
    """Return drawn pictures, uint8 ``[N, s, s, 3]``, as :func:`shrink` returns them: float32 ``[N, 8, 8]``."""
    return shrink(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


def _check_size(size: int) -> None:
    if size < SIDE or size % SIDE:
        raise DataError(f"the side of a picture must be a positive multiple of {SIDE}, not {size}")


def _interpolate(images: np.ndarray, size: int) -> np.ndarray:
    """Bicubic ``[N, 8, 8]`` → ``[N, size, size]``, clipped to the range of ink."""
    enlarged = np.empty((len(images), size, size), dtype=np.float32)
    for row, image in zip(enlarged, images, strict=True):
        row[:] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return enlarged.clip(0, INK)


def _box_average(images: np.ndarray) -> np.ndarray:
    """Mean over equal boxes, ``[N, s, s]`` → ``[N, 8, 8]``."""
    count, size, _ = images.shape
    box = size // SIDE
    return images.reshape(count, SIDE, box, SIDE, box).mean(axis=(2, 4))
