"""Training some parameters only: what moves, what is kept of it, and what it is said to cost."""

import gc
import math

import numpy as np
import paddle
import pytest

from paddle_dit.config import DiTConfig
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import ConfigError
from paddle_dit.models.dit import DiT
from paddle_dit.models.refit import parameter_shapes
from paddle_dit.training.costs import Setup, memory, train_flops
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.frozen import count_trained, flops_of, freeze, memory_of, trained_names
from paddle_dit.training.optimizer import build_optimizer, optimizer_tensors
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.step import TrainingStep

BIASES = ("*bias*", "y_embedder*", "final_layer*")


def make_step(config, patterns, recompute=0):
    paddle.seed(0)
    model, random = DiT(config, recompute_every=recompute), np.random.default_rng(0)
    for weight in model.parameters():  # the initial zeros would hide errors
        weight.set_value(random.normal(0, 0.1, weight.shape).astype(np.float32))
    freeze(model, patterns)
    optimizer, ema = build_optimizer(TrainRecipe(), model), ExponentialMovingAverage(model, 0.9)
    return TrainingStep(model, GaussianDiffusion(), optimizer, ema, DataParallel(), seed=0)


def backward(step, samples=4):
    latents = np.random.default_rng(1).standard_normal((samples, *step.model.config.sample_shape))
    return step.backward(0, latents.astype(np.float32), np.arange(samples), np.arange(samples))


def gradients(config, patterns, recompute=0):
    step = make_step(config, patterns, recompute)
    backward(step)
    return {name: weight.grad.numpy() for name, weight in step.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("patterns", [BIASES, ("blocks.1.*",), ("blocks.0.mlp.fc2.bias",), ("*weight",), ()])
def test_what_trains_has_the_gradients_of_training_everything_and_the_rest_has_none(tiny_config, patterns, recompute):
    whole, found = gradients(tiny_config, ()), gradients(tiny_config, patterns, recompute)
    assert found.keys() == trained_names(whole, patterns)
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, whole[name], atol=1e-5 * np.abs(whole[name]).max(), err_msg=name)


def test_an_update_moves_what_trains_and_nothing_else(tiny_config):
    step = make_step(tiny_config, BIASES)
    before = {name: weight.numpy() for name, weight in step.model.named_parameters()}
    for number in range(3):
        backward(step)
        step.update(number)
    trained = trained_names(before, BIASES)
    for name, weight in step.model.named_parameters():
        assert np.array_equal(weight.numpy(), before[name]) == (name not in trained), name
        assert np.array_equal(step.ema.shadow[name].numpy(), before[name]) == (name not in trained), name
    state = optimizer_tensors(step.optimizer, step.model)
    assert {key.rpartition("/")[0] for key in state} == trained


def test_a_pattern_that_matches_nothing_names_what_is_near(tiny_config):
    names = parameter_shapes(tiny_config)
    assert trained_names(names, ()) == set(names)
    for pattern, told in (
        ("y_embeder*", r"'y_embeder\*' matches no parameter; try '\*y_embedder\*'"),
        ("attn", r"try '\*attn\*'"),
        ("zzz", r"try '\*bias\*', 'y_embedder\*'"),
        ("*BIAS*", "matches no parameter"),
    ):
        with pytest.raises(ConfigError, match=told):
            trained_names(names, ("*bias*", pattern))


def allocated():
    return paddle.base.core.host_memory_stat_current_value("Allocated", 0)


def test_what_stays_allocated_is_as_planned():
    config = DiTConfig.from_preset("DiT-S/8")
    gc.collect()
    before = allocated()
    step = make_step(config, BIASES)
    backward(step)
    step.update(0)
    backward(step)
    gc.collect()
    tables = sum(table.size * 4 for table in step.objective._tables.values())
    plan = memory_of(config, Setup(4, device="cpu"), BIASES)
    planned = plan.weights + plan.gradients + plan.optimizer + plan.ema
    trained, of = count_trained(config, BIASES)
    assert (plan.gradients, plan.optimizer) == (4 * trained, 8 * trained)
    assert trained < 0.1 * of
    assert allocated() - before - tables == pytest.approx(planned, rel=0.002)


def test_a_plan_without_patterns_is_the_plan_of_everything():
    config, setup = DiTConfig.from_preset("DiT-XL/2"), Setup(32, 8, precision="bf16", amp_level="O2")
    assert memory_of(config, setup, ()) == memory(config, setup)
    assert memory_of(config, setup, ("*",)) == memory(config, setup)
    assert flops_of(config, ()) == train_flops(config)
    assert count_trained(config, ())[0] == count_trained(config, ("*",))[0]


def test_tensor_parallel_ranks_share_what_trains_of_the_blocks_matrices():
    config, setup = DiTConfig.from_preset("DiT-S/2"), Setup(8, 2, tensor_parallel_degree=2)
    assert memory_of(config, setup, ("*",)) == memory(config, setup)
    alone = memory_of(config, Setup(8), ("*fc1*",))
    assert memory_of(config, setup, ("*fc1*",)).optimizer * 2 == alone.optimizer


def test_frozen_matrices_save_one_product_of_three():
    config = DiTConfig(sample_size=8, patch_size=2, hidden_size=48, depth=3, num_heads=4, num_classes=10)
    rest = 2.0 * config.multiply_adds() - flops_of(config, ("*bias*",)) + 4.0 * config.multiply_adds()
    scores = 3 * 2 * 16 * 16 * 48  # of attention: products of two activations
    assert rest == pytest.approx(2.0 * (config.multiply_adds() - scores))
    names = parameter_shapes(config)
    assert all(flops_of(config, (name,)) <= train_flops(config) for name in names)
    assert math.isclose(flops_of(config, ("*weight",)), train_flops(config))
