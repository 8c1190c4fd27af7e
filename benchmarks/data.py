"""Reading speed of latents: the packed store beside npy pairs, in one process, shuffled, as training reads them.

python benchmarks/data.py

Synthetic latents of ImageNet 256's shape (4x32x32) in a temporary folder that the page cache holds; so this is the cost
of our code, not of a disk.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit import cli
from paddle_dit.data.loader import BatchLoader
from paddle_dit.data.order import SampleOrder
from paddle_dit.data.source import LatentSource, open_source
from paddle_dit.data.store import StoreWriter
from paddle_dit.errors import entry_point

SHAPE = (4, 32, 32)
NUM_CLASSES = 1000


@dataclass
class Benchmark:
    """What to measure."""

    packed_samples: int = 20_000
    """Samples in the packed store (8 KiB each)."""
    pair_samples: int = 2_000
    """Samples in the npy pairs (two files each)."""
    batch_size: int = 256
    """Samples per batch."""
    repeats: int = 5
    """Epochs per row; the median is printed."""


def write_packed(folder: Path, count: int) -> LatentSource:
    """Write and open a packed float16 store of random latents."""
    rng = np.random.default_rng(0)
    with StoreWriter(folder, sample_shape=SHAPE, num_classes=NUM_CLASSES, source="random") as writer:
        for start in range(0, count, 1000):
            size = min(1000, count - start)
            writer.append(rng.standard_normal((size, *SHAPE), np.float32), rng.integers(0, NUM_CLASSES, size))
    return open_source(folder)


def write_pairs(folder: Path, count: int) -> LatentSource:
    """Write and open npy pairs of random float32 latents, as fast-DiT's extraction leaves them."""
    rng = np.random.default_rng(0)
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        np.save(folder / "imagenet256_features" / f"{i}.npy", rng.standard_normal((1, *SHAPE), np.float32))
        np.save(folder / "imagenet256_labels" / f"{i}.npy", rng.integers(0, NUM_CLASSES, 1))
    return open_source(folder, num_classes=NUM_CLASSES)


def latents_per_second(source: LatentSource, batch_size: int, num_workers: int, repeats: int) -> float:
    """Return the median speed over ``repeats`` epochs, after one that warms the cache."""
    order = SampleOrder(len(source), min(batch_size, len(source)), seed=0)
    speeds = []
    with BatchLoader(source, order, num_workers=num_workers) as loader:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for _ in range(order.steps_per_epoch):
                next(loader)
            speeds.append(order.steps_per_epoch * order.global_batch_size / (time.perf_counter() - start))
    return float(np.median(speeds[1:]))


@entry_point
def main() -> None:
    """Print one row per source and number of workers; ratios are to npy pairs read in the caller's thread."""
    options = cli.parse(Benchmark, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder, "pairs"), options.pair_samples)
        packed = write_packed(Path(folder, "packed"), options.packed_samples)
        print(f"{'source':<14}{'workers':>8}{'latents/s':>12}{'ratio':>8}")
        base = None
        for name, source in (("npy pairs", pairs), ("packed store", packed)):
            for num_workers in (0, 1, 2):
                speed = latents_per_second(source, options.batch_size, num_workers, options.repeats)
                base = base or speed
                print(f"{name:<14}{num_workers:>8}{speed:>12,.0f}{speed / base:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
