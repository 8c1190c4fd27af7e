import dataclasses

import numpy as np
import paddle
import pytest

from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import NonFiniteLossError
from paddle_dit.models.dit import DiT
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.step import TrainingStep, draw


def make_step(config, accumulation=1, **recipe):
    paddle.seed(0)
    model = DiT(config)
    optimizer = build_optimizer(TrainRecipe(**recipe), model)
    ema = ExponentialMovingAverage(model, decay=0.9)
    return TrainingStep(model, GaussianDiffusion(), optimizer, ema, DataParallel(), seed=0, accumulation=accumulation)


def batch(config, size=8):
    random = np.random.default_rng(0)
    latents = random.standard_normal((size, *config.sample_shape)).astype(np.float32)
    return latents, random.integers(0, 10, size), np.arange(size)


def advance(step, number, latents, labels, positions):
    """Make a whole step."""
    losses = step.backward(number, latents, labels, positions)
    step.update(number)
    return losses


def weights(step):
    return {name: parameter.numpy() for name, parameter in step.model.named_parameters()}


def test_draws_depend_on_the_position_and_not_on_the_company(tiny_config):
    labels = np.arange(8) % 10
    whole = draw(3, 5, np.arange(8), labels, tiny_config, 1000)
    part = draw(3, 5, np.arange(4, 8), labels[4:], tiny_config, 1000)
    for name in ("timesteps", "noise", "class_labels"):
        np.testing.assert_array_equal(getattr(whole, name)[4:], getattr(part, name))


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 6}, {"positions": np.arange(1, 9)}])
def test_draws_differ_by_seed_step_and_position(tiny_config, change):
    arguments = {"seed": 3, "step": 5, "positions": np.arange(8)}
    one = draw(**arguments, class_labels=np.zeros(8), config=tiny_config, num_timesteps=1000)
    other = draw(**{**arguments, **change}, class_labels=np.zeros(8), config=tiny_config, num_timesteps=1000)
    assert not np.isclose(one.noise, other.noise).any(axis=(1, 2, 3)).all()


def test_draws_are_distributed_as_they_should(tiny_config):
    drawn = draw(0, 0, np.arange(4000), np.zeros(4000), tiny_config, 1000)
    assert (drawn.class_labels == tiny_config.null_class).mean() == pytest.approx(0.1, abs=0.02)
    assert drawn.noise.mean() == pytest.approx(0, abs=0.01)
    assert drawn.noise.std() == pytest.approx(1, abs=0.01)
    assert drawn.timesteps.min() < 5
    assert drawn.timesteps.max() > 994
    assert drawn.timesteps.mean() == pytest.approx(499.5, abs=15)


def test_an_unconditional_model_sees_the_null_class_alone(tiny_config):
    config = dataclasses.replace(tiny_config, num_classes=0)
    assert (draw(0, 0, np.arange(8), np.arange(8), config, 1000).class_labels == 0).all()


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_equal_one_batch(tiny_config, accumulation):
    whole, parts = make_step(tiny_config), make_step(tiny_config, accumulation)
    for number in range(3):
        losses = [float(advance(step, number, *batch(tiny_config))["loss"]) for step in (whole, parts)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, value in weights(whole).items():
        np.testing.assert_allclose(weights(parts)[name], value, atol=1e-5, err_msg=name)


def test_the_average_follows_the_weights(tiny_config):
    step = make_step(tiny_config, learning_rate=1e-2)
    shadow = weights(step)
    for number in range(3):
        advance(step, number, *batch(tiny_config))
        now = weights(step)
        shadow = {name: 0.9 * value + 0.1 * now[name] for name, value in shadow.items()}
    for name, value in shadow.items():
        np.testing.assert_allclose(step.ema.shadow[name].numpy(), value, atol=1e-6, err_msg=name)


def test_training_learns_one_batch(tiny_config):
    step = make_step(tiny_config, learning_rate=3e-3)
    losses = [float(advance(step, 0, *batch(tiny_config))["mse"]) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_clipping_bounds_the_update(tiny_config):
    free, clipped = make_step(tiny_config, max_grad_norm=-1.0), make_step(tiny_config, max_grad_norm=1e-9)
    before = weights(free)["final_layer.linear.bias"]
    for step in (free, clipped):
        advance(step, 0, *batch(tiny_config))
    moved = [np.abs(weights(step)["final_layer.linear.bias"] - before).max() for step in (free, clipped)]
    assert moved[1] < 0.1 * moved[0]


def test_optimizer_state_survives_under_structured_names(tiny_config):
    one, other = make_step(tiny_config), make_step(tiny_config)
    advance(one, 0, *batch(tiny_config))
    state = optimizer_tensors(one.optimizer, one.model)
    assert len(state) == 4 * len(weights(one))
    assert "blocks.0.attn.qkv.weight/moment1_0" in state
    for name, parameter in other.model.named_parameters():
        parameter.set_value(weights(one)[name])
    restore_optimizer(other.optimizer, other.model, state)
    for step in (one, other):
        advance(step, 1, *batch(tiny_config))
    for name, value in weights(one).items():
        np.testing.assert_array_equal(weights(other)[name], value, err_msg=name)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_that_is_not_finite_changes_nothing(tiny_config, accumulation):
    step = make_step(tiny_config, accumulation)
    before = weights(step)
    latents, labels, positions = batch(tiny_config)
    latents[5] = np.inf
    with pytest.raises(NonFiniteLossError, match="step 7") as caught:
        step.backward(7, latents, labels, positions + 8)
    assert caught.value.positions == [13]
    for name, value in before.items():
        np.testing.assert_array_equal(weights(step)[name], value)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in step.model.parameters())
