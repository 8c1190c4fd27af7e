"""Reading speed of latents: the packed store beside npy pairs, shuffled, as training reads them; start-up and memory.

python benchmarks/data.py

Synthetic latents of ImageNet 256's shape (4x32x32) in a temporary folder (TMPDIR). Warm rows read what the page cache
holds: the cost of our code, not of a disk. Cold rows read what the kernel was asked to forget before; they say
something where TMPDIR is on a disk. Start-up and memory are of a process of its own on a sparse store that takes no
space; "own" memory is what the process allocated, "mapped" are pages of the files, which the kernel may take back.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit import cli
from paddle_dit.data.loader import BatchLoader
from paddle_dit.data.order import SampleOrder
from paddle_dit.data.source import LatentSource, open_source
from paddle_dit.data.store import StoreWriter
from paddle_dit.data.store_index import first_sample, new_index, shard_files, write_index
from paddle_dit.errors import entry_point
from paddle_dit.files import flush_to_disk

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
    """Epochs per warm row; the median is printed. A cold row is one epoch."""
    sizes: tuple[int, ...] = (10_000, 1_281_167)
    """Samples of the sparse stores whose start-up and memory are measured; the second is ImageNet's."""
    measure: Path | None = None
    """Measure the start-up and memory of reading this store in this process, and print them as JSON."""


def write_packed(folder: Path, count: int) -> None:
    """Write a packed float16 store of random latents."""
    rng = np.random.default_rng(0)
    with StoreWriter(folder, sample_shape=SHAPE, num_classes=NUM_CLASSES, source="random") as writer:
        for start in range(0, count, 1000):
            size = min(1000, count - start)
            writer.append(rng.standard_normal((size, *SHAPE), np.float32), rng.integers(0, NUM_CLASSES, size))


def write_pairs(folder: Path, count: int) -> None:
    """Write npy pairs of random float32 latents, as fast-DiT's extraction leaves them."""
    rng = np.random.default_rng(0)
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        np.save(folder / "imagenet256_features" / f"{i}.npy", rng.standard_normal((1, *SHAPE), np.float32))
        np.save(folder / "imagenet256_labels" / f"{i}.npy", rng.integers(0, NUM_CLASSES, 1))


def write_sparse(folder: Path, count: int, shard_size: int = 16_384) -> None:
    """Write a packed store of zeros that the file system need not keep."""
    folder.mkdir()
    index = new_index(sample_shape=SHAPE, num_classes=NUM_CLASSES, source="zeros")
    for number in range(-(-count // shard_size)):
        length = min(shard_size, count - number * shard_size)
        path = folder / shard_files(index, number)["shards"]
        zeros = np.lib.format.open_memmap(path, "w+", np.float16, (length, *SHAPE))
        entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": "0" * 64}
        entry["first_sample"] = first_sample(zeros)
        index["shards"].append({"length": length, **entry})
    write_index(folder, index, np.arange(count) % NUM_CLASSES)


def forget(folder: Path) -> None:
    """Ask the kernel to drop a folder's files from its cache; they must not be mapped any more."""
    for path in folder.rglob("*.npy"):
        flush_to_disk(path)  # only what is on the disk can be dropped
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def latents_per_second(
    opened: Callable[[], LatentSource], batch_size: int, num_workers: int, repeats: int
) -> tuple[float, float]:
    """Return the speed of a first epoch, and the median of ``repeats`` more."""
    source = opened()
    order = SampleOrder(len(source), min(batch_size, len(source)), seed=0)
    speeds = []
    with BatchLoader(source, order, num_workers=num_workers) as loader:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for _ in range(order.steps_per_epoch):
                next(loader)
            speeds.append(order.steps_per_epoch * order.global_batch_size / (time.perf_counter() - start))
    return speeds[0], float(np.median(speeds[1:]))


def measure(folder: Path, batch_size: int) -> dict:
    """Return the seconds to open a store and to shuffle an epoch, and the memory after ten batches, in MiB."""
    start = time.perf_counter()
    source = open_source(folder)
    opened = time.perf_counter()
    order = SampleOrder(len(source), batch_size, seed=0)
    order.global_batch(0)
    shuffled = time.perf_counter()
    for step in range(10):
        source.gather(order.global_batch(step))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
    return {"open": opened - start, "shuffle": shuffled - opened, "own": own, "mapped": mapped}


def print_speeds(options: Benchmark, folder: Path) -> None:
    """Print one row per source and number of workers; ratios are to npy pairs read in the caller's thread, warm."""
    write_pairs(folder / "pairs", options.pair_samples)
    write_packed(folder / "packed", options.packed_samples)
    print(f"{'source':<14}{'workers':>8}{'cold latents/s':>17}{'warm latents/s':>17}{'ratio':>8}")
    base = None
    for name, path in (("npy pairs", folder / "pairs"), ("packed store", folder / "packed")):
        for num_workers in (0, 1, 2):
            gc.collect()  # what is mapped stays in the cache
            forget(path)
            cold, warm = latents_per_second(
                lambda path=path: open_source(path, num_classes=NUM_CLASSES),
                options.batch_size,
                num_workers,
                options.repeats,
            )
            base = base or warm
            print(f"{name:<14}{num_workers:>8}{cold:>17,.0f}{warm:>17,.0f}{warm / base:>8.1f}", flush=True)


def print_sizes(options: Benchmark, folder: Path) -> None:
    """Print one row per size of a packed store, each measured in a process of its own."""
    print(f"\n{'samples':>11}{'open, s':>10}{'shuffle, s':>12}{'own, MiB':>10}{'mapped, MiB':>13}")
    for count in options.sizes:
        write_sparse(folder / str(count), count)
        command = [sys.executable, __file__, "--measure", str(folder / str(count))]
        command += ["--batch-size", str(options.batch_size)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"{count:>11,}{found['open']:>10.3f}{found['shuffle']:>12.3f}{found['own']:>10.0f}{found['mapped']:>13.0f}",
            flush=True,
        )


@entry_point
def main() -> None:
    """Print two tables."""
    options = cli.parse(Benchmark, description=__doc__)
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.batch_size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print_speeds(options, Path(folder))
        print_sizes(options, Path(folder))


if __name__ == "__main__":
    main()
