"""The figures equal their definitions, written out in another way, also where numbers are awkward."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from paddle_dit.errors import DataError
from paddle_dit.evaluation import metrics
from paddle_dit.evaluation.metrics import InceptionScore, Moments, frechet_distance, precision_recall


def random_rows(count, size=40, seed=0, spread=2.0):
    random = np.random.default_rng(seed)
    return random.standard_normal((count, size)) @ (
        random.standard_normal((size, size)) * np.logspace(0, -spread, size)
    )


def moments_of(rows, *sizes):
    found = Moments(rows.shape[1])
    for part in np.split(rows, np.cumsum(sizes)):
        found.add(part)
    return found.result()


@pytest.mark.parametrize("sizes", [(), (1, 1, 5), (900, 1), (1500, 1500), (7,) * 300])
def test_mean_and_covariance_equal_numpys_whatever_the_batches(sizes):
    rows = random_rows(3000)
    mean, covariance = moments_of(rows, *sizes)
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=0, atol=1e-11)
    assert covariance.dtype == np.float64


def test_nothing_cancels_far_from_zero():
    rows = random_rows(3000)
    _, covariance = moments_of(rows + 1e8, *(100,) * 29)
    np.testing.assert_allclose(covariance, np.cov(rows + 1e8, rowvar=False), rtol=0, atol=1e-6)


def test_results_can_be_asked_for_in_between_and_do_not_change():
    rows, found = random_rows(60), Moments(40)
    found.add(rows[:30])
    mean, covariance = found.result()
    kept = mean.copy(), covariance.copy()
    found.add(rows[30:])
    np.testing.assert_allclose(found.result()[1], np.cov(rows, rowvar=False), atol=1e-12)
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(covariance, kept[1])


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_has_no_covariance(count):
    found = Moments(4)
    found.add(np.ones((count, 4)))
    with pytest.raises(DataError, match="two or more"):
        found.result()


def statistics(rows):
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def by_scipy(mean, covariance, other_mean, other_covariance):
    root = np.asarray(sqrtm(covariance @ other_covariance)).real
    return np.square(mean - other_mean).sum() + np.trace(covariance + other_covariance - 2 * root)


@pytest.mark.parametrize("spread", [0.0, 2.0, 4.0])
def test_the_distance_equals_scipys_square_root(spread):
    sides = [statistics(random_rows(400, 60, seed, spread) + seed) for seed in (1, 2)]
    distance = frechet_distance(*sides[0], *sides[1])
    assert distance == pytest.approx(by_scipy(*sides[0], *sides[1]), rel=1e-6)
    assert frechet_distance(*sides[1], *sides[0]) == pytest.approx(distance, rel=1e-10)


def test_the_distance_of_commuting_covariances_is_known_also_where_they_are_singular():
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.standard_normal((300, 300)))
    first, second = np.zeros(300), np.zeros(300)
    first[:40], second[20:90] = random.uniform(0.1, 5, 40), random.uniform(0.1, 5, 70)
    covariances = [(basis * values) @ basis.T for values in (first, second)]
    known = np.square(np.sqrt(first) - np.sqrt(second)).sum() + 300 * 0.25
    zero = np.zeros(300)
    assert frechet_distance(zero, covariances[0], zero + 0.5, covariances[1]) == pytest.approx(known, rel=1e-10)


def test_equal_statistics_have_no_distance_and_constant_features_one():
    mean, covariance = statistics(random_rows(20, 60))  # singular
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-8 * np.trace(covariance))
    nothing = np.zeros_like(covariance)
    assert frechet_distance(mean, nothing, mean, covariance) == pytest.approx(np.trace(covariance))
    assert frechet_distance(mean, nothing, mean + 1, nothing) == pytest.approx(60)


def score_of(logits, splits):
    """Return the Inception Score as its paper defines it."""
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    scores = []
    for part in np.split(shares, splits):
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1).mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("batch", [1, 7, 60, 200])
def test_the_inception_score_equals_its_definition_whatever_the_batches(batch):
    logits = 4 * np.random.default_rng(0).standard_normal((200, 12))
    found = InceptionScore(200)
    for start in range(0, 200, batch):
        found.add(logits[start : start + batch].astype(np.float32))
    assert found.result() == pytest.approx(score_of(logits, 10), rel=1e-6)


def test_the_inception_score_of_extremes():
    sure = InceptionScore(50, splits=1)
    sure.add(2000 * np.eye(5).repeat(10, axis=0))
    assert sure.result()[0] == pytest.approx(5)
    same = InceptionScore(7)
    same.add(np.tile(np.arange(5.0), (7, 1)))
    assert same.splits == 7
    assert same.result() == pytest.approx((1, 0))


def precision_and_recall(reference, samples, k=3):
    """Return them as their paper defines them, in float64."""

    def distances(one, other):
        return np.sqrt(np.square(one[:, None].astype(np.float64) - other[None]).sum(axis=2))

    radii, sample_radii = (np.sort(distances(side, side), axis=1)[:, k] for side in (reference, samples))
    between = distances(samples, reference)
    return (between <= radii).any(axis=1).mean(), (between <= sample_radii[:, None]).any(axis=0).mean()


@pytest.mark.parametrize("block", [16, 64, 4096])
def test_precision_and_recall_equal_their_definition_in_any_blocks(monkeypatch, block):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    reference = random_rows(150, 20, 0).astype(np.float32) + 1000
    samples = 0.6 * random_rows(100, 20, 1).astype(np.float32) + 1000
    expected = precision_and_recall(reference, samples)
    assert 0.2 < expected[1] < expected[0] < 1
    assert precision_recall(reference, samples) == expected


def test_equal_features_lie_inside_and_others_outside():
    points = random_rows(50, 20, 0).astype(np.float32) + 100
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 1000) == (0, 0)
    same = np.tile(points[:1], (20, 1))
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(points, same)[0] == 1
    assert precision_recall(points, same)[1] == pytest.approx(1 / 50)


def test_features_that_occur_often_lie_inside_balls_without_a_radius(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 64)
    points = np.random.default_rng(0).standard_normal((60, 2000)).astype(np.float32)
    often = points.repeat(4, axis=0)
    for row in range(20):  # a block of one row is multiplied in another way, with other rounding errors
        assert precision_recall(often, np.concatenate([often[:64], points[row : row + 1]]))[0] == 1
    assert precision_recall(often, np.roll(often, 1, axis=1)) == (0, 0)


def test_a_side_without_neighbours_is_refused():
    points = random_rows(10, 20).astype(np.float32)
    with pytest.raises(DataError, match="more than 3 images"):
        precision_recall(points, points[:3])
