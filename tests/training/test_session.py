"""A run from its recipe to its log and checkpoints, in this process."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from paddle_dit.checkpoint import newest_checkpoint, open_checkpoint
from paddle_dit.data.source import open_source
from paddle_dit.data.store import StoreWriter
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import CheckpointError, ConfigError, PaddleDiTError
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.loop import train
from paddle_dit.training.plan import make_plan
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.session import start_session

BAD = 21  # the sample that makes the loss infinite


@pytest.fixture
def run(latent_store, tmp_path):
    """Return a function that trains on the random store into ``tmp_path / name``."""

    def run(name="run", **changes):
        options = {"model": "DiT-Digits/2", "global_batch_size": 16, "log_every": 1, "image_logging_steps": -1}
        options |= {"feature_path": latent_store, "output_dir": tmp_path / name, "num_workers": 0, **changes}
        start_session(make_plan(TrainRecipe(**options))).run(train)
        return tmp_path / name

    return run


def log(folder, name="loss"):
    """Return step -> figure, of the lines that have it."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def tensors(folder, step):
    return {
        f"{kind}:{name}": value
        for kind in ("model", "ema", "optimizer")
        for name, value in load_file(folder / f"checkpoint-{step}" / f"{kind}.safetensors").items()
    }


def assert_same(run, other, step):
    expected, found = tensors(run, step), tensors(other, step)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def store_with(sample, folder):
    """Write 64 latents, ``sample`` among them."""
    latents = np.random.default_rng(0).standard_normal((64, 4, 8, 8)).astype(np.float32)
    latents[BAD] = sample
    with StoreWriter(folder, sample_shape=(4, 8, 8), dtype="float32", num_classes=10) as store:
        store.append(latents, np.arange(64) % 10)
    return folder


@pytest.fixture
def overflowing_store(tmp_path):
    """Write a finite sample that no one notices before its loss is infinite, at any timestep."""
    return store_with(1e30 * np.random.default_rng(1).standard_normal((4, 8, 8)), tmp_path / "overflowing")


def steps_with(sample, store, steps, **recipe):
    """Return the updates, counted from 1, that hold a sample."""
    plan = make_plan(
        TrainRecipe(model="DiT-Digits/2", feature_path=store, global_batch_size=16, dry_run=True, **recipe)
    )
    return [step + 1 for step in range(steps) if sample in plan.order.global_batch(step)]


def test_skipped_steps_leave_the_run_as_it_was_and_are_counted(run, overflowing_store, capsys):
    skipped = steps_with(BAD, overflowing_store, 8)
    assert len(skipped) == 2
    folder = run(feature_path=overflowing_store, max_steps=8, ckpt_every=1, max_skipped_steps=2, ema_decay=0.5)
    told = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert told == [
        f"the loss is not finite at step {step - 1}, samples {BAD}: skipped ({number} of 2)"
        for number, step in enumerate(skipped, 1)
    ]
    losses = log(folder)
    assert [step for step, loss in losses.items() if loss is None] == skipped
    assert log(folder, "skipped_steps") == {step: sum(bad <= step for bad in skipped) for step in range(1, 9)}
    assert json.loads((folder / "checkpoint-8" / "state.json").read_text())["skipped_steps"] == 2
    for step in range(2, 9):
        before, after = tensors(folder, step - 1), tensors(folder, step)
        assert all(np.isfinite(value).all() for value in after.values())
        if step in skipped:
            for name, value in before.items():
                np.testing.assert_array_equal(after[name], value, err_msg=name)
        else:
            for name in ("model:final_layer.linear.weight", "ema:final_layer.linear.weight"):
                assert not np.array_equal(after[name], before[name])


def test_the_count_of_skipped_steps_survives_a_resume(run, overflowing_store):
    first, second = steps_with(BAD, overflowing_store, 8)
    limits = {"feature_path": overflowing_store, "max_skipped_steps": 1}
    run(**limits, max_steps=first)
    with pytest.raises(PaddleDiTError, match=rf"not finite at step {second - 1}, samples {BAD}; .*--max-skipped-steps"):
        run(**limits, max_steps=8)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(run, tmp_path):
    """A sample that the norm of the first block flattens: the loss is finite, its gradient is not."""
    store = store_with(1e30, tmp_path / "huge")
    assert 1 in steps_with(BAD, store, 1)
    folder = run(feature_path=store, max_steps=2, max_skipped_steps=2)
    assert all(np.isfinite(value).all() for value in tensors(folder, 2).values())


@pytest.mark.parametrize("allowed", [0, 1])
def test_one_more_than_allowed_stops_with_the_last_checkpoint_whole(run, overflowing_store, tmp_path, allowed):
    fatal = steps_with(BAD, overflowing_store, 8)[allowed]
    with pytest.raises(PaddleDiTError, match=f"not finite at step {fatal - 1}, samples {BAD};"):
        run(feature_path=overflowing_store, max_steps=8, ckpt_every=1, max_skipped_steps=allowed)
    kept = newest_checkpoint(tmp_path / "run") if fatal > 1 else None
    assert (kept.step if kept else 0) == fatal - 1
    assert not kept or all(np.isfinite(value).all() for value in tensors(tmp_path / "run", kept.step).values())


def test_samples_are_named_by_their_place_in_the_folder_when_some_are_held_out(run, overflowing_store, capsys):
    held_out = {"eval_steps": 100, "held_out_samples": 5}
    plan = make_plan(
        TrainRecipe(
            model="DiT-Digits/2", feature_path=overflowing_store, global_batch_size=16, dry_run=True, **held_out
        )
    )
    assert BAD in plan.source.indices
    assert plan.source.indices[BAD] != BAD
    run(feature_path=overflowing_store, max_steps=3, max_skipped_steps=3, **held_out)
    assert f"samples {BAD}: skipped (1 of 3)" in capsys.readouterr().out


def test_nothing_is_sent_before_the_last_micro_batch(run, monkeypatch):
    happened, losses, reduce = [], GaussianDiffusion.training_losses, DataParallel.reduce_gradients
    monkeypatch.setattr(
        GaussianDiffusion, "training_losses", lambda *inputs: happened.append("forward") or losses(*inputs)
    )
    monkeypatch.setattr(DataParallel, "reduce_gradients", lambda *inputs: happened.append("send") or reduce(*inputs))
    parts = run("parts", max_steps=3, accumulation=4)
    assert happened == [*["forward"] * 4, "send"] * 3
    whole = run("whole", max_steps=3)
    assert log(parts) == pytest.approx(log(whole), abs=1e-5)
    expected, found = tensors(whole, 3), tensors(parts, 3)
    for name in (name for name in expected if not name.startswith("optimizer")):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


def test_evaluating_does_not_disturb_training(run):
    options = {"max_steps": 6, "held_out_samples": 17, "ema_decay": 0.5}
    often, seldom = run("often", eval_steps=2, **options), run("seldom", eval_steps=5, **options)
    assert log(often) == log(seldom)
    assert sorted(log(often, "eval_loss")) == [2, 4, 6]
    assert sorted(log(seldom, "eval_loss")) == [5, 6]
    assert log(often, "eval_loss")[6] == log(seldom, "eval_loss")[6]
    assert log(often, "eval_loss_ema")[6] == log(seldom, "eval_loss_ema")[6]
    assert log(often, "eval_loss")[6] != log(often, "eval_loss_ema")[6]
    assert_same(often, seldom, 6)


def test_samples_of_their_own_can_be_evaluated(run, tmp_path):
    with StoreWriter(tmp_path / "other", sample_shape=(4, 8, 8), dtype="float32", num_classes=10) as store:
        store.append(np.random.default_rng(9).standard_normal((7, 4, 8, 8)).astype(np.float32), np.arange(7))
    apart = run("apart", eval_steps=2, eval_path=tmp_path / "other", max_steps=4)
    alone = run("alone", max_steps=4)
    assert log(apart) == log(alone)
    assert sorted(log(apart, "eval_loss")) == [2, 4]
    assert_same(apart, alone, 4)


def test_evaluation_samples_must_fit_the_data(run, tmp_path):
    with StoreWriter(tmp_path / "other", sample_shape=(4, 16, 16), dtype="float32", num_classes=10) as store:
        store.append(np.zeros((7, 4, 16, 16), np.float32), np.arange(7))
    with pytest.raises(PaddleDiTError, match=r"\[4, 16, 16\]"):
        run(eval_steps=2, eval_path=tmp_path / "other", max_steps=4)
    with pytest.raises(PaddleDiTError, match="no folder"):
        run(eval_steps=2, eval_path=tmp_path / "missing", max_steps=4)
    with pytest.raises(PaddleDiTError, match="too few to hold out 64"):
        run(eval_steps=2, held_out_samples=64, max_steps=4)
    assert not (tmp_path / "run").exists()


def test_held_out_samples_are_those_that_training_leaves_out(latent_store):
    options = {"model": "DiT-Digits/2", "feature_path": latent_store, "global_batch_size": 16, "dry_run": True}
    plan = make_plan(TrainRecipe(eval_steps=1, held_out_samples=17, **options))
    everything = open_source(latent_store)
    held_out = {sample.tobytes() for sample in plan.validation.gather(np.arange(17))[0]}
    trained = {
        sample.tobytes() for step in range(40) for sample in plan.source.gather(plan.order.global_batch(step))[0]
    }
    assert not held_out & trained
    assert held_out | trained == {sample.tobytes() for sample in everything.gather(np.arange(64))[0]}


def test_the_log_tells_speed_and_memory(run):
    folder = run(max_steps=4, log_every=2)
    config = open_checkpoint(folder / "checkpoint-4").info.config
    rates = log(folder, "images_per_second")
    assert sorted(rates) == [2, 4]
    assert log(folder, "images_per_second_per_card") == rates
    assert log(folder, "tflops_per_card") == pytest.approx(
        {step: rate * 6 * config.multiply_adds() / 1e12 for step, rate in rates.items()}
    )
    assert all(0 <= share <= 1 for share in log(folder, "data_wait").values())
    assert all(1 < mib < 10_000 for mib in log(folder, "peak_memory_mib").values())
    assert log(folder, "learning_rate") == {2: 1e-4, 4: 1e-4}


def test_only_as_many_checkpoints_as_asked_for_are_kept(run):
    assert checkpoints(run("two", max_steps=5, ckpt_every=1, save_total_limit=2)) == ["checkpoint-4", "checkpoint-5"]
    assert checkpoints(run("all", max_steps=3, ckpt_every=1)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_run_goes_on_from_the_checkpoint_that_is_named(run):
    options = {"max_steps": 6, "ckpt_every": 2}
    folder = run(**options)
    expected, losses = tensors(folder, 6), log(folder)
    run(**options, resume_from_checkpoint=folder / "checkpoint-2")
    assert checkpoints(folder / "previous-1") == ["checkpoint-4", "checkpoint-6"]
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert log(folder) == losses
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors(folder, 6)[name], value, err_msg=name)


def test_another_runs_checkpoint_can_be_gone_on_from(run):
    first = run("first", max_steps=4, ckpt_every=2)
    second = run("second", max_steps=4, ckpt_every=2, resume_from_checkpoint=first / "checkpoint-2")
    assert sorted(log(second)) == [3, 4]
    assert_same(first, second, 4)


def test_a_damaged_checkpoint_is_not_gone_on_from_and_nothing_is_moved(run):
    folder = run(max_steps=4, ckpt_every=2)
    (folder / "checkpoint-2" / "ema.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        run(max_steps=4, ckpt_every=2, resume_from_checkpoint=folder / "checkpoint-2")
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    assert not list(folder.glob("previous-*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sharding": "stage2"}, "--sharding stage2 needs GPUs; leave it out on the CPU"),
        ({"precision": "bf16"}, "--precision bf16 needs a GPU"),
        ({"precision": "fp16", "amp_level": "O2"}, "--precision fp16 needs a GPU"),
        ({"tensor_parallel_degree": 3}, "--tensor-parallel-degree 3 does not divide the 1 launched ranks"),
        ({"global_batch_size": 16, "accumulation": 3}, "not divisible by 1 ranks x 3 micro-batches"),
        ({"sharding": "stage1", "tensor_parallel_degree": 2}, "cannot be combined"),
    ],
)
def test_what_cannot_run_here_is_refused_before_anything_is_written(run, tmp_path, change, told):
    with pytest.raises(ConfigError, match=told):
        run(max_steps=2, **change)
    assert not (tmp_path / "run").exists()
