"""What the images of one set come to: statistics of their features, and whatever else a comparison needs of them."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from paddle_dit.evaluation.features import Features
from paddle_dit.evaluation.metrics import InceptionScore, Moments
from paddle_dit.evaluation.statistics import Statistics

MOST_NEIGHBOURS = 50_000  # images of a side in precision and recall; of more, as many are taken, evenly spread


@dataclass
class Measured:
    """What a set's images came to.

    Attributes:
        statistics: of the features, stored or computed.
        pool: float32 ``[N, D]``, of the images that precision and recall take; None where there are no images.
        score: the Inception Score and its standard deviation, None where there are no images.
        record: what the set is, for people and for the JSON.
        warnings: what is odd about the images.
    """

    statistics: Statistics
    pool: np.ndarray | None
    score: tuple[float, float] | None
    record: dict
    warnings: list[str] = field(default_factory=list)


class Measuring:
    """Takes the images of a set in order, batch by batch, and says at the end what they came to.

    Memory does not depend on the number of images, but for the pool features that are kept.

    Args:
        name: of the set.
        count: images that will come.
        features: of which network.
        neighbours: images, evenly spread, whose pool features are kept; 0 for none.
        stored: the set's statistics, where they need not be computed.
    """

    def __init__(
        self,
        name: str,
        count: int,
        features: Features,
        neighbours: int = MOST_NEIGHBOURS,
        stored: Statistics | None = None,
    ):
        self._name, self._features, self._stored = name, features, stored
        self._watch, self._logits = _Watch(), InceptionScore(count)
        self._moments = [Moments(size) for size in features.sizes] if stored is None else []
        self._kept = np.unique(np.linspace(0, count - 1, min(neighbours, count)).astype(np.int64))
        self._pool = np.empty((len(self._kept), features.sizes[0]), np.float32)

    def add(self, images: np.ndarray) -> None:
        """Take the next images, uint8 ``[N, *shape]``; all go through the network at once."""
        start, values = self._watch.look(images), self._features(images)
        for moment, rows in zip(self._moments, values[:2], strict=False):
            moment.add(rows)
        self._logits.add(values.logits)
        first, last = np.searchsorted(self._kept, [start, start + len(images)])
        self._pool[first:last] = values.pool[self._kept[first:last] - start]

    def result(
        self, kind: str, sha256: str | None = None, warnings: Iterable[str] = (), score: bool = True
    ) -> Measured:
        """Return what all images came to.

        Args:
            kind: where they came from, for the record.
            sha256: of the file that they came from; by default that of their pixels.
            warnings: what is odd about them besides.
            score: whether the Inception Score is wanted.

        Raises:
            DataError: they were too few.
        """
        watch, about = self._watch, {"name": self._name}
        about |= {"kind": kind, "count": watch.count, "image_shape": list(watch.shape)}
        about["sha256"] = sha256 or watch.sha256
        statistics = self._stored or _statistics(self._moments, self._features, about)
        if self._stored is not None:
            about["statistics"] = told(statistics)
        found = self._logits.result() if score else None
        return Measured(statistics, self._pool, found, about, [*warnings, *watch.warnings(self._name)])


def told(statistics: Statistics) -> dict:
    """Return what stored statistics are, for the record."""
    return {**statistics.about, "kind": "stored statistics", "sha256": statistics.sha256}


def _statistics(moments: list[Moments], features: Features, record: dict) -> Statistics:
    about = {"count": record["count"], "image_shape": record["image_shape"], "features": features.about}
    (mu, sigma), (mu_s, sigma_s) = (moment.result() for moment in moments)
    return Statistics(mu, sigma, mu_s, sigma_s, {**about, "source": record["name"], "source_sha256": record["sha256"]})


class _Watch:
    """Looks at images that pass by."""

    def __init__(self):
        self._digest, self._first, self.count = hashlib.sha256(), None, 0
        self._plain, self._alike = 0, 0

    def look(self, batch: np.ndarray) -> int:
        """Look at a batch, and return the index of its first image."""
        start, self.count = self.count, self.count + len(batch)
        self._first = batch[0].copy() if self._first is None else self._first
        self._digest.update(np.ascontiguousarray(batch).data)
        flat = batch.reshape(len(batch), -1, batch.shape[-1] if batch.ndim == 4 else 1)
        self._plain += int((flat == flat[:, :1]).all(axis=(1, 2)).sum())
        self._alike += int((batch == self._first).reshape(len(batch), -1).all(axis=1).sum())
        return start

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image."""
        return self._first.shape

    @property
    def sha256(self) -> str:
        """Of the pixels, in order."""
        return self._digest.hexdigest()

    def warnings(self, name: str) -> list[str]:
        if self._alike == self.count > 1:
            return [f"all {self.count:,} images of {name} are the same"]
        if self._plain:
            return [f"{self._plain:,} of the {self.count:,} images of {name} are of one colour throughout"]
        return []
