"""What a data set is, said in lines for people: without Paddle, and from a sample of it where it is large."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from paddle_dit.data import npy_pairs
from paddle_dit.data.images import find_images, holds_images, look_at
from paddle_dit.data.shards import PLAN
from paddle_dit.data.source import LatentSource, image_size_of, open_source
from paddle_dit.data.store import PackedStore
from paddle_dit.data.store_index import INDEX, plain_name
from paddle_dit.data.subset import spread
from paddle_dit.errors import DataError

READ = 20_000  # latents that are read unless all are asked for
OPENED = 200  # images, likewise
_BLOCK = 256
_LISTED = 5  # classes named at either end
_SHOWN = 16  # characters of a sha256
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
    """One look at latents.

    Attributes:
        source: what was found there.
        total: samples that ``read`` will read, in ``unit``.

    Args:
        folder: a packed store or npy pairs.
        read_all: read every sample, not at most :data:`READ` evenly spaced ones.

    Raises:
        DataError: there is neither, or it cannot be opened.
    """

    unit = " latents"

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
        yield from _aligned({**self._form(), **self._vae(), **self._classes()})
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
            rows |= _extraction(index)
            dtype = index["dtype"]
        else:
            features, labels = npy_pairs.find_pair(self.folder)
            dtype, size = _first_dtype(features), _size(features) + _size(labels)
        rows["stored as"] = f"{dtype} {list(source.sample_shape)}, of {image_size_of(source)}-pixel images"
        rows["size on disk"] = _in_words(size)
        return rows

    def _vae(self) -> dict[str, str]:
        vae, name = self.source.vae or {}, "not said"
        if vae.get("name"):
            weights = (
                self.source.index.get("extraction", {}).get("vae") if isinstance(self.source, PackedStore) else None
            )
            name = vae["name"] + (f", weights {str(weights)[:_SHOWN]}…" if weights else "")
        return {"VAE": name, "scaling factor": str(vae.get("scaling_factor", "not said"))}

    def _classes(self) -> dict[str, str]:
        source, counts = self.source, self.statistics.labels
        if source.labels is not None:
            counts = np.bincount(source.labels, minlength=source.num_classes)
        seen = "" if source.labels is not None else f", in {_of(self.total, len(source))}"
        return _class_rows(counts, source.label_names or {}, source.num_classes, seen)

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


class ImageInspection:
    """One look at a folder of images; their sizes and modes are read, not their pixels.

    Attributes:
        source: None: there are no latents.
        total: images that ``read`` will look at, in ``unit``.

    Args:
        folder: as for :func:`paddle_dit.data.images.find_images`.
        read_all: open every image, not at most :data:`OPENED` evenly spaced ones.

    Raises:
        DataError: the images cannot be listed.
    """

    source, unit = None, " images"

    def __init__(self, folder: Path, read_all: bool = False):
        self._told: list[str] = []
        self._images = find_images(folder, self._told.append)
        self.total = len(self._images)
        self._step = 1 if read_all else -(-self.total // OPENED)
        self._bytes, self._kinds, self._modes = 0, Counter(), Counter()
        self._sizes: list[tuple[int, int]] = []
        self._broken: list[str] = []

    def read(self, advance: Callable[[int], object] = lambda amount: None) -> None:
        """Ask for the size of every file, and open some."""
        for number in range(self.total):
            path = self._images.file(number)
            self._kinds[os.path.splitext(path)[1].lower()] += 1
            try:
                self._bytes += os.stat(path).st_size
                if number % self._step == 0:
                    size, mode = look_at(path)
                    self._sizes.append(size)
                    self._modes[mode] += 1
            except (OSError, DataError):
                self._broken.append(plain_name(self._images.paths[number]))
            advance(1)

    def lines(self) -> Iterator[str]:
        """Yield what is known of the images once they have been looked at, a ``name  value`` line each."""
        images = self._images
        ignored = f", and {images.ignored:,} other files" if images.ignored else ""
        how = "a folder per class" if images.class_folders else "classes in labels.csv"
        rows = {
            "data": f"images in {images.root}, {how}",
            "images": f"{len(images):,} ({_counted(self._kinds)}){ignored}",
            "size on disk": _in_words(self._bytes),
        }
        if self._sizes:
            ranges = [f"{min(side):,} to {max(side):,}" for side in zip(*self._sizes, strict=True)]
            spaced = ", evenly spaced" if self._step > 1 else ""
            rows["pixels"] = f"{ranges[0]} wide, {ranges[1]} high, of {len(self._sizes):,} images{spaced}"
            rows["modes"] = _counted(self._modes)
        if self._broken:
            rows["broken"] = f"{len(self._broken):,} cannot be opened: {_first(self._broken)}"
        counts = np.bincount(images.labels, minlength=images.num_classes)
        yield from _aligned({**rows, **_class_rows(counts, images.label_names, images.num_classes)})
        yield from self._told


def inspect(folder: Path, read_all: bool = False) -> Inspection | ImageInspection:
    """Return the inspection of what a folder holds: a packed store, npy pairs or images.

    Raises:
        DataError: there is nothing of these, or it cannot be opened.
    """
    if folder.is_dir() and not (folder / INDEX).exists() and not (folder / PLAN).exists():
        pairs = any(path.name.endswith("features") and path.is_dir() for path in folder.iterdir())
        if not pairs and holds_images(folder):
            return ImageInspection(folder, read_all)
    return Inspection(folder, read_all)


def _aligned(rows: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, rows))
    yield from (f"{name:<{width}}  {value}" for name, value in rows.items())


def _extraction(index: Mapping) -> dict[str, str]:
    """Say how the images were encoded and which of them were left out, where the index knows."""
    rows = {}
    if known := index.get("extraction"):
        told = {"images": f"paths and labels {str(known.get('images'))[:_SHOWN]}…"}
        rest = {name: value for name, value in known.items() if name not in ("images", "vae")}
        rows["extraction"] = ", ".join([*(f"{name.replace('_', ' ')} {rest[name]}" for name in rest), *told.values()])
    if skipped := index.get("skipped"):
        rows["skipped"] = f"{len(skipped):,} that could not be read: {_first(skipped)}"
    return rows


def _class_rows(
    counts: np.ndarray, names: Mapping[int, str], num_classes: int | None, seen: str = ""
) -> dict[str, str]:
    """Say which classes occur how often; ``seen`` tells where, unless all labels are known."""
    present = np.flatnonzero(counts)
    order = present[np.argsort(-counts[present], kind="stable")]
    of = "" if num_classes is None else f" of {num_classes:,}"
    rows = {"classes": f"{len(present):,}{of} occur{seen}", "most often": _named(order[:_LISTED], names, counts)}
    if len(order) > _LISTED:
        rows["most rarely"] = _named(order[: -_LISTED - 1 : -1], names, counts)
    empty = np.setdiff1d(np.arange(num_classes or 0), present)
    if len(empty) and not seen:
        more = f" and {len(empty) - _LISTED:,} more" if len(empty) > _LISTED else ""
        rows["without samples"] = _named(empty[:_LISTED], names) + more
    return rows


def _named(classes: np.ndarray, names: Mapping[int, str], counts: np.ndarray | None = None) -> str:
    short = [f"{number} {names.get(int(number), '').split(',')[0]}".rstrip() for number in classes]
    if counts is not None:
        short = [f"{name}: {counts[number]:,}" for name, number in zip(short, classes, strict=True)]
    return ", ".join(short)


def _counted(counts: Counter) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.most_common())


def _first(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")


def _in_words(size: int) -> str:
    return f"{size:,} bytes ({size / 2**30:.2f} GiB)"


def _of(count: int, total: int) -> str:
    return f"all {total:,} samples" if count == total else f"{count:,} samples, evenly spaced"


def _first_dtype(features: Path) -> np.dtype:
    stem = npy_pairs.sort_stems(npy_pairs.list_stems(features)[0])[0]
    return npy_pairs.read_latent(f"{features / stem}.npy").dtype


def _size(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries)
