import paddle
import pytest

from paddle_dit.training.ranks import Ranks
from paddle_dit.training.window import LossWindow


def losses(loss, mse):
    return {"loss": paddle.to_tensor(loss), "mse": paddle.to_tensor(mse)}


def filled(window, *steps):
    for step in steps:
        window.add(losses(*step))
    return window


def test_the_means_are_of_the_steps_since_the_last():
    window = filled(LossWindow(Ranks()), (1.0, 2.0), (3.0, 6.0))
    assert window.mean() == {"loss": 2.0, "mse": 4.0}
    assert filled(window, (5.0, 7.0)).mean() == {"loss": 5.0, "mse": 7.0}


def test_without_a_step_there_is_no_loss():
    (name,), (value,) = zip(*LossWindow(Ranks()).mean().items(), strict=True)
    assert name == "loss"
    assert value != value


def test_a_continued_window_gives_the_same_bits():
    steps = [(0.1, 0.7), (0.2, 1e-8), (1 / 3, 5.0)]
    whole = filled(LossWindow(Ranks()), *steps).mean()
    stopped, continued = filled(LossWindow(Ranks()), *steps[:2]), LossWindow(Ranks())
    continued.restore(stopped.state())
    assert filled(continued, steps[2]).mean() == whole
    empty = LossWindow(Ranks())
    empty.restore(LossWindow(Ranks()).state())
    assert filled(empty, *steps).mean() == whole


def test_on_another_number_of_ranks_the_means_go_on():
    window = LossWindow(Ranks())
    window.restore({"steps": 2, "sums": {"loss": [1.0, 3.0], "mse": [2.0, 2.0]}})  # of two ranks, here is one
    assert filled(window, (4.0, 1.0)).mean() == pytest.approx({"loss": 2.0, "mse": 1.0})
