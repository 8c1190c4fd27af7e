"""FID, sFID, Inception Score, precision and recall, of features that come in batches; NumPy, with Paddle for distances.

The definitions are those of the ADM suite (Dhariwal & Nichol 2021), whose figures the papers print; but the Inception
Score is over ten splits of any number of images, where that suite's have 5,000 each, which at 50,000 is the same.
Nothing here knows which network made the features.
"""

import math
from collections.abc import Callable

import numpy as np

from paddle_dit.errors import DataError

SPLITS = 10  # of the Inception Score: 5,000 images each of the usual 50,000
NEIGHBOUR = 3  # whose distance is the radius of a ball around a feature, in precision and recall
_ROWS = 1024  # gathered before the covariance is updated, which costs the same for one
_BLOCK = 4096  # distances at once, on both sides
_ROUNDING = 4e-6  # of a squared distance, relative to the squared length of a point


class Moments:
    """Mean and covariance of rows that come in batches, in float64.

    The deviations from the mean are merged as they come (Chan, Golub and LeVeque 1979), so that nothing cancels,
    however far from zero the mean is. Takes 8 x features² bytes, however many rows there are.

    Args:
        features: columns of a row.
    """

    def __init__(self, features: int):
        self.count = 0
        self._mean, self._squares = np.zeros(features), np.zeros((features, features))
        self._waiting: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Take rows, ``[N, features]``."""
        if len(rows):
            self._waiting.append(np.array(rows, np.float64))
        if sum(map(len, self._waiting)) >= _ROWS:
            self._merge()

    def _merge(self) -> None:
        rows = np.concatenate(self._waiting)
        self._waiting = []
        mean, total = rows.mean(axis=0), self.count + len(rows)
        shift = mean - self._mean
        # The shift between the two means counts like one row more.
        rows = np.concatenate([rows - mean, math.sqrt(self.count * len(rows) / total) * shift[None]])
        self._squares += rows.T @ rows
        self._mean += shift * (len(rows) - 1) / total
        self.count = total

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean ``[features]`` and the unbiased covariance ``[features, features]``, float64.

        Raises:
            DataError: fewer than two rows have none.
        """
        if self._waiting:
            self._merge()
        if self.count < 2:
            raise DataError(f"{self.count} images have no covariance; give two or more")
        return self._mean.copy(), self._squares / (self.count - 1)


def frechet_distance(
    mean: np.ndarray,
    covariance: np.ndarray,
    other_mean: np.ndarray,
    other_covariance: np.ndarray,
    report: Callable[[], object] = lambda: None,
) -> float:
    """Return the squared Fréchet distance between two normal distributions, which FID and sFID are.

    ``|m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1 C2)^½)``. The last trace is the sum of the square roots of the eigenvalues
    of the symmetric ``√C1 C2 √C1``, and these are the singular values of ``√C1 √C2``: found as such they are exact to
    float64 even where a covariance is singular, and cannot become complex. Rounding errors around zero count as zero.

    Args:
        mean: ``[D]``.
        covariance: ``[D, D]``, symmetric.
        other_mean: ``[D]``.
        other_covariance: ``[D, D]``, symmetric.
        report: is called after each of three parts, which take some seconds for thousands of features.
    """
    roots = []
    for matrix in (covariance, other_covariance):
        roots.append(_half(matrix))
        report()
    root, other_root = roots
    overlap = np.linalg.svd(root.T @ other_root, compute_uv=False).sum() if root.size and other_root.size else 0.0
    report()
    distance = np.square(np.asarray(mean, np.float64) - other_mean).sum()
    return float(max(0.0, distance + np.trace(covariance) + np.trace(other_covariance) - 2 * overlap))


def _half(covariance: np.ndarray) -> np.ndarray:
    """Return ``H [D, rank]`` with ``H Hᵀ`` the covariance."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


class InceptionScore:
    """The Inception Score (Salimans et al. 2016) of logits that come in batches: its splits are runs of images.

    Args:
        count: images that will come.
        splits: parts of equal size, each of which has a score.
    """

    def __init__(self, count: int, splits: int = SPLITS):
        self.splits = max(1, min(splits, count))
        self._bounds = np.arange(1, self.splits) * count // self.splits
        self._counts = np.zeros(self.splits, np.int64)
        self._entropy = np.zeros(self.splits)
        self._sums: np.ndarray | None = None

    def add(self, logits: np.ndarray) -> None:
        """Take the next logits, ``[N, classes]``."""
        logits = np.asarray(logits, np.float64)
        logs = logits - logits.max(axis=1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
        shares = np.exp(logs)
        if self._sums is None:
            self._sums = np.zeros((self.splits, logits.shape[1]))
        splits = np.searchsorted(self._bounds, self._counts.sum() + np.arange(len(logits)), side="right")
        np.add.at(self._sums, splits, shares)
        np.add.at(self._entropy, splits, (shares * logs).sum(axis=1))
        np.add.at(self._counts, splits, 1)

    def result(self) -> tuple[float, float]:
        """Return the mean over the splits, which is the score, and the standard deviation between them."""
        mean = self._sums / self._counts[:, None]
        marginal = (mean * np.log(np.maximum(mean, np.finfo(np.float64).tiny))).sum(axis=1)
        scores = np.exp(self._entropy / self._counts - marginal)
        return float(scores.mean()), float(scores.std())


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    neighbour: int = NEIGHBOUR,
    *,
    report: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Return the improved precision and recall (Kynkäänniemi et al. 2019).

    Around each feature lies a ball that reaches to its third nearest neighbour on its own side. Precision is the share
    of samples inside some ball of the reference, recall the share of the reference inside some ball of the samples.
    Distances are computed in float32 in blocks, on the GPU where there is one.

    Args:
        reference: float32 ``[N, D]``.
        samples: float32 ``[M, D]``.
        neighbour: which neighbour's distance is the radius.
        report: is called after each block.

    Raises:
        DataError: a side has no such neighbours.
    """
    if min(len(reference), len(samples)) <= neighbour:
        raise DataError(f"precision and recall need more than {neighbour} images on both sides")
    centre = reference.mean(axis=0, dtype=np.float64).astype(np.float32)  # shorter vectors, smaller rounding errors
    limits = _squared_radii(reference, centre, neighbour, report)
    sample_limits = _squared_radii(samples, centre, neighbour, report)
    covered, precise = np.zeros(len(reference), bool), np.zeros(len(samples), bool)
    for rows in _blocks(len(samples)):
        for columns in _blocks(len(reference)):
            squares = _squared_distances(samples[rows] - centre, reference[columns] - centre)
            precise[rows] |= (squares <= limits[columns]).any(axis=1).numpy()
            covered[columns] |= (squares <= sample_limits[rows].unsqueeze(1)).any(axis=0).numpy()
            report()
    return float(precise.mean()), float(covered.mean())


def _blocks(count: int) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, count, _BLOCK)]


def _squared_distances(rows: np.ndarray, columns: np.ndarray):
    """Return ``[N, M]`` on the device, with rounding errors."""
    import paddle

    if paddle.device.get_device() == "cpu":  # where NumPy multiplies several times as fast as Paddle
        products = paddle.to_tensor(-2 * rows @ columns.T)
    else:
        products = paddle.matmul(paddle.to_tensor(-2 * rows), paddle.to_tensor(columns), transpose_y=True)
    lengths, column_lengths = (paddle.to_tensor(np.square(points).sum(axis=1)) for points in (rows, columns))
    return products.add_(lengths.unsqueeze(1)).add_(column_lengths.unsqueeze(0))


def _squared_radii(points: np.ndarray, centre: np.ndarray, neighbour: int, report: Callable[[], object]):
    """Return each point's squared distance to its so-many-th neighbour; the nearest of all is the point itself.

    They are larger by the rounding error of a distance, so that what is exactly as far lies inside: equal images do.
    """
    import paddle

    radii = []
    for rows in _blocks(len(points)):
        nearest = []
        for columns in _blocks(len(points)):
            squares = _squared_distances(points[rows] - centre, points[columns] - centre)
            nearest.append(paddle.topk(squares, min(neighbour + 1, squares.shape[1]), axis=1, largest=False)[0])
            report()
        nearest = paddle.topk(paddle.concat(nearest, axis=1), neighbour + 1, axis=1, largest=False)[0]
        radii.append(nearest[:, neighbour] + _ROUNDING * paddle.to_tensor(np.square(points[rows] - centre).sum(axis=1)))
    return paddle.concat(radii)
