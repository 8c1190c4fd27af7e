"""Training straight from images: a run of its own kind, and as repeatable as one on latents."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from paddle_dit.checkpoint import newest_checkpoint
from paddle_dit.errors import CheckpointError, DataError
from paddle_dit.models.vae import encode, load_vae
from paddle_dit.training import encoding, loop
from paddle_dit.training.plan import make_plan
from paddle_dit.training.plan_report import describe
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.session import Session, start_session
from paddle_dit.training.signals import STOPPED
from tests.conftest import ROOT
from tests.data.test_image_workers import children
from tests.digit_images import SIZE, VAE, write_digit_images
from tests.faults.runs import TRAIN, TRAINER, assert_same, checkpoints, flags_of, losses, run, start, tensors, wait_for


def recipe_for(images, **changes):
    options = {"model": "DiT-Digits/2", "global_batch_size": 16, "log_every": 1, "image_logging_steps": -1}
    options |= {"data_path": images, "vae_name_or_path": VAE, "image_size": SIZE, "num_workers": 0, **changes}
    return TrainRecipe(**options)


@pytest.fixture
def train_on(images, tmp_path):
    """Return a function that trains on the images into ``tmp_path / name``."""

    def train_on(name="run", **changes):
        recipe = recipe_for(**{"images": images, "output_dir": tmp_path / name, **changes})
        start_session(make_plan(recipe)).run(loop.train)
        return tmp_path / name

    return train_on


def test_a_plan_takes_its_shape_from_size_and_vae_and_its_names_from_the_folders(images):
    plan = make_plan(recipe_for(images, dry_run=True, eval_steps=1, held_out_samples=9, image_size=64))
    assert plan.info.config.sample_shape == (4, 16, 16)
    assert plan.info.vae == {"name": VAE, "scaling_factor": 0.9859727621078491, "image_size": 64}
    assert plan.info.label_names[4] == "4-four"
    assert (len(plan.source), len(plan.validation), plan.order.steps_per_epoch) == (55, 9, 3)
    assert plan.sample_names(np.array([0])).endswith(".png")
    row = next(line for line in describe(plan).splitlines() if line.startswith("latents "))
    assert row.endswith("55 x [4, 16, 16], encoded in each step: the VAE's memory and time are not counted below")


def test_another_size_or_vae_is_another_experiment(images, tmp_path):
    check, other = ["images", "data"], other_vae(tmp_path / "vae")
    plans = [recipe_for(images), recipe_for(images, image_size=64), recipe_for(images, vae_name_or_path=str(other))]
    ours, larger, foreign = ({name: make_plan(plan).identity[name] for name in check} for plan in plans)
    assert ours["data"] == larger["data"] == foreign["data"]
    assert ours["images"]["vae"] == larger["images"]["vae"] != foreign["images"]["vae"]
    assert ours["images"]["image_size"] == foreign["images"]["image_size"] != larger["images"]["image_size"]


def other_vae(folder):
    """Write the digits' VAE with one weight changed."""
    shutil.copytree(ROOT / VAE, folder)
    path = folder / "diffusion_paddle_model.safetensors"
    weights = load_file(path)
    weights["quant_conv.bias"] = weights["quant_conv.bias"] + 0.1
    save_file(weights, path, metadata={"format": "pd"})
    return folder


def test_another_vae_cannot_go_on_with_a_run_and_the_same_one_elsewhere_can(train_on, tmp_path):
    train_on(max_steps=1)
    with pytest.raises(CheckpointError, match=r"is of another experiment: vae was \w+, now \w+; keep the former value"):
        train_on(max_steps=2, vae_name_or_path=str(other_vae(tmp_path / "other")))
    shutil.copytree(ROOT / VAE, tmp_path / "same")
    assert sorted(losses(train_on(max_steps=2, vae_name_or_path=str(tmp_path / "same")))) == [1, 2]


def test_a_continued_run_equals_an_unbroken_one_whatever_reads_the_images(train_on):
    before = children()
    whole = train_on("whole", max_steps=9, ckpt_every=3)
    train_on("parts", max_steps=5, num_workers=2)
    parts = train_on("parts", max_steps=9, num_workers=1)
    assert children() == before
    assert_same(whole, parts, 9)
    assert len(set(losses(whole).values())) == 9


def test_each_epoch_sees_other_latents_of_an_image(train_on, monkeypatch):
    seen = []
    monkeypatch.setattr(encoding, "encode", lambda *inputs: seen.append(encode(*inputs)) or seen[-1])
    train_on(max_steps=8)
    assert len({latent.tobytes() for batch in seen for latent in batch}) == 8 * 16  # of 64 images


def test_evaluating_and_drawing_do_not_disturb_training(train_on, monkeypatch):
    loaded = []
    monkeypatch.setattr(encoding, "load_vae", lambda name: loaded.append(name) or load_vae(name))
    options = {"max_steps": 6, "held_out_samples": 17, "ema_decay": 0.5, "num_inference_steps": 2}
    often = train_on("often", eval_steps=2, image_logging_steps=2, **options)
    seldom = train_on("seldom", eval_steps=5, **options)
    assert losses(often) == losses(seldom)
    for name in ("eval_loss", "eval_loss_ema"):
        assert sorted(losses(often, name)) == [2, 4, 6]
        assert losses(often, name)[6] == losses(seldom, name)[6]
    assert_same(often, seldom, 6)
    pictures = sorted(path.name for path in (often / "samples").iterdir())
    assert pictures == [*(f"step-000000{step}.png" for step in (2, 4, 6)), "training-latents.png"]
    assert loaded == [VAE, VAE]  # one for each run: the previews share it


def test_the_same_latents_are_shown_as_images_of_the_folder(train_on, images):
    folder = train_on(max_steps=1, image_logging_steps=1, num_inference_steps=2)
    grid = np.asarray(Image.open(folder / "samples" / "training-latents.png").convert("L")).astype(float)
    first = np.asarray(Image.open(sorted(images.rglob("*.png"))[0]).resize((64, 64)).convert("L")).astype(float)
    found = np.lib.stride_tricks.sliding_window_view(grid[:, :80], (64, 64)).reshape(-1, 64, 64)
    closest = min(np.abs(window - first).mean() for window in found)
    assert closest < 12 < np.abs(first - first.mean()).mean()


def test_held_out_images_may_have_a_folder_of_their_own(train_on, tmp_path):
    other = write_digit_images(tmp_path / "other", 40)
    apart = train_on("apart", eval_steps=2, eval_path=other, held_out_samples=7, max_steps=4)
    alone = train_on("alone", max_steps=4)
    assert losses(apart) == losses(alone)
    assert sorted(losses(apart, "eval_loss")) == [2, 4]
    shutil.rmtree(other / "7-seven")
    with pytest.raises(DataError, match=r"has 9 classes, --num-classes says 10"):
        train_on("more", eval_steps=2, eval_path=other, max_steps=4)


def test_the_log_tells_what_latents_would_bring(train_on, capsys):
    folder = train_on(max_steps=4, num_workers=1)
    rates, faster = losses(folder, "images_per_second"), losses(folder, "images_per_second_from_latents")
    shares, waits = losses(folder, "encoding"), losses(folder, "data_wait")
    assert sorted(shares) == [1, 2, 3, 4]
    for step, share in shares.items():
        assert 0.02 < share < 1
        assert faster[step] == pytest.approx(rates[step] / (1 - share - waits[step]), rel=1e-6)
    out = capsys.readouterr().out
    assert "64 images of 32 pixels encoded by data/digits_vae, 10 classes" in out
    (line,) = [line for line in out.splitlines() if "encoding images takes" in line]
    assert f"{rates[2]:.4g} images/s; from latents, which scripts/extract_features.py makes" in line
    assert line.endswith(f"about {faster[2]:.4g}")


def test_a_broken_image_stops_the_run_at_its_step_with_its_name(images, train_on, tmp_path):
    mine = shutil.copytree(images, tmp_path / "images")
    plan = make_plan(recipe_for(mine, dry_run=True))
    broken = plan.order.global_batch(2)[5]
    name = plan.sample_names(np.array([broken]))
    with open(name, "wb") as file:
        file.write(b"no image")
    with pytest.raises(DataError, match=f"cannot read the image {name}"):
        train_on(images=mine, max_steps=4, ckpt_every=1, num_workers=2)
    assert newest_checkpoint(tmp_path / "run").step == 2


def damaged_vae(tmp_path):
    folder = shutil.copytree(ROOT / VAE, tmp_path / "vae")
    path = folder / "diffusion_paddle_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return {"vae_name_or_path": folder}


def empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    return {"data_path": tmp_path / "empty"}


def larger_model(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"sample_size": 16, "num_classes": 10, "depth": 1}))
    return {"model": tmp_path / "model.json"}


def model_of_other_channels(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"sample_size": 8, "in_channels": 3, "num_classes": 10}))
    return {"model": tmp_path / "model.json"}


BAD = {
    "--vae_name_or_path": ({"vae_name_or_path": None}, "--data-path needs the VAE that encodes the images; give --vae"),
    "both kinds": ({"feature_path": "latents"}, "(latents) contradict each other; choose one"),
    "no such VAE": ({"vae_name_or_path": "data/nowhere"}, "no such VAE folder: data/nowhere"),
    "damaged VAE": (damaged_vae, "is cut short or no safetensors file"),
    "odd size": ({"image_size": 36}, "--image-size 36 is not divisible by 8,"),
    "no size": ({"image_size": 0}, "--image-size must be 1 or more, got 0"),
    "other size": (larger_model, "[4, 8, 8] but the model takes [4, 16, 16]; use --image-size 64"),
    "other channels": (model_of_other_channels, "[4, 8, 8] but the model takes [3, 8, 8]; use another VAE"),
    "empty": (empty_folder, "holds no images"),
    "no folder": ({"data_path": "nowhere"}, "there is no folder nowhere"),
    "classes": ({"num_classes": 7}, "has 10 classes, --num-classes says 7"),
    "few": ({"class_subset": "7"}, "fewer than one global batch of 16"),
}


def flags(script, images, folder, processes=1, **values):
    values = {"data_path": images, "vae_name_or_path": VAE, "image_size": SIZE, **values}
    return flags_of(script, None, folder, processes, **{key: item for key, item in values.items() if item is not None})


@pytest.mark.parametrize("script", [TRAIN, TRAINER])
@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_trained_on_is_one_line_and_nothing_is_written(call, images, tmp_path, script, what):
    change, told = BAD[what]
    change = change(tmp_path) if callable(change) else change
    code, _, err = call(script, *flags(script, images, tmp_path / "run", max_steps=2, **change))
    if script == TRAINER:
        told = told.replace("-p", "_p").replace("-s", "_s").replace("-c", "_c").replace("--vae", "--vae_name_or_path")
    errors = [line for line in err.splitlines() if "error:" in line]
    assert code == 2
    assert len(errors) == 1
    assert told in errors[0]
    assert not (tmp_path / "run").exists()


def test_one_class_is_allowed_but_said_by_the_first_rank(images, tmp_path, capsys, monkeypatch):
    shutil.copytree(images / "3-three", tmp_path / "one" / "3-three")
    make_plan(recipe_for(tmp_path / "one", dry_run=True, global_batch_size=2))
    assert "has one class only, '3-three'" in capsys.readouterr().out
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    make_plan(recipe_for(tmp_path / "one", dry_run=True, global_batch_size=2))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("script", [TRAIN, TRAINER])
def test_a_dry_run_needs_neither_images_nor_vae(call, tmp_path, script):
    dry = ["--dry-run", "--data-path", tmp_path / "nowhere", "--vae-name-or-path", "data/nowhere"]
    code, out, _ = call(script, *dry, "--output-dir", tmp_path / "run")
    assert code == 0
    assert "1,281,167 x [4, 32, 32], assumed: there is no data yet, encoded in each step" in out
    assert not list(tmp_path.iterdir())


def test_both_scripts_make_the_same_steps_and_each_continues_what_the_other_began(call, images, tmp_path):
    for script, name, steps in ((TRAIN, "a", 6), (TRAINER, "b", 6), (TRAINER, "c", 3), (TRAIN, "c", 6)):
        code, _, err = call(script, *flags(script, images, tmp_path / name, max_steps=steps))
        assert code == 0, err
    assert_same(tmp_path / "a", tmp_path / "b", 6)
    assert_same(tmp_path / "a", tmp_path / "c", 6)


def test_a_signal_stops_a_run_on_images_saved_and_it_goes_on(call, images, tmp_path, monkeypatch):
    assert call(TRAIN, *flags(TRAIN, images, tmp_path / "whole", max_steps=5))[0] == 0
    update = Session.update

    def stopped(session, losses):
        if session.updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        update(session, losses)

    monkeypatch.setattr(Session, "update", stopped)
    assert call(TRAIN, *flags(TRAIN, images, tmp_path / "parts", max_steps=5))[0] == STOPPED
    monkeypatch.setattr(Session, "update", update)
    assert checkpoints(tmp_path / "parts")[-1] < 5
    assert call(TRAIN, *flags(TRAIN, images, tmp_path / "parts", max_steps=5))[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "parts", 5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("script", [TRAIN, TRAINER])
def test_two_ranks_make_the_steps_of_one_and_go_on_after_a_kill(images, tmp_path, script):
    options = {"max_steps": 20, "eval_steps": 8, "held_out_samples": 15, "ckpt_every": 4}
    names = [] if script == TRAIN else ["--do_eval"]
    whole, two = tmp_path / "whole", tmp_path / "two"
    code, text = run(script, 1, *flags(script, images, whole, **options), *names, log=tmp_path / "log1")
    assert code == 0, text
    command = [*flags(script, images, two, 2, **options), *names]
    with start(script, 2, *command, log=tmp_path / "log2") as launch:
        wait_for(lambda: checkpoints(two) or launch.code is not None, 120, "a checkpoint")
        launch.kill()
    assert checkpoints(two)[-1] < 20
    code, text = run(script, 2, *command, log=tmp_path / "log3")
    assert code == 0, text
    assert "continuing after step" in text
    for name in ("loss", "mse", "vb", "eval_loss", "eval_loss_ema"):
        expected = losses(whole, name)
        assert expected
        assert losses(two, name) == pytest.approx(expected, abs=1e-5, rel=0), name
    expected, found = tensors(whole, 20), tensors(two, 20)
    for name in (name for name in expected if not name.startswith("optimizer")):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.slow
@pytest.mark.distributed
def test_one_ranks_broken_image_stops_all_with_its_name(images, tmp_path):
    mine = shutil.copytree(images, tmp_path / "images")
    plan = make_plan(recipe_for(mine, dry_run=True))
    name = plan.sample_names(plan.order.global_batch(2)[13:14])  # the second rank's
    with open(name, "wb") as file:
        file.write(b"no image")
    code, text = run(TRAIN, 2, *flags(TRAIN, mine, tmp_path / "run", 2, max_steps=9), log=tmp_path / "log")
    assert code == 2
    assert f"error: rank 1: cannot read the image {name}" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_run_ends_though_an_image_that_it_no_longer_needs_cannot_be_read(images, tmp_path):
    mine = shutil.copytree(images, tmp_path / "images")
    plan = make_plan(recipe_for(mine, dry_run=True))
    stuck = plan.sample_names(plan.order.global_batch(3)[:1])
    os.mkfifo(tmp_path / "stuck")  # whoever reads it waits for ever
    os.unlink(stuck)
    os.symlink(tmp_path / "stuck", stuck)
    command = flags(TRAIN, mine, tmp_path / "run", max_steps=2, num_workers=2)
    code, text = run(TRAIN, 1, *command, log=tmp_path / "log", seconds=60)
    assert code == 0, text
    assert checkpoints(tmp_path / "run") == [2]
