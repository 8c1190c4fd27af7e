"""Half precision as far as the CPU can tell: dtypes, names, and what an overflowing step leaves behind."""

import contextlib
import math

import numpy as np
import paddle
import pytest

from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import ConfigError
from paddle_dit.models.dit import DiT, TimestepEmbedder
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.optimizer import (
    build_optimizer,
    full_precision_weights,
    optimizer_tensors,
    restore_optimizer,
)
from paddle_dit.training.precision import Precision
from paddle_dit.training.recipe import TrainRecipe
from tests.training.test_step import advance, batch, make_step, weights

O2 = {"precision": "bf16", "amp_level": "O2"}


def create_moments(optimizer, model):
    """Let Paddle make AdamW's state, as its first step does: the CPU cannot make a step in bfloat16."""
    block = paddle.base.framework.default_main_program().global_block()
    optimizer._create_accumulators(block, model.parameters())


def narrowed(config, dtype="bf16"):
    """Return a model, its optimizer and its average under O2."""
    model = DiT(config)
    optimizer = build_optimizer(TrainRecipe(precision=dtype, amp_level="O2"), model)
    ema = ExponentialMovingAverage(model)
    Precision(dtype, "O2").cast(model, optimizer)
    return model, optimizer, ema


@pytest.mark.parametrize(("dtype", "paddles"), [("bf16", paddle.bfloat16), ("fp16", paddle.float16)])
def test_under_o2_the_weights_are_half_and_all_that_follows_them_is_float32(tiny_config, dtype, paddles):
    paddle.seed(0)
    before = weights_of(DiT(tiny_config))
    paddle.seed(0)
    model, optimizer, ema = narrowed(tiny_config, dtype)
    create_moments(optimizer, model)
    assert {weight.dtype for weight in model.parameters()} == {paddles}
    assert {shadow.dtype for shadow in ema.shadow.values()} == {paddle.float32}
    moments = [value for key, value in optimizer.state_dict().items() if "moment" in key]
    assert len(moments) == 2 * len(model.parameters())
    assert {moment.dtype for moment in moments} == {paddle.float32}
    masters = full_precision_weights(model, optimizer)
    assert masters.keys() == before.keys()
    for name, value in before.items():
        assert masters[name].dtype == paddle.float32
        np.testing.assert_array_equal(masters[name].numpy(), value, err_msg=name)


def weights_of(model):
    return {name: weight.numpy() for name, weight in model.named_parameters()}


def test_master_weights_have_the_names_that_paddle_gives(tiny_config):
    model, optimizer, _ = narrowed(tiny_config)
    by_paddle = build_optimizer(TrainRecipe(**O2), model)
    for weight in model.parameters():
        assert optimizer._master_weights[weight.name].name == by_paddle._create_master_weight(weight).name


@pytest.mark.parametrize("precision", [Precision(), Precision("bf16", "O1"), Precision("fp16", "O1")])
def test_without_o2_the_weights_stay_float32(tiny_config, precision):
    model = DiT(tiny_config)
    recipe = TrainRecipe(precision=precision.dtype, amp_level=precision.level)
    optimizer = build_optimizer(recipe, model)
    precision.cast(model, optimizer)
    assert {weight.dtype for weight in model.parameters()} == {paddle.float32}
    assert precision.weight_dtype == "float32"
    found = full_precision_weights(model, optimizer)
    assert all(found[name] is weight for name, weight in model.named_parameters())


def test_only_float16_needs_a_scaled_loss():
    assert Precision("fp32").loss_scaler() is None
    assert Precision("bf16", "O2").loss_scaler() is None
    assert Precision("fp16", "O1").loss_scaler() is not None


@pytest.mark.parametrize("kind", [{}, O2])
def test_optimizer_state_has_the_same_names_with_and_without_master_weights(tiny_config, kind):
    trained = make_step(tiny_config)
    advance(trained, 0, *batch(tiny_config))
    saved = optimizer_tensors(trained.optimizer, trained.model)
    assert len(saved) == 4 * len(trained.model.parameters())

    model = DiT(tiny_config)
    recipe = TrainRecipe(**kind)
    optimizer = build_optimizer(recipe, model)
    restore_optimizer(optimizer, model, saved)
    Precision.of(recipe).cast(model, optimizer)
    create_moments(optimizer, model)
    found = optimizer_tensors(optimizer, model)
    assert not [key for key in found if "fp32_master" in key]
    assert found.keys() == saved.keys()
    for key, value in saved.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert np.abs(found["final_layer.linear.weight/moment1_0"]).max() > 0


class InputSeen(Exception):
    pass


def test_casting_the_model_cannot_round_the_frequencies(tiny_config):
    embedder, seen = TimestepEmbedder(tiny_config), []

    def catch(layer, inputs):
        seen.append(inputs[0])
        raise InputSeen

    embedder.mlp[0].register_forward_pre_hook(catch)
    timesteps = paddle.to_tensor([0, 1, 7, 250, 999])
    with pytest.raises(InputSeen):
        embedder(timesteps)
    embedder.to(dtype="bfloat16")
    with pytest.raises(InputSeen):
        embedder(timesteps)
    exact, rounded = seen
    frequencies = np.exp(-math.log(10000) * np.arange(128) / embedder.divisor)
    angles = timesteps.numpy()[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(exact.numpy(), expected, atol=2e-4)
    assert rounded.dtype == paddle.bfloat16
    np.testing.assert_array_equal(rounded.astype("float32").numpy(), exact.astype("bfloat16").astype("float32").numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_loss_of_a_half_precision_model_is_float32(tiny_config, dtype):
    latents, labels, _ = batch(tiny_config)
    random = np.random.default_rng(1)
    out = paddle.to_tensor(random.standard_normal((8, 8, 8, 8)).astype(np.float32)).astype(dtype)
    inputs = [paddle.to_tensor(latents), paddle.to_tensor(labels), paddle.to_tensor(random.integers(0, 1000, 8))]
    inputs.append(paddle.to_tensor(random.standard_normal(latents.shape).astype(np.float32)))
    half = GaussianDiffusion().training_losses(lambda *_: out, *inputs)
    wide = GaussianDiffusion().training_losses(lambda *_: out.astype("float32"), *inputs)
    assert {name: value.dtype for name, value in half.items()} == dict.fromkeys(("loss", "mse", "vb"), paddle.float32)
    for name, value in wide.items():
        np.testing.assert_array_equal(half[name].numpy(), value.numpy(), err_msg=name)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_half_precision_is_refused_on_the_cpu(dtype, level, monkeypatch):
    monkeypatch.setattr("paddle_dit.half_precision.has_gpu", lambda: False)
    Precision().check_device()
    with pytest.raises(ConfigError, match=f"--precision {dtype} needs a GPU"):
        Precision(dtype, level).check_device()
    monkeypatch.setattr("paddle_dit.half_precision.has_gpu", lambda: True)
    Precision(dtype, level).check_device()


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_every_forward_pass_is_under_paddles_autocast(tiny_config, monkeypatch, level):
    asked = []

    def auto_cast(**options):
        asked.append(options)
        return contextlib.nullcontext()

    monkeypatch.setattr(paddle.amp, "auto_cast", auto_cast)
    step = make_step(tiny_config, accumulation=2)
    step.backward(0, *batch(tiny_config))
    assert not asked
    step.precision = Precision("bf16", level)
    step.backward(0, *batch(tiny_config))
    assert asked == [{"dtype": "bfloat16", "level": level}] * 2


class Scaler:
    """A scaler of a fixed factor that is told which steps overflow."""

    factor = 1024.0

    def __init__(self, overflows):
        self.overflows = list(overflows)

    def scale(self, loss):
        return loss * self.factor

    @paddle.no_grad()
    def step(self, optimizer):
        if self.overflows.pop(0):
            return False
        for weight in optimizer._parameter_list:
            weight.grad.scale_(1 / self.factor)
        optimizer.step()
        return True


def state(step):
    """Return every array of a training step by name."""
    shadows = {f"ema:{name}": shadow.numpy() for name, shadow in step.ema.shadow.items()}
    return weights(step) | shadows | optimizer_tensors(step.optimizer, step.model)


def test_an_overflow_changes_nothing_and_the_next_step_is_as_if_it_had_not_been(tiny_config):
    scaled, plain = make_step(tiny_config), make_step(tiny_config)
    scaled.scaler = Scaler([False, True, False])
    for step in (scaled, plain):
        advance(step, 0, *batch(tiny_config))
    before = state(scaled)
    assert any(key.endswith("moment1_0") for key in before)

    scaled.backward(1, *batch(tiny_config))
    assert scaled.update(1) is False
    assert scaled.overflows == 1
    assert all(weight.grad is None or not weight.grad.any() for weight in scaled.model.parameters())
    for name, value in before.items():
        np.testing.assert_array_equal(state(scaled)[name], value, err_msg=name)

    scaled.backward(2, *batch(tiny_config))
    assert scaled.update(2) is True
    assert scaled.overflows == 1
    advance(plain, 2, *batch(tiny_config))
    after, expected = state(scaled), state(plain)
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert not np.array_equal(after["final_layer.linear.bias"], before["final_layer.linear.bias"])
