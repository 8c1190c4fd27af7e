"""The classifier of the digits that ships: it knows them, and its figures rank what can be ranked by eye."""

import numpy as np
import paddle
import pytest

from paddle_dit.data.digits import load_digits
from paddle_dit.errors import DataError
from paddle_dit.evaluation.digit_features import WEIGHTS, DigitClassifier, DigitFeatures, digit_figures
from paddle_dit.readers import read_tensors


def test_the_classifier_that_ships_knows_the_digits_that_it_has_not_seen():
    network = DigitClassifier()
    network.set_state_dict({name: paddle.to_tensor(array) for name, array in read_tensors(WEIGHTS).items()})
    network.eval()
    images, labels = load_digits("heldout")
    found = network(paddle.to_tensor(images.astype(np.float32))).argmax(1).numpy()
    assert (found == labels).mean() > 0.97
    assert sum(parameter.size for parameter in network.parameters()) == 47_530
    assert WEIGHTS.stat().st_size < 300_000


def test_worse_digits_have_worse_figures():
    images, labels = load_digits("heldout")
    random = np.random.default_rng(0)
    noise = (images + random.normal(0, 3, images.shape)).clip(0, 16).round().astype(np.uint8)
    collapsed = images[labels == 3].repeat(10, axis=0)
    real, noisy, threes = (digit_figures(some) for some in (images, noise, collapsed))
    assert real["fid"] < 3 < noisy["fid"] < threes["fid"]
    assert real["sfid"] < noisy["sfid"]
    assert threes["inception_score"] < 2 < 7 < real["inception_score"] < 10
    assert threes["recall"] < 0.2 < 0.8 < real["recall"]
    assert noisy["precision"] < real["precision"]


def test_other_images_are_refused():
    features = DigitFeatures()
    for shape in ((8, 8), (8, 8, 3), (32, 32, 3)):
        features.check(shape, "x")
    for shape in ((28, 28), (8, 8, 1), (30, 30, 3), (32, 16, 3)):
        with pytest.raises(DataError, match=r"digits are \[8, 8\] with ink 0..16, or RGB \[S, S, 3\]"):
            features.check(shape, "x")
    with pytest.raises(DataError, match="ink of 8 x 8 digits goes from 0 to 16, not to 255"):
        features(np.full((2, 8, 8), 255, np.uint8))


@pytest.mark.slow
def test_the_classifier_can_be_made_anew(run_command, tmp_path):
    result = run_command("scripts/make_digit_features.py", "--output", tmp_path / "again.safetensors", "--epochs", 8)
    assert result.returncode == 0, result.stderr
    assert read_tensors(tmp_path / "again.safetensors").keys() == read_tensors(WEIGHTS).keys()
    assert float(result.stdout.split("; ")[1].split("%")[0]) > 90
