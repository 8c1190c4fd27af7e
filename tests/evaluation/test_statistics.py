"""Statistics in files: ours, the ADM suite's, and those that are none."""

import json

import numpy as np
import pytest

from paddle_dit.errors import DataError
from paddle_dit.evaluation.statistics import Statistics, has_statistics, read_statistics, save_statistics

ABOUT = {"name": "a network", "weights": "0123", "resize": "none"}
EYE, ZERO = np.eye(3), np.zeros(3)


def test_statistics_come_back_with_what_they_are_of(tmp_path):
    about = {"count": 9, "image_shape": [8, 8, 3], "features": ABOUT, "source": "x", "source_sha256": "45"}
    saved = Statistics(np.arange(3.0), EYE / 3, np.arange(2.0), np.eye(2), about)
    path = tmp_path / "x.npz"
    save_statistics(path, saved)
    found = read_statistics(path)
    assert found.about == about
    assert found.sha256 == saved.sha256
    np.testing.assert_array_equal(found.sigma, EYE / 3)
    np.testing.assert_array_equal(found.mu_s, [0, 1])
    found.check((3, 2), ABOUT, "x.npz")
    with np.load(path, allow_pickle=False) as file:  # as the ADM suite looks for them
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)


def test_a_file_of_the_adm_suite_is_read_as_it_is(tmp_path):
    path = tmp_path / "VIRTUAL.npz"
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=ZERO.astype(np.float32), sigma=EYE)
    assert has_statistics(path)
    found = read_statistics(path)
    assert (found.about, found.mu_s) == ({}, None)
    assert found.mu.dtype == found.sigma.dtype == np.float64
    found.check((3, 99), ABOUT, "VIRTUAL.npz")


def test_files_without_statistics_are_known(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    assert not has_statistics(tmp_path / "x.npz")
    assert not has_statistics(tmp_path / "text.npz")


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"sigma": np.full((3, 3), np.nan)}, "mu and sigma of .* are NaN or infinite"),
        ({"mu": ZERO + np.inf}, "are NaN or infinite"),
        ({"sigma": np.eye(4)}, r"have shapes \[3\] and \[4, 4\], not \[D\] and \[D, D\]"),
        ({"mu": np.zeros((3, 1))}, "have shapes"),
        ({"mu": np.array(["a", "b", "c"])}, "not floats"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "is not symmetric"),
        ({"mu": np.array([None] * 3)}, r"x.npz is damaged or no .npz \(Object arrays"),
        ({"mu_s": ZERO}, "mu_s and sigma_s of .* are not both there"),
        ({"mu_s": ZERO, "sigma_s": EYE * np.nan}, "mu_s and sigma_s of .* are NaN"),
        ({"about": np.array("{")}, "x.npz is damaged"),
        ({"mu": ZERO[:0], "sigma": EYE[:0, :0]}, r"have shapes \[0\] and \[0, 0\], not"),
        ({"sigma": -EYE}, "mu and sigma of .*: the covariance has negative eigenvalues"),
        ({"sigma": np.array([[1, 2, 0], [2, 1, 0], [0, 0, 1.0]])}, "negative eigenvalues"),
        ({"mu_s": ZERO, "sigma_s": np.diag([1, 1, -0.1])}, "mu_s and sigma_s of .* negative eigenvalues"),
    ],
)
def test_what_is_no_mean_and_covariance_is_refused(tmp_path, arrays, told):
    np.savez(tmp_path / "x.npz", **{"mu": ZERO, "sigma": EYE, **arrays})
    with pytest.raises(DataError, match=told):
        read_statistics(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "about",
    [
        {"count": "x"},
        {"count": -3},
        {"count": 20.5},
        {"count": True},
        {"image_shape": 5},
        {"image_shape": [8]},
        {"image_shape": [8, "8"]},
        {"features": "foo"},
        {"features": {"name": 3}},
        {"source": 3},
        {"source_sha256": ["x"]},
    ],
)
def test_what_a_file_says_of_its_statistics_is_not_trusted(tmp_path, about):
    np.savez(tmp_path / "x.npz", mu=ZERO, sigma=EYE, about=np.array(json.dumps(about)))
    with pytest.raises(DataError, match=f"x.npz says of its statistics that '{next(iter(about))}' is .*make the file"):
        read_statistics(tmp_path / "x.npz")


@pytest.mark.parametrize(("about", "kept"), [({"count": 9, "kind": 9, "name": 7}, {"count": 9}), ([3], {})])
def test_what_nobody_asks_for_is_left_out(tmp_path, about, kept):
    np.savez(tmp_path / "x.npz", mu=ZERO, sigma=EYE, about=np.array(json.dumps(about)))
    assert read_statistics(tmp_path / "x.npz").about == kept


def test_an_encrypted_file_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", mu=ZERO, sigma=EYE)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(mark)
        while start >= 0:
            content[start + place] |= 1  # the flag that says so
            start = content.find(mark, start + 1)
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x.npz is damaged or no .npz \(.*encrypted"):
        read_statistics(tmp_path / "x.npz")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_rounding_below_zero_and_constant_features_are_accepted(tmp_path, dtype):
    rows = np.random.default_rng(0).standard_normal((4, 60))  # fewer than features: most eigenvalues are zero
    for sigma in (np.cov(rows, rowvar=False).astype(dtype), np.zeros((60, 60), dtype)):
        np.savez(tmp_path / "x.npz", mu=np.zeros(60), sigma=sigma)
        np.testing.assert_array_equal(read_statistics(tmp_path / "x.npz").sigma, sigma)
    assert np.linalg.eigvalsh(np.cov(rows, rowvar=False).astype(dtype).astype(np.float64))[0] < 0


def test_statistics_of_other_features_are_not_compared():
    found = Statistics(ZERO, EYE, None, None, {"features": ABOUT})
    with pytest.raises(DataError, match="x holds statistics of 3 pool and 0 spatial features, not 4 and 2"):
        found.check((4, 2), ABOUT, "x")
    for change in ({"weights": "4567"}, {"name": "another"}):
        with pytest.raises(DataError, match=r"by a network \(0123\), not by .*compute them anew"):
            found.check((3, 2), ABOUT | change, "x")
