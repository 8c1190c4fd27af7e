"""Images encoded per second by one process, and the share of time that the VAE waits for images.

    python benchmarks/extraction.py

Real runs of the extraction on the CPU, one thread, as scripts/extract_features.py makes them: the embedded digits at
32 pixels with their own VAE, which is so small that reading can hardly keep up, and photographs' size (JPEG, 500 x 375)
at 256 pixels with a random VAE of Stable Diffusion's shape and a few channels, a small part of its cost. Waiting
should be below 5 %; readers need cores of their own for that, so measure on an idle machine of two cores or more.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.data.digits import DIGIT_NAMES, DIGITS_VAE_FOLDER, enlarge, load_digits
from paddle_dit.errors import entry_point
from paddle_dit.extraction.options import THREADS, ExtractionOptions


@dataclass
class Options:
    """What to measure."""

    digits: int = 1497
    """Digits to encode, 1,497 at most."""
    photos: int = 96
    """Images of photographs' size to encode."""
    channels: tuple[int, ...] = (16, 32, 32, 32)
    """Channels of the random VAE's levels; Stable Diffusion's are 128 256 512 512."""
    num_workers: int = 1
    """Processes that read images."""
    batch_size: int = 32
    """Images that are encoded at once."""
    rounds: int = 3
    """Runs of each; the medians are printed."""


def write_digits(folder: Path, count: int) -> None:
    """Write digits of 32 pixels as PNG files."""
    digits, labels = load_digits("train")
    pixels = np.round((enlarge(digits[:count], 32) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    _write(folder, pixels, [DIGIT_NAMES[label] for label in labels[:count].tolist()], "png")


def write_photos(folder: Path, count: int) -> None:
    """Write smooth random pictures, which take JPEG about as long as photographs do."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (count, 50, 67, 3), dtype=np.uint8)
    pixels = [np.asarray(Image.fromarray(picture).resize((500, 375), Image.Resampling.BICUBIC)) for picture in small]
    _write(folder, pixels, [str(number % 4) for number in range(count)], "jpg")


def _write(folder: Path, pixels, classes: list[str], extension: str) -> None:
    for number, (picture, name) in enumerate(zip(pixels, classes, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name / f"{number:05d}.{extension}")


def write_random_vae(folder: Path, channels: tuple[int, ...]) -> None:
    """Write an AutoencoderKL of Stable Diffusion's shape with random weights."""
    import paddle
    from ppdiffusers import AutoencoderKL

    paddle.seed(0)
    levels = len(channels)
    AutoencoderKL(
        block_out_channels=list(channels),
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=4,
    ).save_pretrained(str(folder))


def measure(options: ExtractionOptions, rounds: int) -> tuple[float, float]:
    """Return the medians of images/s and of the share of time spent waiting."""
    from paddle_dit.extraction.job import Extraction

    rates, waits = [], []
    for number in range(rounds):
        arguments = {**vars(options), "features_path": options.features_path / str(number)}
        with Extraction(ExtractionOptions(**arguments), report=lambda line: None) as job:
            job.begin()
            job.run()
        rates.append(job.total / job.seconds)
        waits.append(job.waited / job.seconds)
    return statistics.median(rates), statistics.median(waits)


@entry_point
def main() -> None:
    """Write images, encode them, print."""
    options = parse(Options, description=__doc__)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    runtime.prepare()
    print(f"{'':<34} {'images/s':>9} {'waiting':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_vae(folder / "vae", options.channels)
        cases: dict[str, tuple[Callable[[Path, int], None], int, int, Path]] = {
            "digits, 32 pixels, their VAE": (write_digits, options.digits, 32, DIGITS_VAE_FOLDER),
            "500 x 375 JPEG, 256 pixels": (write_photos, options.photos, 256, folder / "vae"),
        }
        for place, (title, (write, count, size, vae)) in enumerate(cases.items()):
            images = folder / f"images-{place}"
            write(images, count)
            asked = ExtractionOptions(
                images,
                folder / f"store-{place}",
                vae=str(vae),
                image_size=size,
                num_workers=options.num_workers,
                batch_size=options.batch_size,
            )
            rate, waiting = measure(asked, options.rounds)
            print(f"{title:<34} {rate:>9,.1f} {waiting:>9.1%}", flush=True)


if __name__ == "__main__":
    main()
