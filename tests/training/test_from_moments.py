"""Training from moments: latents drawn anew at each step, and a run as repeatable as one on latents or images."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from paddle_dit.checkpoint import newest_checkpoint
from paddle_dit.data.store import PackedStore, StoreWriter
from paddle_dit.errors import CheckpointError, DataError
from paddle_dit.extraction.job import Extraction
from paddle_dit.extraction.options import ExtractionOptions
from paddle_dit.training import loop
from paddle_dit.training.plan import make_plan
from paddle_dit.training.plan_report import describe
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.session import start_session
from paddle_dit.training.step import TrainingStep
from tests.digit_images import SIZE, VAE
from tests.faults.runs import TRAIN, TRAINER, assert_same, flags_of, losses, run, tensors

SCALE = 0.9859727621078491


@pytest.fixture(scope="module")
def moments(images, tmp_path_factory):
    """Extract what the digits' VAE says of the images and of their mirror images."""
    options = {"image_size": SIZE, "vae": VAE, "store": "moments", "flip": True, "shard_size": 20, "num_workers": 0}
    folder = tmp_path_factory.mktemp("features") / "moments"
    with Extraction(ExtractionOptions(images, folder, **options), report=lambda line: None) as job:
        job.begin()
        job.run()
    return folder


def changed(moments, folder, change=lambda samples: samples, **options):
    """Write the moments as another store, with its samples or what it says of itself changed."""
    store = PackedStore(moments)
    options = {"vae": store.vae, "num_classes": 10, "label_names": store.label_names, "kind": store.kind, **options}
    samples, labels = store.gather(np.arange(len(store)))
    samples = change(samples)
    with StoreWriter(folder, sample_shape=samples.shape[1:], dtype="float32", **options) as writer:
        writer.append(samples, labels)
    return folder


def recipe_for(*folders, **changes):
    options = {"model": "DiT-Digits/2", "global_batch_size": 16, "log_every": 1, "image_logging_steps": -1}
    options |= {"vae_name_or_path": VAE, "num_workers": 0} | ({"feature_path": folders} if folders else {})
    return TrainRecipe(**options | changes)


@pytest.fixture
def train_on(moments, tmp_path):
    """Return a function that trains, on the moments unless told otherwise, into ``tmp_path / name``."""

    def train_on(name, *folders, **changes):
        if not folders and "data_path" not in changes:
            folders = (moments,)
        recipe = recipe_for(*folders, output_dir=tmp_path / name, **changes)
        start_session(make_plan(recipe)).run(loop.train)
        return tmp_path / name

    return train_on


@pytest.fixture
def seen(monkeypatch):
    """Return a list of (step, latents) that the training steps are given."""
    given, backward = [], TrainingStep.backward

    def recording(self, step, latents, *rest):
        given.append((step, latents))
        return backward(self, step, latents, *rest)

    monkeypatch.setattr(TrainingStep, "backward", recording)
    return given


def test_a_plan_gives_the_model_half_the_channels(moments):
    plan = make_plan(recipe_for(moments, dry_run=True, eval_steps=1, held_out_samples=9))
    assert plan.source.sample_shape == (8, 8, 8)
    assert plan.info.config.sample_shape == (4, 8, 8)
    assert plan.info.vae == {"name": VAE, "scaling_factor": SCALE, "image_size": SIZE}
    assert (len(plan.source), len(plan.validation), plan.order.steps_per_epoch) == (55, 9, 3)
    (row,) = [line for line in describe(plan).splitlines() if line.startswith("latents ")]
    assert row.endswith("55 x [4, 8, 8], drawn from their moments in each step")


def test_a_run_is_that_on_the_images_which_the_moments_are_of(train_on, images):
    options = {"max_steps": 6, "eval_steps": 3, "held_out_samples": 16}
    ours = train_on("moments", **options)
    theirs = train_on("images", data_path=images, image_size=SIZE, **options)
    for name in ("loss", "mse", "vb", "eval_loss", "eval_loss_ema"):
        assert losses(ours, name) == pytest.approx(losses(theirs, name), abs=1e-4, rel=0), name
    assert sorted(losses(ours, "eval_loss")) == [3, 6]


def test_a_continued_run_equals_an_unbroken_one_whatever_reads_ahead(train_on):
    whole = train_on("whole", max_steps=9, ckpt_every=3)
    train_on("parts", max_steps=5, num_workers=2)
    parts = train_on("parts", max_steps=9, num_workers=1)
    assert_same(whole, parts, 9)
    assert len(set(losses(whole).values())) == 9


def test_each_epoch_sees_other_latents_of_a_sample(train_on, moments, seen):
    train_on("run", max_steps=12)  # three epochs
    order = make_plan(recipe_for(moments, dry_run=True)).order
    latents = np.concatenate([latents for _, latents in seen])
    indices = np.concatenate([order.global_batch(step) for step, _ in seen])
    assert len({latent.tobytes() for latent in latents}) == 3 * 64
    store, both = PackedStore(moments), np.arange(2) == 1
    near = 0
    for index in range(64):
        mean, log_variance = np.split(store.gather(np.array([index, index]), both)[0], 2, axis=1)
        off = np.abs(latents[indices == index][:, None] / SCALE - mean) / np.exp(log_variance / 2)
        plausible = off.max(axis=(2, 3, 4)) < 6
        assert plausible.any(axis=1).all()
        near += plausible.sum(axis=0)
    assert (near > 64).all()  # of 192 draws: images and mirror images have both had their turn


def test_evaluating_and_drawing_do_not_disturb_training_and_use_fixed_draws(train_on):
    options = {"max_steps": 6, "held_out_samples": 17, "ema_decay": 0.5, "num_inference_steps": 2}
    often = train_on("often", eval_steps=2, image_logging_steps=2, **options)
    seldom = train_on("seldom", eval_steps=5, image_logging_steps=3, **options)
    assert losses(often) == losses(seldom)
    for name in ("eval_loss", "eval_loss_ema"):
        assert sorted(losses(often, name)) == [2, 4, 6]
        assert losses(often, name)[6] == losses(seldom, name)[6]
    assert_same(often, seldom, 6)
    shown = [np.asarray(Image.open(folder / "samples" / "training-latents.png")) for folder in (often, seldom)]
    np.testing.assert_array_equal(*shown)


def test_the_same_latents_are_shown_as_their_images(train_on, images):
    folder = train_on("run", max_steps=1, image_logging_steps=1, num_inference_steps=2)
    grid = np.asarray(Image.open(folder / "samples" / "training-latents.png").convert("L")).astype(float)
    first = np.asarray(Image.open(sorted(images.rglob("*.png"))[0]).resize((64, 64)).convert("L")).astype(float)
    found = np.lib.stride_tricks.sliding_window_view(grid[:, :80], (64, 64)).reshape(-1, 64, 64)
    assert min(np.abs(window - first).mean() for window in found) < 12 < np.abs(first - first.mean()).mean()


def test_held_out_moments_may_have_a_folder_of_their_own_also_beside_latents(train_on, moments, tmp_path):
    apart = train_on("apart", eval_steps=2, eval_path=moments, held_out_samples=7, max_steps=4)
    assert losses(apart) == losses(train_on("alone", max_steps=4))
    assert sorted(losses(apart, "eval_loss")) == [2, 4]
    means = changed(moments, tmp_path / "latents", lambda samples: SCALE * samples[:, :4], kind="latents")
    beside = train_on("beside", means, eval_steps=2, eval_path=moments, held_out_samples=7, max_steps=4)
    ours, theirs = losses(apart, "eval_loss")[4], losses(beside, "eval_loss")[4]
    assert ours == pytest.approx(theirs, abs=0.1)


def test_several_stores_and_chosen_classes_are_drawn_from(train_on, moments, seen):
    folder = train_on(
        "run", moments, moments, class_subset=("3", "5-five"), eval_steps=2, held_out_samples=3, max_steps=4
    )
    assert sorted(losses(folder, "eval_loss")) == [2, 4]
    assert all(latents.shape == (16, 4, 8, 8) for _, latents in seen)
    assert len({latent.tobytes() for _, latents in seen for latent in latents}) == 64


def test_the_scaling_factor_belongs_to_the_experiment(train_on, moments, tmp_path):
    first = changed(moments, tmp_path / "first")
    train_on("run", first, max_steps=1)
    shutil.rmtree(first)
    changed(moments, first, vae={"name": VAE, "scaling_factor": 0.5, "image_size": SIZE})
    with pytest.raises(CheckpointError, match=f"another experiment: scaling_factor was {SCALE}, now 0.5"):
        train_on("run", first, max_steps=2)


def test_moments_without_a_finite_latent_stop_the_run_at_their_step(train_on, moments, tmp_path):
    plan = make_plan(recipe_for(moments, dry_run=True))
    sample = plan.order.global_batch(2)[5]

    def overflow(samples):
        samples[sample, 4:] = 500
        return samples

    folder = changed(moments, tmp_path / "wide", overflow)
    told = f"sample {sample} of {folder} has moments up to 500, from which no finite latent can be drawn; extract the"
    with pytest.raises(DataError, match=re.escape(told)):
        train_on("run", folder, max_steps=4, ckpt_every=1, num_workers=1)
    assert newest_checkpoint(tmp_path / "run").step == 2


BAD = {
    "no VAE": ({"vae": None}, "store holds moments and does not say their VAE's scaling factor"),
    "no scale": ({"vae": {"name": VAE}}, "store holds moments and does not say their VAE's scaling factor"),
    "odd": ({"change": lambda samples: samples[:, [*range(8), 7]]}, "are \\[9, 8, 8\\], an odd number of channels"),
    "too few": (
        {"change": lambda samples: samples[:, :6]},
        "latents drawn from the moments in .*are \\[3, 8, 8\\] but",
    ),
}


@pytest.mark.parametrize("script", [TRAIN, TRAINER])
@pytest.mark.parametrize("what", BAD)
def test_moments_that_do_not_fit_are_one_line_and_nothing_is_written(call, moments, tmp_path, script, what):
    change, told = BAD[what]
    store = changed(moments, tmp_path / "store", **change)
    (tmp_path / "model.json").write_text('{"sample_size": 8, "num_classes": 10, "depth": 1}')
    flags = flags_of(script, store, tmp_path / "run", max_steps=2, model=tmp_path / "model.json")
    code, _, text = call(script, *flags)
    errors = [line for line in text.splitlines() if "error:" in line]
    assert (code, len(errors)) == (2, 1)
    assert re.search(told, errors[0])
    assert not (tmp_path / "run").exists()


def test_held_out_moments_without_a_scale_are_refused(moments, tmp_path):
    other = changed(moments, tmp_path / "other", vae=None)
    with pytest.raises(DataError, match="other holds moments and does not say"):
        make_plan(recipe_for(moments, dry_run=True, eval_steps=1, eval_path=other))


def test_both_scripts_make_the_same_steps_and_each_continues_what_the_other_began(call, moments, tmp_path):
    for script, name, steps in ((TRAIN, "a", 6), (TRAINER, "b", 6), (TRAINER, "c", 3), (TRAIN, "c", 6)):
        code, _, text = call(script, *flags_of(script, moments, tmp_path / name, max_steps=steps))
        assert code == 0, text
    assert_same(tmp_path / "a", tmp_path / "b", 6)
    assert_same(tmp_path / "a", tmp_path / "c", 6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("script", [TRAIN, TRAINER])
def test_two_ranks_make_the_steps_of_one(call, moments, tmp_path, script):
    options = {"max_steps": 12, "eval_steps": 6, "held_out_samples": 15}
    names = [] if script == TRAIN else ["--do_eval"]
    whole, two = tmp_path / "whole", tmp_path / "two"
    code, _, text = call(script, *flags_of(script, moments, whole, **options), *names)
    assert code == 0, text
    code, text = run(script, 2, *flags_of(script, moments, two, 2, **options), *names, log=tmp_path / "log")
    assert code == 0, text
    for name in ("loss", "mse", "vb", "eval_loss", "eval_loss_ema"):
        expected = losses(whole, name)
        assert expected
        assert losses(two, name) == pytest.approx(expected, abs=1e-5, rel=0), name
    expected, found = tensors(whole, 12), tensors(two, 12)
    for name in (name for name in expected if not name.startswith("optimizer")):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=0, err_msg=name)
