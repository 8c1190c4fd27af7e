"""Runs that start from other weights: what they begin with, how they go on, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paddle_dit.checkpoint import save_checkpoint
from paddle_dit.cli import parse
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.data.store import StoreWriter
from paddle_dit.errors import PaddleDiTError
from paddle_dit.models.refit import LABELS, parameter_shapes
from paddle_dit.training.loop import train
from paddle_dit.training.plan import make_plan
from paddle_dit.training.plan_report import describe
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.session import start_session
from tests.conftest import ROOT

CONFIG = DiTConfig(sample_size=8, patch_size=2, hidden_size=48, depth=2, num_heads=4, num_classes=5)
NAMES = {label: f"class {2 * label}" for label in range(5)}  # of the store's "class 0" to "class 9", the even ones


def weights(config, seed):
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in parameter_shapes(config).items()}


@pytest.fixture
def trained(tmp_path):
    """Return a function that writes a run of five classes with random weights and gives (folder, averaged weights)."""

    def trained(names=NAMES, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        ema = weights(config, 0)
        folder = tmp_path / "trained"
        save_checkpoint(folder, 7, ModelInfo(config, names), {"ema": ema, "model": weights(config, 1)}, {})
        return folder, ema

    return trained


@pytest.fixture
def recipe(latent_store, tmp_path):
    """Return a function that gives the recipe of a small run into ``tmp_path / name``."""

    def recipe(folder, name="run", **changes):
        options = {"init_from": str(folder), "global_batch_size": 16, "log_every": 1, "image_logging_steps": -1}
        options |= {"feature_path": latent_store, "output_dir": tmp_path / name, "num_workers": 0, "visualdl": False}
        return TrainRecipe(**{**options, **changes})

    return recipe


def begun(recipe):
    """Return (weights, averaged weights, configuration) of a run before its first step."""
    found = []

    def look(session):
        own = {name: weight.numpy() for name, weight in session.model.named_parameters()}
        averaged = {name: shadow.numpy() for name, shadow in session.ema.shadow.items()}
        found.extend([own, averaged, session.plan.info.config])

    start_session(make_plan(recipe)).run(look)
    return found


def assert_equal(found, expected, leaving_out=()):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name not in leaving_out:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("form", ["run", "checkpoint", "file"])
def test_a_run_and_its_average_begin_with_the_weights_of_the_model_that_is_named(trained, recipe, form):
    folder, ema = trained()
    place = {"run": folder, "checkpoint": folder / "checkpoint-7", "file": folder / "checkpoint-7" / "ema.safetensors"}
    own, averaged, config = begun(recipe(place[form]))
    assert config == dataclasses.replace(CONFIG, num_classes=10)
    assert_equal(own, averaged)
    assert_equal(own, ema, leaving_out=(LABELS,))
    assert_equal(
        begun(recipe(place[form], "other", init_weights="model"))[0], weights(CONFIG, 1 - (form == "file")), [LABELS]
    )


def test_classes_of_the_same_name_keep_their_rows_and_new_ones_start_from_the_null_row(trained, recipe, capsys):
    folder, ema = trained()
    own, _, _ = begun(recipe(folder))
    old = ema[LABELS]
    np.testing.assert_array_equal(own[LABELS][[0, 2, 4, 6, 8, 10]], old)
    np.testing.assert_array_equal(own[LABELS][[1, 3, 5, 7, 9]], np.repeat(old[5:], 5, axis=0))
    assert "label table: 5 of 10 rows kept by name, 5 start from the null row\n" in capsys.readouterr().out


def test_labels_drawn_afresh_depend_on_the_seed_and_leave_the_null_row(trained, recipe, capsys):
    folder, ema = trained()
    own, again, other = (
        begun(recipe(folder, name, reset_labels=True, global_seed=seed))[0][LABELS]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    np.testing.assert_array_equal(own, again)
    assert (own[:10] != other[:10]).all()
    np.testing.assert_array_equal(own[10], ema[LABELS][5])
    assert "label table: all 10 rows drawn afresh\n" in capsys.readouterr().out


def test_without_names_the_same_number_of_classes_is_kept_by_id_and_another_is_not(trained, recipe, capsys):
    folder, ema = trained(names=None, num_classes=10)
    np.testing.assert_array_equal(begun(recipe(folder))[0][LABELS], ema[LABELS])
    assert "label table: 10 of 10 rows kept by id\n" in capsys.readouterr().out
    shutil.rmtree(folder)
    folder, ema = trained(names=None)
    np.testing.assert_array_equal(begun(recipe(folder, "b"))[0][LABELS], np.repeat(ema[LABELS][5:], 11, axis=0))
    told = "label table: 0 of 10 rows kept (5 classes before, and no class names in these weights to match them by)"
    assert f"{told}, 10 start from the null row\n" in capsys.readouterr().out


def test_weights_without_a_null_row_say_what_new_rows_start_from(trained, recipe, capsys):
    folder, ema = trained(class_dropout_prob=0.0)
    rows = begun(recipe(folder))[0][LABELS]
    np.testing.assert_allclose(rows[[1, 10]], np.tile(ema[LABELS].mean(0), (2, 1)), atol=1e-6)
    assert "5 start from the mean of the rows, as there is no null row" in capsys.readouterr().out


def write_store(folder, shape):
    with StoreWriter(folder, sample_shape=shape, dtype="float32", num_classes=10) as store:
        store.append(np.random.default_rng(0).standard_normal((32, *shape)).astype(np.float32), np.arange(32) % 10)
    return folder


def test_another_image_size_has_another_position_table_and_the_same_weights(trained, recipe, tmp_path, capsys):
    folder, ema = trained()
    own, _, config = begun(recipe(folder, feature_path=write_store(tmp_path / "large", (4, 16, 16))))
    assert (config.sample_size, config.patch_size) == (16, 2)
    assert_equal(own, ema, leaving_out=(LABELS,))
    assert "latents 8x8 -> 16x16: the position table is computed anew\n" in capsys.readouterr().out


def model_file(folder, **changes):
    values = {**dataclasses.replace(CONFIG, num_classes=10).to_dict(), **changes}
    (folder / "model.json").write_text(json.dumps(values))
    return str(folder / "model.json")


def test_another_patch_size_is_resampled_when_asked_for(trained, recipe, tmp_path, capsys):
    folder, ema = trained()
    model = model_file(tmp_path, patch_size=4)
    with pytest.raises(PaddleDiTError, match=r"patch size 4, the weights of --init-from .* have 2; .*--resize-patch"):
        make_plan(recipe(folder, model=model))
    own, averaged, config = begun(recipe(folder, model=model, resize_patch=True))
    assert config.patch_size == 4
    assert_equal(own, averaged)
    changed = {name for name, value in ema.items() if not np.array_equal(own[name], value)}
    assert changed == {"x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias", LABELS}
    assert "patch size 2 -> 4: the projections are resampled\n" in capsys.readouterr().out


@pytest.mark.parametrize("before", [True, False])
def test_the_variance_is_added_or_left_out(trained, recipe, capsys, before):
    folder, ema = trained(learn_sigma=before)
    own, _, config = begun(recipe(folder, learn_sigma=not before))
    assert config.learn_sigma is not before
    narrow, wide = (ema, own) if not before else (own, ema)
    both = wide["final_layer.linear.bias"].reshape(4, 8)
    np.testing.assert_array_equal(narrow["final_layer.linear.bias"].reshape(4, 4), both[:, :4])
    assert (both[:, 4:] == 0).all() == (not before)
    told = "the outputs for the variance are left out\n" if before else "outputs for the variance are added, zero"
    assert told in capsys.readouterr().out


def test_what_no_flag_says_is_as_it_was_trained(trained, recipe, tmp_path):
    folder, _ = trained(frequency_shift=0, mlp_ratio=2.0, norm_eps=1e-5)
    config = make_plan(recipe(folder)).info.config
    assert (config.frequency_shift, config.mlp_ratio, config.norm_eps) == (0, 2.0, 1e-5)
    model = model_file(tmp_path, frequency_shift=1, mlp_ratio=2.0, norm_eps=1e-5)
    with pytest.raises(PaddleDiTError, match=r"has frequency_shift 1, the weights of --init-from .* have 0"):
        make_plan(recipe(folder, model=model))
    with pytest.raises(PaddleDiTError, match=r"--model DiT-Digits/2 has depth 3, the weights of --init-from .* have 2"):
        make_plan(recipe(folder, model="DiT-Digits/2"))
    with pytest.raises(PaddleDiTError, match="the latents have 8 channels"):
        make_plan(recipe(folder, feature_path=write_store(tmp_path / "wide", (8, 8, 8))))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_continued_run_needs_the_weights_no_more_and_equals_an_unbroken_one(trained, recipe, capsys):
    folder, _ = trained()
    only = {"train_only": ("*bias*", "y_embedder*"), "learning_rate": 1e-2}
    start_session(make_plan(recipe(folder, "whole", max_steps=6, **only))).run(train)
    start_session(make_plan(recipe(folder, "parts", max_steps=3, **only))).run(train)
    capsys.readouterr()
    shutil.rmtree(folder)
    start_session(make_plan(recipe(folder, "parts", max_steps=6, **only))).run(train)
    told = capsys.readouterr().out
    assert f"{folder} is not read: the run goes on from its checkpoint" in told
    assert "continuing after step 3" in told
    run = folder.parent
    assert files(run / "parts" / "checkpoint-6") == files(run / "whole" / "checkpoint-6")
    state = json.loads((run / "parts" / "checkpoint-6" / "state.json").read_text())
    assert state["recipe"]["init_from"] == str(folder)
    assert state["recipe"]["train_only"] == ["*bias*", "y_embedder*"]


def test_frozen_weights_stay_in_model_and_average_and_have_no_state(trained, recipe, tmp_path, capsys):
    folder, ema = trained()
    only = {"train_only": ("*bias*",), "learning_rate": 1e-2, "ema_decay": 0.9}
    start_session(make_plan(recipe(folder, max_steps=3, **only))).run(train)
    kinds = {
        kind: load_file(tmp_path / f"run/checkpoint-3/{kind}.safetensors") for kind in ("model", "ema", "optimizer")
    }
    frozen = [name for name in ema if name != LABELS and "bias" not in name]
    for kind in ("model", "ema"):
        for name in frozen:
            np.testing.assert_array_equal(kinds[kind][name], ema[name], err_msg=name)
        assert all((kinds[kind][name] != ema[name]).any() for name in ema if "bias" in name)
    assert {key.rpartition("/")[0] for key in kinds["optimizer"]} == {name for name in ema if "bias" in name}
    trained_now = sum(value.size for name, value in ema.items() if "bias" in name)
    assert f"{trained_now:,} of " in capsys.readouterr().out


def test_other_parameters_cannot_train_within_a_run(trained, recipe):
    folder, _ = trained()
    start_session(make_plan(recipe(folder, max_steps=2, train_only=("*bias*",)))).run(train)
    with pytest.raises(PaddleDiTError, match=r"another experiment: train_only was \['\*bias\*'\], now None"):
        start_session(make_plan(recipe(folder, max_steps=3))).run(train)
    with pytest.raises(PaddleDiTError, match="a run that trained other parameters"):
        start_session(make_plan(recipe(folder, max_steps=3, allow_changes=True))).run(train)


def test_other_weights_do_not_change_a_run_that_goes_on(trained, recipe, tmp_path, capsys):
    folder, _ = trained()
    start_session(make_plan(recipe(folder, max_steps=2))).run(train)
    before = files(tmp_path / "run" / "checkpoint-2")
    start_session(make_plan(recipe("some/where", max_steps=2))).run(train)
    told = capsys.readouterr().out
    assert f"changed since the checkpoint: init_from was {folder}, now some/where" in told
    assert "some/where is not read: the run goes on" in told
    assert files(tmp_path / "run" / "checkpoint-2") == before
    with pytest.raises(PaddleDiTError, match="--init-from: there is no file or folder some/where"):
        make_plan(recipe("some/where", max_steps=2, resume=False))


def test_a_dry_run_says_what_it_comes_to(trained, recipe, tmp_path):
    folder, _ = trained()
    only = {"train_only": ("*bias*",), "dry_run": True}
    plan = dict(line.split("  ", 1) for line in describe(make_plan(recipe(folder, **only))).splitlines())
    assert plan["initial weights"].endswith("label table: 5 of 10 rows kept by name, 5 start from the null row")
    assert plan["trained parameters"].strip().endswith("%")
    assert not (tmp_path / "run").exists()
    start_session(make_plan(recipe(folder, max_steps=1))).run(train)
    assert "not read: the run in" in describe(make_plan(recipe(folder, dry_run=True)))


def damaged(folder, config, tensors):
    folder.mkdir()
    ModelInfo(config).save(folder / "config.json")
    save_file(tensors, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def with_nan(folder):
    tensors = weights(CONFIG, 0)
    tensors["blocks.1.mlp.fc1.bias"][3] = np.nan
    return damaged(folder, CONFIG, tensors)


def cut(folder):
    path = damaged(folder, CONFIG, weights(CONFIG, 0))
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def text(folder):
    folder.mkdir()
    (folder / "weights.pt").write_text("no weights")
    return folder / "weights.pt"


BAD = {
    "not there": (lambda folder: folder, "there is no file or folder"),
    "empty folder": (lambda folder: folder.mkdir() or folder, ""),
    "of another depth": (
        lambda folder: damaged(folder, dataclasses.replace(CONFIG, depth=3), weights(CONFIG, 0)),
        r"not the weights of this DiT configuration \(missing: blocks.2",
    ),
    "of another width": (
        lambda folder: damaged(folder, dataclasses.replace(CONFIG, hidden_size=96), weights(CONFIG, 0)),
        "does not fit the model's configuration",
    ),
    "NaN": (with_nan, "'blocks.1.mlp.fc1.bias'.* holds NaN"),
    "cut short": (cut, "cut short"),
    "a text": (text, ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_one_line_and_nothing_is_written(recipe, tmp_path, case):
    make, told = BAD[case]
    path = make(tmp_path / "given")
    with pytest.raises(PaddleDiTError, match=f"^--init-from: .*{told}") as error:
        make_plan(recipe(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_averaged_weights_that_are_not_there_name_the_flag(recipe, tmp_path):
    save_checkpoint(tmp_path / "raw", 7, ModelInfo(CONFIG), {"model": weights(CONFIG, 0)}, {})
    with pytest.raises(PaddleDiTError, match="no ema weights; ask for --init-weights model"):
        make_plan(recipe(tmp_path / "raw"))
    assert begun(recipe(tmp_path / "raw", init_weights="model"))[2].depth == 2


@pytest.mark.parametrize("flags", [{"reset_labels": True}, {"resize_patch": True}, {"train_only": ("*bias*",)}])
def test_flags_of_fine_tuning_need_weights(latent_store, tmp_path, flags):
    name = next(iter(flags)).replace("_", "-")
    with pytest.raises(PaddleDiTError, match=f"--{name} is only used with --init-from"):
        make_plan(TrainRecipe(feature_path=latent_store, output_dir=tmp_path / "run", **flags))


@pytest.mark.distributed
@pytest.mark.parametrize("more", [(), pytest.param(("--tensor-parallel-degree", "2"), marks=pytest.mark.slow)])
def test_two_processes_start_from_the_same_weights_as_one(trained, latent_store, run_command, tmp_path, more):
    folder, _ = trained()
    flags = ["train.py", "--init-from", folder, "--feature-path", latent_store, "--global-batch-size", "16"]
    flags += ["--max-steps", "3", "--log-every", "1", "--image-logging-steps", "-1", "--no-visualdl"]
    flags += ["--train-only", "*bias*", "*attn*", "y_embedder*"]
    one = run_command(*flags, "--output-dir", tmp_path / "one")
    two = run_command(*flags, "--output-dir", tmp_path / "two", *more, processes=2, log_dir=tmp_path / "launch_log")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stdout
    for kind in ("model", "ema", "optimizer"):
        expected, found = (
            load_file(tmp_path / name / "checkpoint-3" / f"{kind}.safetensors") for name in ("one", "two")
        )
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_read_other_weights_than_the_first_are_told(trained, latent_store, run_command, tmp_path):
    trained()
    for rank in range(2):
        shutil.copytree(tmp_path / "trained", tmp_path / f"place-{rank}" / "trained")
    other = {"ema": weights(CONFIG, 5), "model": weights(CONFIG, 5)}
    save_checkpoint(tmp_path / "place-1" / "trained", 9, ModelInfo(CONFIG, NAMES), other, {})
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"os.chdir({str(tmp_path)!r} + '/place-' + os.environ['PADDLE_TRAINER_ID'])\nimport train\ntrain.main()\n"
    )
    flags = ["--init-from", "trained", "--feature-path", latent_store, "--output-dir", tmp_path / "run"]
    flags += ["--global-batch-size", "16", "--max-steps", "1", "--no-visualdl"]
    result = run_command(worker, *flags, processes=2, log_dir=tmp_path / "launch_log")
    logs = "".join(path.read_text() for path in (tmp_path / "launch_log").glob("workerlog.*"))
    assert result.returncode == 2, logs
    assert "error: rank 1: this rank reads other weights from trained than rank 0; give all the same" in logs
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_trainer_script_starts_the_same_run(trained, latent_store, run_command, tmp_path):
    folder, _ = trained()
    ours = ["--init-from", folder, "--output-dir", tmp_path / "ours", "--global-batch-size", "16", "--max-steps", "2"]
    ours += ["--image-logging-steps", "-1", "--no-visualdl", "--reset-labels"]
    theirs = ["--do_train", "--init_from", folder, "--output_dir", tmp_path / "theirs", "--max_steps", "2"]
    theirs += ["--per_device_train_batch_size", "16", "--image_logging_steps", "-1", "--report_to", "none"]
    theirs += ["--reset_labels", "true"]
    for script, flags in (("train.py", ours), ("train_image_generation_dit_trainer.py", theirs)):
        only = "--train-only" if script == "train.py" else "--train_only"
        result = run_command(script, *flags, "--feature-path", latent_store, only, "*bias*", "y_embedder*")
        assert result.returncode == 0, result.stderr
        assert "label table: all 10 rows drawn afresh" in result.stdout
    assert files(tmp_path / "ours" / "checkpoint-2") == files(tmp_path / "theirs" / "checkpoint-2")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("finetune-*.yaml")))
def test_a_shipped_recipe_fits_weights_of_its_model(name, recipe, tmp_path):
    shipped = parse(TrainRecipe, ["-c", str(ROOT / "configs" / name)], description="")
    config = dataclasses.replace(CONFIG, sample_size=16, num_classes=1000)
    model = {"model": model_file(tmp_path, sample_size=16, patch_size=4)} if shipped.resize_patch else {}
    save_checkpoint(tmp_path / "xl", 7, ModelInfo(config), dict.fromkeys(("ema", "model"), weights(config, 0)), {})
    place = {"feature_path": (write_store(tmp_path / "data", (4, 16, 16)),), "output_dir": tmp_path / "run"}
    small = {"image_size": shipped.image_size and 128, "global_batch_size": 16, "init_from": str(tmp_path / "xl")}
    plan = make_plan(dataclasses.replace(shipped, **place, **small, **model))
    assert plan.info.config.num_classes == 10
