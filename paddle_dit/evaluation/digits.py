"""An independent judge of generated digits, fitted to the real training digits alone."""

from dataclasses import dataclass

import numpy as np

from paddle_dit.data.digits import load_digits


@dataclass(frozen=True)
class Verdict:
    """What the judge says of generated digits.

    Attributes:
        num_samples: generated digits judged.
        generated_accuracy: share that the classifier labels as asked.
        real_heldout_accuracy: the same classifier's share on the 300 held-out real digits.
        nearest_distance_generated: mean Euclidean distance, in ink 0..16 over 64 pixels, from a generated digit to its
            nearest training digit. Far below the held-out figure would mean copies.
        nearest_distance_heldout: the same for held-out real digits.
        precision: share of generated digits that lie among the real ones (k-nearest-neighbour balls, k = 3;
            Kynkäänniemi et al. 2019).
        recall: share of held-out digits that lie among the generated ones: the diversity.
    """

    num_samples: int
    generated_accuracy: float
    real_heldout_accuracy: float
    nearest_distance_generated: float
    nearest_distance_heldout: float
    precision: float
    recall: float


def judge(digits: np.ndarray, class_labels: np.ndarray) -> Verdict:
    """Judge generated digits.

    Args:
        digits: float32 ``[N, 8, 8]``, ink 0..16, as :func:`paddle_dit.data.digits.shrink` returns them.
        class_labels: int64 ``[N]``, what was asked for.
    """
    from sklearn.svm import SVC

    train_images, train_labels = load_digits("train")
    heldout_images, heldout_labels = load_digits("heldout")
    train, heldout, generated = (_flat(images) for images in (train_images, heldout_images, digits))
    # RBF kernel of the width that scikit-learn's own digits example uses.
    classifier = SVC(gamma=0.001).fit(train, train_labels)
    return Verdict(
        num_samples=len(generated),
        generated_accuracy=float(classifier.score(generated, class_labels)),
        real_heldout_accuracy=float(classifier.score(heldout, heldout_labels)),
        nearest_distance_generated=float(_distances(generated, train).min(axis=1).mean()),
        nearest_distance_heldout=float(_distances(heldout, train).min(axis=1).mean()),
        precision=_share_inside(generated, train),
        recall=_share_inside(heldout, generated),
    )


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64)


def _distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distances ``[N, M]``."""
    squares = (points**2).sum(1)[:, None] + (others**2).sum(1)[None] - 2 * points @ others.T
    return np.sqrt(np.maximum(squares, 0.0))


def _share_inside(points: np.ndarray, cloud: np.ndarray, k: int = 3) -> float:
    """Return the share of points that lie in the k-nearest-neighbour ball of some point of the cloud."""
    radii = np.sort(_distances(cloud, cloud), axis=1)[:, k]  # column 0 is the point itself
    return float((_distances(points, cloud) <= radii[None]).any(axis=1).mean())
