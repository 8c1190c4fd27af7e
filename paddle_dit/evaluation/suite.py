"""The whole suite: from images to FID, sFID, Inception Score, precision and recall, each with what it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paddle_dit.errors import DataError
from paddle_dit.evaluation.features import Features
from paddle_dit.evaluation.images import ArrayImages, FolderImages, Images, NpzImages, has_images
from paddle_dit.evaluation.measuring import MOST_NEIGHBOURS, Measured, Measuring, told
from paddle_dit.evaluation.metrics import NEIGHBOUR, InceptionScore, frechet_distance, precision_recall
from paddle_dit.evaluation.statistics import Statistics, has_statistics, read_statistics

_SAMPLES = 50_000  # of the published figures


@dataclass(frozen=True)
class EvaluationSet:
    """What is compared: images, statistics, or, as in the ADM suite's reference, statistics of more than its images.

    Attributes:
        name: of the file or folder.
        images: None for statistics alone.
        statistics: None where they are to be computed.
    """

    name: str
    images: Images | None = None
    statistics: Statistics | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of an image, None where that is unknown."""
        stored = self.statistics.about.get("image_shape") if self.statistics else None
        return self.images.shape if self.images is not None else tuple(stored) if stored else None


def open_set(path: str | Path, crop: int | None = None) -> EvaluationSet:
    """Open a folder of images or an ``.npz`` with images, statistics, or both; nothing is read yet but the heads.

    Args:
        path: the folder or file.
        crop: of a folder, as for :class:`~paddle_dit.evaluation.images.FolderImages`; a file is taken as it is.

    Raises:
        DataError: it is missing, damaged, or holds neither.
    """
    path = Path(path)
    if path.is_dir():
        return EvaluationSet(path.name or str(path), FolderImages(path, crop))
    if not path.is_file():
        raise DataError(f"there is no {path}; give a folder of images or an .npz")
    if path.suffix != ".npz":
        raise DataError(f"cannot read {path}; give a folder of images or an .npz")
    statistics = read_statistics(path) if has_statistics(path) else None
    images = NpzImages(path) if statistics is None or has_images(path) else None
    return EvaluationSet(path.name, images, statistics)


def check(found: EvaluationSet, features: Features, other: EvaluationSet | None = None) -> None:
    """Find out before anything is computed whether a set can be evaluated, and compared with another.

    Raises:
        DataError: the features cannot be taken of its images, its statistics are of other features, or the images of
            the other set have another size.
    """
    if found.images is not None:
        features.check(found.images.shape, found.name)
    if found.statistics is not None:
        found.statistics.check(features.sizes, features.about, found.name)
    if other:
        check_sizes(found.name, found.shape, other, features)


def check_sizes(name: str, shape: tuple[int, ...] | None, other: EvaluationSet, features: Features) -> None:
    """Raise DataError where images called ``name``, of such a shape, have another size than those of ``other``."""
    if shape and other.shape and shape != other.shape and not features.any_size:
        sizes = " and ".join(f"{one[1]} x {one[0]}" for one in (shape, other.shape))
        raise DataError(f"{name} and {other.name} have images of {sizes} pixels; compare images of one size")


def measure(
    found: EvaluationSet,
    features: Features,
    *,
    batch_size: int | None = None,
    neighbours: int = MOST_NEIGHBOURS,
    score: bool = True,
    report: Callable[[int], None] = lambda count: None,
) -> Measured:
    """Compute the features of all images of a set, and what can be said of it alone.

    Memory does not depend on the number of images, but for the pool features of ``neighbours`` of them.

    Args:
        found: from :func:`open_set`.
        features: of which network.
        batch_size: images at once; the network's own choice by default.
        neighbours: images, evenly spread, whose features are kept for precision and recall; 0 for none.
        score: whether the Inception Score is wanted. Without it and neighbours, images with stored statistics are not
            read at all.
        report: is told after each batch how many images it had.

    Raises:
        DataError: the images are damaged, or too few.
    """
    check(found, features)
    if found.images is None or (found.statistics is not None and not neighbours and not score):
        pool = None if found.images is None else np.empty((0, features.sizes[0]), np.float32)
        return Measured(found.statistics, pool, None, told(found.statistics) | {"name": found.name})
    images, measuring = found.images, Measuring(found.name, len(found.images), features, neighbours, found.statistics)
    for batch in images.batches(batch_size or features.batch_size):
        measuring.add(batch)
        report(len(batch))
    return measuring.result(images.kind, images.sha256, images.warnings, score)


@dataclass(frozen=True)
class Figure:
    """One figure: its name for people, the number, and what it is of."""

    name: str
    value: float
    meaning: str


@dataclass
class Evaluation:
    """What :func:`compare` found.

    Attributes:
        figures: by their keys in ``metrics.json``: fid, sfid, inception_score, precision, recall, as far as they can be
            computed.
        warnings: one line each.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def values(self) -> dict[str, float]:
        """Return the numbers alone."""
        return {key: figure.value for key, figure in self.figures.items()}


def compare(
    samples: Measured,
    reference: Measured | None,
    features: Features,
    report: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Compute all figures that samples and, unless it is None, a reference allow.

    Args:
        samples: from :func:`measure`.
        reference: likewise.
        features: that both are of.
        report: is called every few seconds.
    """
    found = Evaluation(warnings=[*samples.warnings, *(reference.warnings if reference else [])])
    if reference is not None:
        _distances(found, samples, reference, features, report)
    if samples.score is not None:
        count = samples.record["count"]
        splits = InceptionScore(count).splits
        each = f"{splits} splits of {count // splits:,}{' or one more' if count % splits else ''}"
        meaning = f"mean over {each}, deviation {samples.score[1]:.2f}; logits without the last layer's bias"
        found.figures["inception_score"] = Figure("Inception Score", samples.score[0], meaning)
    if reference is not None:
        _neighbours(found, samples, reference, report)
    _warn(found, samples, reference, features)
    return found


def _counted(measured: Measured) -> str:
    """Return whose statistics they are."""
    count = measured.statistics.about.get("count")
    return f"{count:,}" if count else "an unknown number"


def _distances(
    found: Evaluation, samples: Measured, reference: Measured, features: Features, report: Callable[[], object]
) -> None:
    ours, theirs = samples.statistics, reference.statistics
    counts = f"{_counted(samples)} samples to {_counted(reference)} of the reference"
    count = ours.about.get("count", 0)
    short = f"-{count // 1000}K" if count and count % 1000 == 0 else f"-{count:,}" if count else ""
    value = frechet_distance(ours.mu, ours.sigma, theirs.mu, theirs.sigma, report)
    found.figures["fid"] = Figure(f"FID{short}", value, f"{features.sizes[0]} pool features, {counts}")
    if ours.mu_s is None or theirs.mu_s is None:
        found.warnings.append("no sFID: the stored statistics have no spatial features (mu_s, sigma_s)")
        return
    value = frechet_distance(ours.mu_s, ours.sigma_s, theirs.mu_s, theirs.sigma_s, report)
    found.figures["sfid"] = Figure(f"sFID{short}", value, f"{features.sizes[1]} spatial features, {counts}")


def _neighbours(found: Evaluation, samples: Measured, reference: Measured, report: Callable[[], object]) -> None:
    missing = [side.record["name"] for side in (samples, reference) if side.pool is None]
    if missing:
        found.warnings.append(f"no precision and recall: they need images, and {missing[0]} gives statistics alone")
        return
    if not len(samples.pool) or not len(reference.pool):  # none were wanted
        return
    if min(len(samples.pool), len(reference.pool)) <= NEIGHBOUR:
        found.warnings.append(f"no precision and recall: they need more than {NEIGHBOUR} images on both sides")
        return
    precision, recall = precision_recall(reference.pool, samples.pool, report=report)
    counts = f"{len(samples.pool):,} samples, {len(reference.pool):,} of the reference, k = {NEIGHBOUR}, pool features"
    found.figures["precision"] = Figure("precision", precision, counts)
    found.figures["recall"] = Figure("recall", recall, counts)


def too_few(count: int | None, features: Features, what: str = "samples") -> list[str]:
    """Return a warning of images that are fewer than their features; none where their number is unknown."""
    largest = max(features.sizes)
    if not count or count > largest:
        return []
    singular = "their covariance is singular, and FID or sFID is hardly more than a guess"
    return [f"{count:,} {what} are fewer than the {largest:,} features: {singular}"]


def _warn(found: Evaluation, samples: Measured, reference: Measured | None, features: Features) -> None:
    count = samples.record.get("count")
    if count and count < features.few:
        found.warnings.append(
            f"{count:,} samples are few: FID and sFID come out larger, the Inception Score smaller than of "
            f"{_SAMPLES:,}; compare them with figures of the same count alone"
        )
    for measured, what in ((samples, "samples"), (reference, "images of the reference")):
        found.warnings += too_few(measured.statistics.about.get("count"), features, what) if measured else []
    if reference is not None and samples.record["sha256"] == reference.record["sha256"]:
        found.warnings.append("samples and reference are the same")


def evaluate_arrays(samples: np.ndarray, reference: np.ndarray, features: Features) -> dict[str, float]:
    """Return the figures of images in memory, uint8 ``[N, H, W, 3]`` (or what the features take), by their keys."""
    sides = [
        EvaluationSet(name, ArrayImages(array, name)) for name, array in (("samples", samples), ("real", reference))
    ]
    return compare(*(measure(side, features) for side in sides), features).values()
