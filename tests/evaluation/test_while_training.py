"""The suite as a run's judge."""

from pathlib import Path

import numpy as np
import pytest

from paddle_dit.data.digits import enlarge, load_digits
from paddle_dit.errors import DataError
from paddle_dit.evaluation.digit_features import DigitFeatures
from paddle_dit.evaluation.statistics import Statistics, save_statistics
from paddle_dit.evaluation.suite import evaluate_arrays
from paddle_dit.evaluation.while_training import TrainingJudge
from paddle_dit.training.recipe import TrainRecipe

SHAPE = (32, 32, 3)


@pytest.fixture(scope="module")
def pictures():
    """Return the held-out digits as RGB pictures, uint8 [300, 32, 32, 3]."""
    images = enlarge(load_digits("heldout")[0], 32).transpose(0, 2, 3, 1)
    return np.round((images + 1) * 127.5).astype(np.uint8)


def judge_of(reference, count=300):
    return TrainingJudge(
        TrainRecipe(eval_every=1, eval_samples=count, eval_features="digits", eval_reference=Path(reference))
    )


def judged(judge, images, still_here=lambda: None):
    judge.begin()
    for start in range(0, len(images), 64):
        judge.add(images[start : start + 64])
    return judge.finish(still_here)


def test_its_figures_are_the_suites_each_time(pictures):
    judge, calls = judge_of("digits-train"), []
    assert judge.load(SHAPE, lambda: calls.append(1)) == []
    assert calls
    expected = evaluate_arrays(pictures, load_digits("train")[0], DigitFeatures())
    for _ in range(2):
        del calls[:]
        found = judged(judge, pictures, lambda: calls.append(1))
        assert found.figures == pytest.approx(expected, rel=1e-5)
        assert len(calls) >= 8  # as other ranks wait
        assert found.warnings == []
    assert found.told.startswith(f"FID-300 {expected['fid']:.3f}, sFID-300 ")
    assert judge.about.startswith("beside digits-train (1,497 images); features: a classifier of the embedded digits, ")


def test_too_few_images_are_warned_of_before_any_is_drawn(tmp_path, pictures):
    np.savez(tmp_path / "real.npz", pictures[:50])
    told = judge_of(tmp_path / "real.npz", 100).load(SHAPE, lambda: None)
    assert [line.split(":")[0] for line in told] == [
        "100 samples are fewer than the 112 features",
        "50 images of the reference are fewer than the 112 features",
    ]


def test_statistics_serve_as_a_reference(tmp_path, pictures):
    whole = judge_of("digits-train")
    whole.load(SHAPE, lambda: None)
    save_statistics(tmp_path / "real.npz", whole._reference.statistics)
    judge = judge_of(tmp_path / "real.npz")
    assert judge.load(SHAPE, lambda: None) == []
    assert "beside real.npz (1,497 images)" in judge.about
    expected, found = judged(whole, pictures), judged(judge, pictures)
    assert found.figures == {key: expected.figures[key] for key in ("fid", "sfid", "inception_score")}
    assert "no precision and recall: they need images" in found.warnings[0]


def test_what_does_not_fit_is_refused_with_the_flags_of_training(tmp_path, pictures):
    other = Statistics(np.zeros(5), np.eye(5), None, None, {})
    save_statistics(tmp_path / "other.npz", other)
    with pytest.raises(DataError, match=r"statistics of 5 pool .* choose other --eval-features"):
        judge_of(tmp_path / "other.npz")
    with pytest.raises(DataError, match=r"this run holds images of shape \[20, 20, 3\]"):
        judge_of("digits-train").load((20, 20, 3), lambda: None)
    np.savez(tmp_path / "negative.npz", mu=np.zeros(64), sigma=-np.eye(64))
    with pytest.raises(DataError, match=r"make the file anew with scripts/evaluate.py --save-stats"):
        judge_of(tmp_path / "negative.npz")
    (tmp_path / "damaged.npz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="damaged"):
        judge_of(tmp_path / "damaged.npz")


def test_images_of_another_size_are_refused(tmp_path, pictures, monkeypatch):
    np.savez(tmp_path / "real.npz", pictures)
    monkeypatch.setattr(DigitFeatures, "any_size", False)  # as Inception's are
    judge = judge_of(tmp_path / "real.npz")
    with pytest.raises(DataError, match=r"this run and real.npz have images of 64 x 64 and 32 x 32 pixels"):
        judge.load((64, 64, 3), lambda: None)
