"""Tensor parallelism: the layout by itself, and two and four real processes against one."""

import dataclasses

import numpy as np
import pytest

from paddle_dit.config import PRESETS, DiTConfig
from paddle_dit.errors import ConfigError
from paddle_dit.models.dit import DiT
from paddle_dit.training.parallel import PLAN, Cut, TensorParallel, cut_of
from paddle_dit.training.ranks import Ranks
from tests.training.parallel_worker import CLIPPED, CONFIG, FREE, Run, trained

WORKER = "tests/training/parallel_worker.py"
CUT_IN_A_BLOCK = {"attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc1.bias"}
CUT_IN_A_BLOCK |= {"mlp.fc2.weight"}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("cut", [Cut(0, 3), Cut(1, 3), Cut(1)])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_layouts_are_each_others_inverse(cut, degree):
    array = np.arange(24 * 48).reshape(24, 48)
    arranged = cut.by_owner(array, degree)
    assert arranged.shape == array.shape
    np.testing.assert_array_equal(cut.in_usual_order(arranged, degree), array)
    if cut.parts == 1:
        np.testing.assert_array_equal(arranged, array)


def test_each_process_gets_whole_heads_in_the_usual_layout():
    heads, size, degree = 6, 8, 3
    bias = np.arange(3 * heads * size)
    arranged = Cut(0, parts=3).by_owner(bias, degree)
    for owner, own in enumerate(np.split(arranged, degree)):
        expected = bias.reshape(3, heads, size)[:, 2 * owner : 2 * owner + 2]
        np.testing.assert_array_equal(own.reshape(3, 2, size), expected)


def test_the_plan_cuts_the_blocks_matrices_and_nothing_else():
    names = [name for name, _ in DiT(CONFIG).named_parameters()]
    cut = {name for name in names if cut_of(name)}
    assert cut == {f"blocks.{block}.{name}" for block in range(CONFIG.depth) for name in CUT_IN_A_BLOCK}
    assert len(PLAN) == len(CUT_IN_A_BLOCK)  # no pattern is idle


def test_what_belongs_to_a_parameter_follows_its_layout():
    parallel, name = TensorParallel(Ranks(0, 2, 2)), "blocks.0.attn.qkv.bias"
    bias = np.arange(144.0)
    np.testing.assert_array_equal(parallel.arranged(f"{name}/moment1_0", bias), parallel.arranged(name, bias))
    assert (parallel.arranged(name, bias) != bias).any()
    np.testing.assert_array_equal(parallel.arranged(f"{name}/beta1_pow_acc_0", np.ones(1)), np.ones(1))
    np.testing.assert_array_equal(parallel.arranged("final_layer.linear.bias", bias), bias)


def test_a_degree_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="does not divide the number of processes, 4: launch a multiple of 3"):
        TensorParallel(Ranks(0, 4, 3))
    TensorParallel(Ranks(0, 2, 2)).check(CONFIG)
    with pytest.raises(ConfigError, match="3 does not divide the model's 4 attention heads"):
        TensorParallel(Ranks(0, 3, 3)).check(CONFIG)
    with pytest.raises(ConfigError, match="4 does not divide the model's 54 hidden units"):
        TensorParallel(Ranks(0, 4, 4)).check(dataclasses.replace(CONFIG, mlp_ratio=1.125))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_shared_by_two(name):
    TensorParallel(Ranks(0, 2, 2)).check(DiTConfig.from_preset(name))


def check_processes(run_command, folder, processes):
    """Run the worker on ``processes`` ranks, two to a model, and compare what it wrote to a single process."""
    result = run_command(WORKER, 2, folder, processes=processes, log_dir=folder / "launch_log")
    assert result.returncode == 0, result.stdout + result.stderr
    found = {name: dict(np.load(folder / f"{name}.npz")) for name in ("start", "once", "twice", "resumed")}

    run = Run(1, CLIPPED)
    assert_close(found["start"], run.arrays(), 0)
    for rank in range(processes):
        held = dict(np.load(folder / f"rank-{rank}.npz"))
        drawn = run.drawn(row=rank // 2)
        np.testing.assert_allclose(held["drawn"], drawn, atol=1e-5 * np.abs(drawn).max(), rtol=0)
        for name, weight in run.model.named_parameters():
            pieces = [2 if cut_of(name) and cut_of(name).axis == axis else 1 for axis in range(weight.ndim)]
            np.testing.assert_array_equal(held[name] * pieces, weight.shape, err_msg=name)

    for name, expected in (("once", trained(run)), ("twice", trained(Run(2, FREE)))):
        assert_close(found[name], expected, 1e-5)
        for key, value in expected.items():
            if "moment" in key:  # follow the gradients' scale, unlike Adam's weights
                np.testing.assert_allclose(
                    found[name][key], value, atol=1e-3 * np.abs(value).max(), rtol=0, err_msg=key
                )
    uninterrupted = found["once"] | {"losses": found["once"]["losses"][3:]}
    assert_close(found["resumed"], uninterrupted, 0)


@pytest.mark.distributed
def test_two_processes_share_a_model(run_command, tmp_path):
    check_processes(run_command, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_pairs_share_the_data(run_command, tmp_path):
    check_processes(run_command, tmp_path, 4)
