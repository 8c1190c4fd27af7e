"""The embedded digits as a folder of images per class, for tests of what reads images."""

import numpy as np
from PIL import Image

from paddle_dit.data.digits import DIGIT_NAMES, enlarge, load_digits

SIZE = 32  # pixels; the digits' VAE makes latents [4, 8, 8] of them
VAE = "data/digits_vae"


def write_digit_images(folder, count=64):
    """Write the first ``count`` digits for training as PNGs, ``<class>-<name>/<number>.png``; return the folder."""
    images, labels = (part[:count] for part in load_digits("train"))
    pixels = np.rint((enlarge(images, SIZE) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = folder / f"{label}-{DIGIT_NAMES[label]}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
