"""The planner against what Paddle allocates, and against published figures."""

import gc
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddle_dit.config import DiTConfig
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import ConfigError
from paddle_dit.models import fused
from paddle_dit.models.dit import DiT
from paddle_dit.training.costs import PEAK_TFLOPS, Memory, Setup, memory, seconds_per_step, train_flops
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.optimizer import build_optimizer
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.step import TrainingStep

XL2 = DiTConfig.from_preset("DiT-XL/2")
GIGA = 1e9


def make_step(config, recompute=0):
    model = DiT(config, recompute_every=recompute)
    optimizer, ema = build_optimizer(TrainRecipe(), model), ExponentialMovingAverage(model)
    return TrainingStep(model, GaussianDiffusion(), optimizer, ema, DataParallel(), seed=0)


def backward(step, samples):
    latents = np.random.default_rng(0).standard_normal((samples, *step.model.config.sample_shape))
    step.backward(0, latents.astype(np.float32), np.zeros(samples, np.int64), np.arange(samples))


def update(step):
    step.optimizer.step()
    step.optimizer.clear_grad()


def first_step(config, samples, recompute=0):
    """Return a step that has been made once, so that gradients and optimizer state are there."""
    step = make_step(config, recompute)
    backward(step, samples)
    update(step)
    gc.collect()
    return step


def allocated(which="current"):
    """What Paddle holds for tensors, or has held at most since the last reset."""
    return getattr(paddle.base.core, f"host_memory_stat_{which}_value")("Allocated", 0)


def measured_activations(step, samples):
    """Bytes that a step adds at its peak to what is there before it."""
    paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
    before = allocated()
    backward(step, samples)
    update(step)
    return allocated("peak") - before


def planned_activations(config, samples, recompute):
    return memory(config, Setup(samples, recompute_every=recompute, device="cpu")).activations


def test_what_stays_allocated_is_as_planned():
    gc.collect()
    before = allocated()
    config = DiTConfig.from_preset("DiT-S/8")
    step = first_step(config, 2)
    tables = sum(table.size * 4 for table in step.objective._tables.values())
    backward(step, 2)
    plan = memory(config, Setup(2, device="cpu"))
    moments = (tensor for slot in step.optimizer._accumulators.values() for tensor in slot.values())
    held = {
        "weights": [*step.model.parameters(), *step.model.buffers()],
        "gradients": [parameter.grad for parameter in step.model.parameters()],
        "optimizer": moments,
        "ema": step.ema.shadow.values(),
    }
    for name, tensors in held.items():
        assert getattr(plan, name) == pytest.approx(
            sum(tensor.size * tensor.element_size() for tensor in tensors), 1e-4
        )
    assert plan.total - plan.activations == pytest.approx(allocated() - before - tables, rel=0.02)


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize(
    ("changes", "samples"),
    [
        ({}, 64),
        ({"depth": 4, "sample_size": (16, 8), "mlp_ratio": 2.0}, 16),
        ({"sample_size": 32, "hidden_size": 48}, 4),  # so many scores that attention has the peak
        ({"patch_size": 1, "learn_sigma": False, "num_classes": 0}, 16),
        ({"depth": 2, "hidden_size": 16, "patch_size": 8, "sample_size": 32}, 16),  # the loss has the peak
        ({"depth": 2, "hidden_size": 16, "patch_size": 8, "sample_size": 32, "learn_sigma": False}, 16),  # here too
    ],
)
def test_activations_of_small_models_are_as_planned(changes, samples, recompute):
    config = DiTConfig.from_preset("DiT-Digits/2", **changes)
    measured = measured_activations(first_step(config, samples, recompute), samples)
    assert planned_activations(config, samples, recompute) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(("recompute", "blocks_at_peak"), [(0, 3), (1, 1)])
@pytest.mark.parametrize("changes", [{"sample_size": 16}, {"patch_size": 1, "learn_sigma": False}])
def test_activations_of_the_gpus_operations_are_as_planned(monkeypatch, changes, recompute, blocks_at_peak):
    monkeypatch.setattr(fused, "_by_hand", lambda *tensors: False)
    config, samples = DiTConfig.from_preset("DiT-Digits/2", **changes), 16
    measured = measured_activations(first_step(config, samples, recompute), samples)
    plan = memory(config, Setup(samples, recompute_every=recompute, device="gpu"))
    # The CPU has no flash attention: it keeps a softmax [heads, T, T] in the place of the log-sum-exp [heads, T].
    tokens = math.prod(config.grid)
    softmax = 4 * samples * config.num_heads * tokens * (tokens - 1)
    assert plan.activations + blocks_at_peak * softmax == pytest.approx(measured, rel=0.01)


def resident(field):
    """Bytes that the system counts for this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_process(preset, samples, recompute):
    """Return the activations as Paddle counts them, and the growth of the process that they make."""
    step = first_step(DiTConfig.from_preset(preset), samples, recompute)
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    before = resident("VmRSS")
    return measured_activations(step, samples), resident("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("preset", "samples", "recompute"),
    [
        ("DiT-S/8", 32, 0),
        pytest.param("DiT-S/4", 16, 2, marks=pytest.mark.slow),
        pytest.param("DiT-S/4", 16, 1, marks=pytest.mark.slow),
        pytest.param("DiT-S/2", 4, 0, marks=pytest.mark.slow),
    ],
)
def test_activations_are_what_a_process_grows_by(monkeypatch, preset, samples, recompute):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # every tensor goes back to the system when it is freed
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        allocated_bytes, grown = process.submit(measure_process, preset, samples, recompute).result()
    planned = planned_activations(DiTConfig.from_preset(preset), samples, recompute)
    assert planned == pytest.approx(allocated_bytes, rel=0.02)
    assert planned == pytest.approx(grown, rel=0.2)


def test_xl_takes_the_published_operations():
    assert train_flops(XL2) == pytest.approx(711.7 * GIGA, rel=1e-3)
    assert train_flops(XL2, 1) == pytest.approx(8 / 6 * train_flops(XL2), rel=5e-3)
    assert train_flops(XL2, 1) < 8 / 6 * train_flops(XL2)  # embedders and final layer are never recomputed


@pytest.mark.parametrize(("every", "recomputed"), [(1, 7), (2, 4), (3, 3), (7, 1), (9, 1)])
def test_each_recomputed_block_costs_a_forward_pass_more(every, recomputed):
    config = DiTConfig(depth=7)
    block = DiTConfig(depth=8).multiply_adds() - config.multiply_adds()
    assert train_flops(config, every) - train_flops(config) == pytest.approx(2 * recomputed * block)


@pytest.mark.parametrize(("card", "images_per_second"), [("A100", 438), ("H100", 1390)])
def test_ceilings_of_training_xl(card, images_per_second):
    eight = Setup(samples_per_micro_batch=32, ranks=8)
    seconds = seconds_per_step(XL2, eight, 256, PEAK_TFLOPS[card])
    assert 256 / seconds / 8 == pytest.approx(images_per_second, rel=2e-3)


def test_recomputing_takes_time():
    plain, full = (seconds_per_step(XL2, Setup(32, recompute_every=every), 32, 100) for every in (0, 1))
    assert full / plain == pytest.approx(train_flops(XL2, 1) / train_flops(XL2))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_recomputing_fewer_blocks_saves_less(device):
    by_every = [memory(XL2, Setup(8, recompute_every=every, device=device)).activations for every in (1, 2, 4, 28, 0)]
    assert by_every == sorted(set(by_every))
    assert by_every[0] < 0.15 * by_every[-1]


def parts(plan: Memory, unit: int) -> tuple:
    names = ("weights", "gradients", "optimizer", "master_weights", "ema")
    return tuple(getattr(plan, name) / unit for name in names)


# Bytes per trained parameter: weights, gradients, optimizer, master weights, EMA.
@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (Setup(1), (4, 4, 8, 0, 4)),
        (Setup(1, precision="bf16", amp_level="O1"), (4, 4, 8, 0, 4)),
        (Setup(1, precision="bf16"), (2, 2, 8, 4, 4)),
        (Setup(1, ranks=8, precision="fp16"), (2, 2, 8, 4, 4)),
        (Setup(1, ranks=8, precision="bf16", sharding="stage1"), (2, 2, 1, 0.5, 0.5)),
        (Setup(1, ranks=8, precision="bf16", sharding="stage2"), (2, 0.25, 1, 0.5, 0.5)),
        (Setup(1, ranks=8, precision="bf16", sharding="stage3"), (0.25, 0.25, 1, 0.5, 0.5)),
    ],
)
def test_precision_and_sharding_set_the_bytes_per_parameter(setup, expected):
    table = 256 * 1152  # the position table is no parameter: beside the weights alone, and never sharded
    trained = XL2.num_parameters() - table
    held = 2 if setup.precision != "fp32" and setup.amp_level == "O2" else 4
    plan = memory(XL2, setup)
    assert plan.weights - table * held == pytest.approx(expected[0] * trained, abs=8)
    assert parts(plan, trained)[1:] == pytest.approx(expected[1:], rel=1e-6)
    assert plan.total == sum(parts(plan, 1)) + plan.activations


def test_tensor_parallel_ranks_share_the_matrices_of_the_blocks(tiny_config):
    shared = ("attn.qkv", "mlp.fc1", "attn.proj.weight", "mlp.fc2.weight")  # biases of proj and fc2 are on every rank
    mine = sum(
        parameter.size // 2 if any(name in key for name in shared) else parameter.size
        for key, parameter in DiT(tiny_config).named_parameters()
    )
    plan = memory(tiny_config, Setup(1, ranks=4, tensor_parallel_degree=2))
    assert (plan.gradients, plan.ema) == (4 * mine, 4 * mine)
    halved = memory(tiny_config, Setup(1, ranks=4, tensor_parallel_degree=2, sharding="stage1"))
    assert halved.optimizer == 4 * mine  # two data-parallel ranks, not four, share the eight bytes


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_tensor_parallel_ranks_share_what_lies_between_the_matrices(device):
    whole, half = (
        memory(XL2, Setup(8, ranks=2, tensor_parallel_degree=degree, device=device)).activations for degree in (1, 2)
    )
    assert 0.5 * whole < half < 0.8 * whole


def test_half_precision_halves_the_matrix_products_alone():
    fp32, o1, o2 = (
        memory(XL2, Setup(8, precision=precision, amp_level=level)).activations
        for precision, level in (("fp32", "O2"), ("bf16", "O1"), ("bf16", "O2"))
    )
    assert 0.5 * fp32 < o2 < o1 < 0.9 * fp32


def test_activations_grow_with_the_micro_batch():
    one, two, three = (memory(XL2, Setup(samples)).activations for samples in (1, 2, 3))
    assert three - two == pytest.approx(two - one, abs=2)
    assert two - one == pytest.approx(one, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_micro_batch": 0}, "samples_per_micro_batch must be 1 or more"),
        ({"recompute_every": -1}, "recompute_every must be 0 or more"),
        ({"ranks": 3, "tensor_parallel_degree": 2}, "ranks 3 must be a multiple"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16"),
        ({"sharding": "stage4"}, "sharding must be one of none, stage1"),
        ({"precision": "bf16", "device": "cpu"}, "needs a GPU"),
    ],
)
def test_impossible_setups_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Setup(**{"samples_per_micro_batch": 1, **changes})


def test_heads_must_divide_among_tensor_parallel_ranks():
    with pytest.raises(ConfigError, match="tensor_parallel_degree 3 must divide 16 heads"):
        memory(XL2, Setup(1, ranks=3, tensor_parallel_degree=3))


def test_planning_needs_no_paddle(run_command):
    program = (
        "import sys; from paddle_dit.config import DiTConfig; from paddle_dit.training.costs import Setup, memory;"
        "memory(DiTConfig(depth=1000, hidden_size=16384), Setup(64)); print('paddle' in sys.modules)"
    )
    result = run_command("-c", program)
    assert result.stdout.strip() == "False", result.stderr
