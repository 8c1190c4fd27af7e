import numpy as np
import pytest

from paddle_dit.data.digits import load_digits
from paddle_dit.evaluation.digits import judge


def test_real_digits_pass_the_judge():
    images, labels = load_digits("heldout")
    verdict = judge(images.astype(np.float32), labels)
    assert verdict.generated_accuracy == verdict.real_heldout_accuracy > 0.97
    assert verdict.nearest_distance_generated == pytest.approx(verdict.nearest_distance_heldout)
    assert verdict.precision > 0.8
    assert verdict.recall == 1.0


def test_copies_and_collapse_and_noise_are_seen():
    train, labels = load_digits("train")
    heldout, _ = load_digits("heldout")
    copies = judge(train[:300].astype(np.float32), labels[:300])
    assert copies.nearest_distance_generated == 0 < copies.nearest_distance_heldout
    one = np.repeat(train[:1].astype(np.float32), 300, axis=0)
    assert judge(one, np.repeat(labels[:1], 300)).recall < 0.1
    noise = np.random.default_rng(0).uniform(0, 16, heldout.shape).astype(np.float32)
    verdict = judge(noise, np.arange(300) % 10)
    assert verdict.generated_accuracy < 0.3
    assert verdict.precision < 0.1
