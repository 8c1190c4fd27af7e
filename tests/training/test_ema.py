"""The averaged weights: the formula, lending them to the model, and spreading them over ranks."""

import dataclasses

import numpy as np
import paddle
import pytest

from paddle_dit.models.dit import DiT
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.ranks import Ranks

SPREAD = """
import sys
import numpy as np
from paddle_dit import runtime
runtime.prepare()
import paddle
from paddle_dit.config import DiTConfig
from paddle_dit.models.dit import DiT
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.ranks import Ranks

ranks, folder = Ranks.join(), sys.argv[1]
paddle.seed(0)
model = DiT(DiTConfig(sample_size=8, patch_size=2, hidden_size=48, depth=2, num_heads=4, num_classes=10))
spread = ExponentialMovingAverage(model, 0.9, spread_over=ranks)
alone = ExponentialMovingAverage(model, 0.9)
for update in range(3):
    for weight in model.parameters():
        weight.set_value(weight * 1.5 + 0.1)
    spread.update(update)
    alone.update(update)
whole = {name: shadow.numpy() for name, shadow in spread.whole()}
with spread.applied():
    applied = {name: weight.numpy() for name, weight in model.named_parameters()}
for kind, arrays in (
    ("whole", whole),
    ("applied", applied),
    ("alone", {name: shadow.numpy() for name, shadow in alone.shadow.items()}),
    ("kept", {name: shadow.numpy() for name, shadow in spread.shadow.items()}),
    ("weights", {name: weight.numpy() for name, weight in model.named_parameters()}),
):
    np.savez(f"{folder}/{kind}-{ranks.rank}.npz", **arrays)
"""


def weights(model):
    return {name: weight.numpy() for name, weight in model.named_parameters()}


def shadows(ema):
    return {name: shadow.numpy() for name, shadow in ema.shadow.items()}


def shift(model):
    """Move every weight, so that it differs from its average."""
    for weight in model.parameters():
        weight.set_value(weight * 1.25 + 0.5)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_the_decay_is_constant_unless_it_warms_up(tiny_config):
    model = DiT(tiny_config)
    constant = ExponentialMovingAverage(model, 0.9999)
    assert [constant.decay_at(updates) for updates in (0, 5, 10**6)] == [0.9999] * 3
    warming = ExponentialMovingAverage(model, 0.9, warmup=True)
    assert [warming.decay_at(updates) for updates in (0, 5, 79, 80, 81, 10**6)] == pytest.approx(
        [1 / 10, 6 / 15, 80 / 89, 0.9, 0.9, 0.9]
    )


@pytest.mark.parametrize("warmup", [False, True])
def test_an_update_is_the_formula_and_leaves_the_weights_alone(tiny_config, warmup):
    model = DiT(tiny_config)
    ema = ExponentialMovingAverage(model, 0.9, warmup=warmup)
    expected = weights(model)
    for updates in range(4):
        shift(model)
        before = weights(model)
        ema.update(updates)
        assert_equal(weights(model), before)
        decay = min(0.9, (1 + updates) / (10 + updates)) if warmup else 0.9
        expected = {name: decay * value + (1 - decay) * before[name] for name, value in expected.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(shadows(ema)[name], value, atol=1e-6, rtol=1e-6, err_msg=name)


def test_other_weights_can_be_averaged_in_place_of_the_models(tiny_config):
    model = DiT(tiny_config)
    ema = ExponentialMovingAverage(model, 0.75)
    before = shadows(ema)
    ema.update(0, [(name, paddle.ones_like(weight)) for name, weight in model.named_parameters()])
    for name, value in before.items():
        np.testing.assert_allclose(shadows(ema)[name], 0.75 * value + 0.25, atol=1e-6, err_msg=name)


def test_the_first_shadow_is_a_copy(tiny_config):
    model = DiT(tiny_config)
    ema = ExponentialMovingAverage(model)
    before = weights(model)
    shift(model)
    assert_equal(shadows(ema), before)
    assert not np.array_equal(weights(model)["final_layer.linear.bias"], before["final_layer.linear.bias"])


@pytest.mark.parametrize("breaks", [False, True])
def test_lending_the_average_gives_the_weights_back_bit_for_bit(tiny_config, breaks):
    model = DiT(tiny_config)
    ema = ExponentialMovingAverage(model, 0.5)
    shift(model)
    ema.update()
    own, average = weights(model), shadows(ema)

    def look():
        with ema.applied():
            assert_equal(weights(model), average)
            if breaks:
                raise KeyError("in the block")

    if breaks:
        with pytest.raises(KeyError, match="in the block"):
            look()
    else:
        look()
    assert_equal(weights(model), own)
    assert_equal(shadows(ema), average)
    assert any(not np.array_equal(own[name], average[name]) for name in own)


def test_a_half_precision_model_is_lent_its_own_dtype(tiny_config):
    model = DiT(tiny_config)
    ema = ExponentialMovingAverage(model, 0.5)
    model.to(dtype="bfloat16")
    own = {name: weight.astype("float32").numpy() for name, weight in model.named_parameters()}
    with ema.applied():
        assert {weight.dtype for weight in model.parameters()} == {paddle.bfloat16}
    assert {shadow.dtype for shadow in ema.shadow.values()} == {paddle.float32}
    assert_equal({name: weight.astype("float32").numpy() for name, weight in model.named_parameters()}, own)


def test_saved_shadows_come_back(tiny_config):
    first, second = DiT(tiny_config), DiT(tiny_config)
    saved = shadows(ExponentialMovingAverage(first))
    ema = ExponentialMovingAverage(second)
    shift(second)
    ema.update()
    ema.restore(saved)
    assert_equal(shadows(ema), saved)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_keep_even_shares_and_every_weight_once(tiny_config, ranks):
    model = DiT(dataclasses.replace(tiny_config, depth=6))
    kept = [ExponentialMovingAverage(model, spread_over=Ranks(rank, ranks)).shadow for rank in range(ranks)]
    assert sorted(name for shadow in kept for name in shadow) == sorted(weights(model))
    sizes = [sum(shadow.size for shadow in shadows.values()) for shadows in kept]
    assert max(sizes) <= sum(sizes) / ranks + max(weight.size for weight in model.parameters())


@pytest.mark.distributed
def test_two_ranks_keep_half_each_and_yield_the_whole(run_command, tmp_path):
    (tmp_path / "worker.py").write_text(SPREAD)
    result = run_command(tmp_path / "worker.py", tmp_path, processes=2, log_dir=tmp_path / "launch_log")
    assert result.returncode == 0, result.stdout + result.stderr
    kept = [dict(np.load(tmp_path / f"kept-{rank}.npz")) for rank in (0, 1)]
    assert not kept[0].keys() & kept[1].keys()
    sizes = [sum(value.size for value in part.values()) for part in kept]
    assert 0.4 < sizes[0] / sum(sizes) < 0.6
    for rank in (0, 1):
        alone = dict(np.load(tmp_path / f"alone-{rank}.npz"))
        for kind in ("whole", "applied"):
            assert_equal(dict(np.load(tmp_path / f"{kind}-{rank}.npz")), alone)
        own = dict(np.load(tmp_path / f"weights-{rank}.npz"))
        assert not np.array_equal(own["final_layer.linear.bias"], alone["final_layer.linear.bias"])


def test_a_weight_that_moved_to_another_tensor_meanwhile_gets_its_own_value_back(tiny_config):
    """As ZeRO's third stage does in every forward pass."""

    class Moving(DataParallel):
        held = None

        def carrier(self, parameter):
            return parameter if self.held is None else self.held.setdefault(parameter.name, parameter.clone())

    model, parallel = DiT(tiny_config), Moving()
    ema = ExponentialMovingAverage(model)
    before = {weight.name: weight.numpy().copy() for weight in model.parameters()}
    for shadow in ema.shadow.values():
        shadow.fill_(3.0)
    with ema.applied(parallel):
        parallel.held = {}
    for name, value in before.items():
        np.testing.assert_array_equal(parallel.held[name].numpy(), value)
