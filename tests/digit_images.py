"""The embedded digits as a folder of images per class, for tests of what reads images."""

import numpy as np
from PIL import Image

from paddle_dit.data.digits import DIGIT_NAMES, enlarge, load_digits

SIZE = 32  # pixels; the digits' VAE makes latents [4, 8, 8] of them
VAE = "data/digits_vae"


def write_digit_images(folder, count=64, numbered=True):
    """Write the first ``count`` digits for training as PNGs and return the folder.

    Their folders are named ``<digit>-<name>``, so that class ids are the digits, or, not numbered, ``<name>``.
    """
    images, labels = (part[:count] for part in load_digits("train"))
    pixels = np.rint((enlarge(images, SIZE) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        name = DIGIT_NAMES[int(label)]
        path = folder / (f"{label}-{name}" if numbered else name) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
