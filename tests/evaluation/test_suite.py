"""The whole suite on the digits: sets of all kinds, stored statistics, and what it warns of."""

import numpy as np
import pytest
from PIL import Image

from paddle_dit.data.digits import enlarge, load_digits
from paddle_dit.errors import DataError
from paddle_dit.evaluation.digit_features import DigitFeatures
from paddle_dit.evaluation.images import ArrayImages
from paddle_dit.evaluation.metrics import frechet_distance
from paddle_dit.evaluation.statistics import Statistics, save_statistics
from paddle_dit.evaluation.suite import EvaluationSet, compare, evaluate_arrays, measure, open_set


@pytest.fixture(scope="module")
def features():
    return DigitFeatures()


@pytest.fixture(scope="module")
def pictures():
    """Return the held-out digits as RGB pictures, uint8 [300, 32, 32, 3]."""
    images = enlarge(load_digits("heldout")[0], 32).transpose(0, 2, 3, 1)
    return np.round((images + 1) * 127.5).astype(np.uint8)


def in_memory(images, name="x"):
    return EvaluationSet(name, ArrayImages(images, name))


def test_figures_do_not_depend_on_the_kind_of_file_or_the_batch(tmp_path, features, pictures):
    np.savez(tmp_path / "a.npz", pictures)
    (tmp_path / "a").mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "a" / f"{index:06d}.png")
    real = load_digits("train")[0]
    expected = evaluate_arrays(pictures, real, features)
    reference = measure(in_memory(real), features)
    for path, batch_size in ((tmp_path / "a.npz", 7), (tmp_path / "a", 100)):
        found = compare(measure(open_set(path), features, batch_size=batch_size), reference, features)
        assert found.values() == pytest.approx(expected, rel=1e-5)
    assert list(expected) == ["fid", "sfid", "inception_score", "precision", "recall"]


def test_distances_are_those_of_the_features(features, pictures):
    real = load_digits("train")[0]
    pools, spatials = zip(features(pictures)[:2], features(real)[:2], strict=True)
    found = evaluate_arrays(pictures, real, features)
    for key, sides in (("fid", pools), ("sfid", spatials)):
        moments = [
            part for side in sides for part in (side.mean(axis=0), np.cov(side.astype(np.float64), rowvar=False))
        ]
        assert found[key] == pytest.approx(frechet_distance(*moments), rel=1e-4)


def test_stored_statistics_serve_the_distances_and_their_images_the_rest(tmp_path, features, pictures):
    real, samples = load_digits("train")[0], measure(in_memory(pictures), features)
    computed = measure(in_memory(real), features)
    whole = compare(samples, computed, features).values()
    save_statistics(tmp_path / "real.npz", computed.statistics)
    found = compare(samples, measure(open_set(tmp_path / "real.npz"), features), features)
    assert found.values() == {key: whole[key] for key in ("fid", "sfid", "inception_score")}
    assert "they need images, and real.npz gives statistics alone" in found.warnings[0]

    shifted = {key: getattr(computed.statistics, key) for key in ("mu", "sigma", "mu_s", "sigma_s")}
    shifted["mu"] = shifted["mu"] + 1  # so that it shows whose statistics were used
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=real, **shifted)
    reference = measure(open_set(tmp_path / "VIRTUAL.npz"), features, score=False)
    found = compare(samples, reference, features)
    rest = ("sfid", "inception_score", "precision", "recall")
    assert {key: found.values()[key] for key in rest} == {key: whole[key] for key in rest}
    difference = samples.statistics.mu - computed.statistics.mu
    assert found.values()["fid"] == pytest.approx(whole["fid"] + 64 - 2 * difference.sum())
    assert "to an unknown number of the reference" in found.figures["fid"].meaning
    assert reference.score is None


def test_images_that_nothing_asks_for_are_not_read(tmp_path, features):
    real = load_digits("train")[0]
    computed = measure(in_memory(real), features).statistics
    np.savez(tmp_path / "x.npz", arr_0=real, mu=computed.mu, sigma=computed.sigma)
    seen = []
    found = measure(open_set(tmp_path / "x.npz"), features, neighbours=0, score=False, report=seen.append)
    assert (seen, found.pool.shape) == ([], (0, 64))
    samples = measure(in_memory(real[:300]), features, neighbours=0)
    assert not any("precision" in line for line in compare(samples, found, features).warnings)
    found = measure(open_set(tmp_path / "x.npz"), features, neighbours=40, score=False, report=seen.append)
    assert (sum(seen), found.pool.shape) == (1497, (40, 64))
    np.testing.assert_allclose(found.pool[[0, -1]], features(real[[0, -1]]).pool, rtol=1e-5, atol=1e-5)


def test_without_a_reference_there_is_the_inception_score(features, pictures):
    found = compare(measure(in_memory(pictures), features), None, features)
    assert list(found.values()) == ["inception_score"]
    assert "10 splits of 30" in found.figures["inception_score"].meaning


def test_what_is_odd_is_warned_of(features, pictures):
    real = measure(in_memory(load_digits("train")[0], "real"), features)

    def warnings(images, other=real):
        return " | ".join(compare(measure(in_memory(images), features), other, features).warnings)

    assert warnings(pictures) == ""
    assert "60 samples are few" in warnings(pictures[:60])
    assert "60 samples are fewer than the 112 features: their covariance is singular" in warnings(pictures[:60])
    same = np.repeat(pictures[:1], 300, axis=0)
    assert warnings(same) == "all 300 images of x are the same"
    plain = pictures.copy()
    plain[[3, 50]] = (7, 8, 9)
    assert warnings(plain) == "2 of the 300 images of x are of one colour throughout"
    assert warnings(load_digits("train")[0]) == "samples and reference are the same"
    few = measure(in_memory(pictures[:3]), features)
    assert "they need more than 3 images" in " | ".join(compare(few, real, features).warnings)
    stored = Statistics(real.statistics.mu, real.statistics.sigma, None, None, {})
    found = compare(
        measure(in_memory(pictures), features), measure(EvaluationSet("y", None, stored), features), features
    )
    assert "no sFID: the stored statistics have no spatial features" in " | ".join(found.warnings)
    assert "sfid" not in found.values()


def test_what_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    np.savez(tmp_path / "x.npz", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"there is no nowhere; give a folder of images or an \.npz"):
        open_set("nowhere")
    with pytest.raises(DataError, match=r"cannot read .*x.txt; give a folder"):
        open_set(tmp_path / "x.txt")


def test_what_a_file_says_of_itself_names_nothing(features):
    about = {"name": "another", "kind": "folder", "sha256": "0"}
    stored = Statistics(np.zeros(64), np.eye(64), None, None, about)
    found = measure(EvaluationSet("x.npz", None, stored), features).record
    assert found == {"name": "x.npz", "kind": "stored statistics", "sha256": stored.sha256}


def test_cropping_is_for_folders_and_files_are_taken_as_they_are(tmp_path, pictures):
    np.savez(tmp_path / "x.npz", pictures[:2])
    (tmp_path / "x").mkdir()
    Image.fromarray(pictures[0]).save(tmp_path / "x" / "0.png")
    assert open_set(tmp_path / "x.npz", crop=16).shape == (32, 32, 3)
    assert open_set(tmp_path / "x", crop=16).shape == (16, 16, 3)
