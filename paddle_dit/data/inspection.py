"""What a data set is, said in lines for people: without Paddle, and from a sample of it where it is large."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from paddle_dit.data import npy_pairs
from paddle_dit.data.source import LatentSource, image_size_of, open_source
from paddle_dit.data.store import PackedStore
from paddle_dit.data.subset import spread

READ = 20_000  # latents that are read unless all are asked for
_BLOCK = 256
_LISTED = 5  # classes named at either end
_FAR = 1.5  # by this factor the latents' std may be off 1


class Statistics:
    """Least, largest, mean and standard deviation of each channel, and the labels, of the samples seen so far.

    Args:
        channels: of the samples.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.labels = np.zeros(0, np.int64)  # how often each class occurs
        self.least, self.largest = np.full(channels, np.inf), np.full(channels, -np.inf)
        self._sums = np.zeros((3, channels))  # of values, of squares, of exponentials (for log-variances)
        self._pixels = 0

    def add(self, samples: np.ndarray, labels: np.ndarray) -> None:
        """Take in float ``samples [B,C,h,w]`` with ``labels [B]``."""
        values = samples.astype(np.float64)
        self.least = np.minimum(self.least, values.min(axis=(0, 2, 3)))
        self.largest = np.maximum(self.largest, values.max(axis=(0, 2, 3)))
        exponentials = np.exp(np.clip(values, -30, 20))  # the bounds that AutoencoderKL gives its log-variances
        self._sums += [part.sum(axis=(0, 2, 3)) for part in (values, values**2, exponentials)]
        self.count += len(samples)
        self._pixels += samples.shape[2] * samples.shape[3] * len(samples)
        counts = np.bincount(labels, minlength=len(self.labels))
        counts[: len(self.labels)] += self.labels
        self.labels = counts

    @property
    def mean(self) -> np.ndarray:
        """Of each channel, float64 ``[C]``."""
        return self._sums[0] / self._pixels

    @property
    def std(self) -> np.ndarray:
        """Of each channel, float64 ``[C]``."""
        return np.sqrt(np.maximum(self._sums[1] / self._pixels - self.mean**2, 0))

    def std_of_all(self, kind: str) -> float:
        """Return the standard deviation of all values of the latents; of moments, of the latents drawn from them."""
        means, squares, exponentials = self._sums / self._pixels
        if kind == "moments":
            half = len(means) // 2
            means, squares = means[:half], squares[:half] + exponentials[half:]
        return float(np.sqrt(max(squares.mean() - means.mean() ** 2, 0)))


class Inspection:
    """One look at a data set.

    Attributes:
        source: what was found there.
        total: samples that ``read`` will read.

    Args:
        folder: a packed store or npy pairs.
        read_all: read every sample, not at most :data:`READ` evenly spaced ones.

    Raises:
        DataError: there is neither, or it cannot be opened.
    """

    def __init__(self, folder: Path, read_all: bool = False):
        self.folder = folder
        self.source: LatentSource = open_source(folder)
        self._read = spread(self.source, len(self.source) if read_all else READ)
        self.total = len(self._read)
        self.statistics = Statistics(self.source.sample_shape[0])

    def read(self, advance: Callable[[int], object] = lambda amount: None) -> None:
        """Read the samples; DataError for one that is damaged."""
        for start in range(0, self.total, _BLOCK):
            numbers = np.arange(start, min(start + _BLOCK, self.total))
            self.statistics.add(*self._read.gather(numbers))
            advance(len(numbers))

    def lines(self) -> Iterator[str]:
        """Yield what is known of the data set once it has been read, a ``name  value`` line each."""
        rows = {**self._form(), **self._vae(), **self._classes()}
        width = max(map(len, rows))
        yield from (f"{name:<{width}}  {value}" for name, value in rows.items())
        yield f"values of {_of(self.total, len(self.source))}, by channel:"
        yield f"{'':>9}{'least':>11}{'largest':>11}{'mean':>11}{'std':>11}"
        found = self.statistics
        for number, values in enumerate(zip(found.least, found.largest, found.mean, found.std, strict=True)):
            yield f"{number:>9}" + "".join(f"{value:>11.4f}" for value in values)
        yield from self._scale()

    def _form(self) -> dict[str, str]:
        source, packed = self.source, isinstance(self.source, PackedStore)
        mirrored = ", each with its mirrored image's" if source.has_flip else ""
        rows = {
            "data": f"{'packed store' if packed else 'npy pairs'} in {self.folder}",
            "samples": f"{len(source):,} {source.kind}{mirrored}",
        }
        if packed:
            index = source.index
            entries = [*index["shards"], *index["flip_shards"]]
            size = sum(entry["bytes"] for entry in [*entries, index["labels"]])
            rows["files"] = f"{len(entries)} shards of up to {max(entry['length'] for entry in entries):,}"
            rows["made from"] = index["source"] or "not said"
            dtype = index["dtype"]
        else:
            features, labels = npy_pairs.find_pair(self.folder)
            dtype, size = _first_dtype(features), _size(features) + _size(labels)
        rows["stored as"] = f"{dtype} {list(source.sample_shape)}, of {image_size_of(source)}-pixel images"
        rows["size on disk"] = f"{size:,} bytes ({size / 2**30:.2f} GiB)"
        return rows

    def _vae(self) -> dict[str, str]:
        vae = self.source.vae or {}
        return {"VAE": vae.get("name") or "not said", "scaling factor": str(vae.get("scaling_factor", "not said"))}

    def _classes(self) -> dict[str, str]:
        source, counts = self.source, self.statistics.labels
        if source.labels is not None:
            counts = np.bincount(source.labels, minlength=source.num_classes)
        present = np.flatnonzero(counts)
        order = present[np.argsort(-counts[present], kind="stable")]
        of = "" if source.num_classes is None else f" of {source.num_classes:,}"
        seen = "" if source.labels is not None else f", in {_of(self.total, len(source))}"
        rows = {"classes": f"{len(present):,}{of} occur{seen}", "most often": self._named(order[:_LISTED], counts)}
        if len(order) > _LISTED:
            rows["most rarely"] = self._named(order[: -_LISTED - 1 : -1], counts)
        empty = np.setdiff1d(np.arange(source.num_classes or 0), present)
        if len(empty) and source.labels is not None:
            more = f" and {len(empty) - _LISTED:,} more" if len(empty) > _LISTED else ""
            rows["without samples"] = self._named(empty[:_LISTED], None) + more
        return rows

    def _named(self, classes: np.ndarray, counts: np.ndarray | None) -> str:
        names = self.source.label_names or {}
        short = [f"{number} {names.get(int(number), '').split(',')[0]}".rstrip() for number in classes]
        if counts is not None:
            short = [f"{name}: {counts[number]:,}" for name, number in zip(short, classes, strict=True)]
        return ", ".join(short)

    def _scale(self) -> Iterator[str]:
        """Compare the scaling factor on record with the one that brings the latents to a standard deviation of 1."""
        std = self.statistics.std_of_all(self.source.kind)
        recorded = (self.source.vae or {}).get("scaling_factor")
        scaled = self.source.kind == "latents"
        spoken = "the latents, scaled," if scaled else "the latents, not scaled yet,"
        implied = None if std == 0 or (scaled and recorded is None) else (recorded if scaled else 1.0) / std
        told = f"; a scaling factor of {implied:.5g} would make it 1" if implied else ""
        yield f"{spoken} have a std of {std:.4f}{told}" + (f", {recorded:.5g} is on record" if recorded else "")
        factor = 1.0 if scaled else recorded
        if factor is not None and not 1 / _FAR < std * factor < _FAR:
            yield (
                f"warning: scaled latents should have a std near 1, these have {std * factor:.4g}: see that the "
                "scaling factor was applied once, and is this VAE's"
            )


def _of(count: int, total: int) -> str:
    return f"all {total:,} samples" if count == total else f"{count:,} samples, evenly spaced"


def _first_dtype(features: Path) -> np.dtype:
    stem = npy_pairs.sort_stems(npy_pairs.list_stems(features)[0])[0]
    return npy_pairs.read_latent(f"{features / stem}.npy").dtype


def _size(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries)
