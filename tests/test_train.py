"""train.py as a user runs it: real processes on small data."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from paddle_dit.data.store import StoreWriter

ARGUMENTS = ["train.py", "--model", "DiT-Digits/2", "--global-batch-size", "16", "--log-every", "1"]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder, step, name="model"):
    return load_file(folder / f"checkpoint-{step}" / f"{name}.safetensors")


def assert_same(run, other, step, atol=0.0):
    np.testing.assert_allclose(losses(other), losses(run), atol=atol, rtol=0)
    for kind in ("model", "ema"):
        for name, value in weights(run, step, kind).items():
            np.testing.assert_allclose(weights(other, step, kind)[name], value, atol=atol, rtol=0, err_msg=name)


@pytest.fixture
def train(run_command, run_here, latent_store, tmp_path):
    """Return a function that trains on the random store into ``tmp_path / name``."""

    def train(name, *flags, processes=1):
        folder = tmp_path / name
        command = [*ARGUMENTS, "--feature-path", latent_store, "--output-dir", folder, *flags]
        if processes == 1:
            return folder, run_here(*command)
        return folder, run_command(*command, processes=processes, log_dir=tmp_path / "launch_log")

    return train


@pytest.mark.distributed
def test_two_processes_train_like_one(train):
    one, first = train("one", "--max-steps", "20")
    two, second = train("two", "--max-steps", "20", processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stdout
    assert len(losses(one)) == 20
    assert_same(one, two, 20, atol=1e-5)


def test_the_same_command_continues_the_run(train):
    whole, _ = train("whole", "--max-steps", "12")
    flags = ["--ckpt-every", "3", "--lr-schedule", "constant"]
    train("parts", "--max-steps", "6", *flags)
    parts, result = train("parts", "--max-steps", "12", *flags)
    assert "continuing after step 6" in result.stdout + result.stderr
    assert_same(whole, parts, 12)
    for name, value in weights(whole, 12, "optimizer").items():
        np.testing.assert_array_equal(weights(parts, 12, "optimizer")[name], value, err_msg=name)


def test_a_damaged_checkpoint_costs_only_the_steps_after_the_one_before(train):
    folder, _ = train("run", "--max-steps", "6", "--ckpt-every", "3")
    expected = weights(folder, 6)
    (folder / "checkpoint-6" / "ema.safetensors").write_bytes(b"damaged")
    _, result = train("run", "--max-steps", "6", "--ckpt-every", "3")
    assert "skipped a checkpoint" in result.stdout
    assert "continuing after step 3" in result.stdout + result.stderr
    for name, value in weights(folder, 6).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_another_experiment_is_not_continued(train):
    folder, _ = train("run", "--max-steps", "2")
    before = sorted(path.name for path in folder.iterdir())
    for flags, told in (
        (["--global-seed", "1"], "global_seed was 0, now 1"),
        (["--model", "DiT-S/8"], "patch_size was 2, now 8"),
        (["--global-batch-size", "32"], "global_batch_size was 16, now 32"),
    ):
        _, result = train("run", "--max-steps", "4", *flags)
        assert result.returncode == 2
        assert told in result.stderr
        assert "Traceback" not in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == before
    _, result = train("run", "--max-steps", "1", "--global-seed", "1", "--no-resume")
    assert result.returncode == 0
    assert (folder / "previous-1" / "checkpoint-2").is_dir()
    assert (folder / "checkpoint-1").is_dir()


def test_dry_run_prints_the_plan_and_writes_nothing(train):
    folder, result = train("plan", "--model", "DiT-XL/2", "--dry-run")
    assert result.returncode == 0
    assert not folder.exists()
    told = {" ".join(line.split()) for line in result.stdout.splitlines()}
    assert {"num_classes 10", "steps per epoch 4", "total steps 5,600"} <= told


def write_pairs(folder, samples=8, shape=(1, 4, 8, 8), label=0):
    for kind in ("features", "labels"):
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
    for index in range(samples):
        latents = np.random.default_rng(index).standard_normal(shape).astype(np.float32)
        np.save(folder / "imagenet256_features" / f"{index}.npy", latents)
        np.save(folder / "imagenet256_labels" / f"{index}.npy", np.array([label]))
    return folder


def nan_store(folder):
    with StoreWriter(folder, sample_shape=(4, 8, 8), dtype="float32", num_classes=10) as store:
        store.append(np.zeros((16, 4, 8, 8), np.float32), np.zeros(16, np.int64))
    np.load(folder / "latents-00000.npy", mmap_mode="r+")[5, 0, 0, 0] = np.nan  # the writer would have refused it
    return folder


def unpaired(folder):
    write_pairs(folder)
    (folder / "imagenet256_labels" / "3.npy").unlink()
    return folder


def misnamed(folder):
    write_pairs(folder)
    (folder / "imagenet256_labels" / "3.npy").rename(folder / "imagenet256_labels" / "three.npy")
    return folder


def empty(folder):
    folder.mkdir()
    return folder


BAD_DATA = {
    "missing folder": (lambda folder: folder, [], "there is no folder"),
    "empty folder": (empty, [], "found nothing"),
    "unpaired": (unpaired, [], "3.npy: imagenet256_labels lacks it"),
    "misnamed": (misnamed, [], "files have no partner"),
    "odd latents": (lambda folder: write_pairs(folder, shape=(1, 4, 9, 9)), [], "cannot cut into patches of"),
    "other image size": (write_pairs, ["--image-size", "256"], "--image-size 64"),
    "label beyond the classes": (
        lambda folder: write_pairs(folder, label=12),
        ["--num-classes", "10"],
        "says class 12 of 10",
    ),
    "label beyond ImageNet's": (lambda folder: write_pairs(folder, label=1000), [], "class 1000 of 1000"),
    "NaN": (nan_store, [], "NaN"),
    "contradicting classes": (nan_store, ["--num-classes", "5"], "10 classes"),
    "batch larger than the data": (lambda folder: write_pairs(folder, samples=3), [], "--global-batch-size"),
    "negative classes": (write_pairs, ["--num-classes", "-1"], "--num-classes must be 0 or more"),
    "betas": (write_pairs, ["--adam-betas", "1.5", "2"], "--adam-betas"),
    "unknown model": (write_pairs, ["--model", "DiT-XS/2"], "unknown model 'DiT-XS/2'"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_input_is_one_line_and_writes_no_checkpoint(case, run_here, tmp_path):
    make, flags, told = BAD_DATA[case]
    output = tmp_path / "run"
    command = ["train.py", "--model", "DiT-Digits/2", "--feature-path", make(tmp_path / "data"), "--output-dir", output]
    result = run_here(*command, "--global-batch-size", "8", "--max-steps", "2", *flags)
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len(errors) == 1
    assert told in errors[0]
    assert not list(output.glob("checkpoint-*"))


@pytest.mark.distributed
def test_one_ranks_bad_sample_stops_all_with_its_message(train, latent_store, tmp_path):
    np.load(latent_store / "latents-00000.npy", mmap_mode="r+")[21, 0, 0, 0] = np.nan
    folder, result = train("run", "--max-steps", "8", "--ckpt-every", "1", processes=2)
    assert result.returncode == 2
    told = result.stdout + result.stderr
    assert "error: rank" in told
    assert "sample 21" in told
    assert len(list(folder.glob("checkpoint-*"))) < 4  # four steps see every sample


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(train):
    folder, result = train("run", "--max-steps", "8", "--ckpt-every", "1", "--learning-rate", "1e18")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "the loss is not finite at step" in errors[0]
    assert "samples" in errors[0]
    assert (folder / "checkpoint-1").is_dir()
    assert np.isfinite(losses(folder)).all()


def test_a_json_model_must_fit_the_data(latent_store, tmp_path):
    from paddle_dit.config import DiTConfig
    from paddle_dit.errors import PaddleDiTError
    from paddle_dit.training.plan import make_plan
    from paddle_dit.training.recipe import TrainRecipe

    def plan(change=(), **flags):
        config = {**DiTConfig.from_preset("DiT-Digits/2").to_dict(), **dict(change)}
        (tmp_path / "model.json").write_text(json.dumps(config))
        return make_plan(TrainRecipe(model=str(tmp_path / "model.json"), feature_path=latent_store, **small, **flags))

    small = {"global_batch_size": 8, "output_dir": tmp_path / "run"}
    assert plan({"learn_sigma": False}).info.config.learn_sigma is False
    for change, flags, told in (
        ({"sample_size": 16}, {}, r"model takes \[4, 16, 16\]"),
        ({"num_classes": 7}, {}, "10 classes"),
        ({}, {"learn_sigma": False}, "change them there"),
        ({"mlp_ratio": "a"}, {}, "mlp_ratio must be a number"),
    ):
        with pytest.raises(PaddleDiTError, match=told):
            plan(change, **flags)


def test_a_finished_run_says_so_and_a_changed_recipe_is_told(train):
    folder, _ = train("run", "--max-steps", "2")
    before = (folder / "log.jsonl").read_text()
    _, result = train("run", "--max-steps", "2", "--learning-rate", "2e-4")
    assert result.returncode == 0
    assert "learning_rate was 0.0001, now 0.0002" in result.stdout
    assert "already at step 2 of 2" in result.stdout
    assert (folder / "log.jsonl").read_text() == before


def test_other_data_of_the_same_size_is_not_continued(train, latent_store):
    train("run", "--max-steps", "1")
    folder, index = latent_store, json.loads((latent_store / "index.json").read_text())
    np.load(folder / "latents-00000.npy", mmap_mode="r+")[1] = 1.0
    index["shards"][0]["sha256"] = "0" * 64
    (folder / "index.json").write_text(json.dumps(index))
    _, result = train("run", "--max-steps", "2")
    assert result.returncode == 2
    assert "another experiment: data was" in result.stderr


def test_a_batch_that_the_ranks_cannot_share_is_refused(latent_store, monkeypatch):
    from paddle_dit.errors import ConfigError
    from paddle_dit.training.plan import make_plan
    from paddle_dit.training.recipe import TrainRecipe

    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "3")
    with pytest.raises(ConfigError, match="not divisible by 3 ranks"):
        make_plan(TrainRecipe(model="DiT-Digits/2", feature_path=latent_store, global_batch_size=16))


def test_an_output_that_cannot_be_written_is_refused(latent_store, tmp_path, monkeypatch):
    import os

    from paddle_dit.errors import ConfigError
    from paddle_dit.training.plan import make_plan
    from paddle_dit.training.recipe import TrainRecipe

    recipe = TrainRecipe(model="DiT-Digits/2", feature_path=latent_store, output_dir=tmp_path / "file" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        make_plan(recipe)
    recipe.output_dir = tmp_path / "run"
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="no permission"):
        make_plan(recipe)
