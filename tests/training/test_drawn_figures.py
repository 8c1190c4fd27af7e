"""Figures of drawn images while training, on the digits: the same on any ranks, in both scripts, and no disturbance."""

import itertools
import json
import os
import random
import signal
import time

import numpy as np
import paddle
import pytest

from paddle_dit.data.digits import load_digits
from paddle_dit.data.store import StoreWriter
from paddle_dit.errors import CheckpointError, ConfigError, DataError
from paddle_dit.evaluation.digit_features import DigitFeatures
from paddle_dit.evaluation.suite import evaluate_arrays
from paddle_dit.evaluation.while_training import TrainingJudge
from paddle_dit.generation import SamplingOptions, draw_batches, load_generator
from paddle_dit.sampling.many import labels_of
from paddle_dit.training import drawn_figures
from paddle_dit.training.duties import Duties
from paddle_dit.training.plan import make_plan
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.session import Session, start_session
from paddle_dit.training.signals import STOPPED
from tests.faults.runs import TRAIN, TRAINER, assert_same, checkpoints, flags_of, losses, run, tensors

DIGITS_VAE = {"name": "data/digits_vae", "scaling_factor": 0.98597276, "image_size": 64}
COUNT = 40
EVALUATION = {
    "eval_every": 2,
    "eval_samples": COUNT,
    "eval_features": "digits",
    "eval_reference": "digits-train",
    "eval_inference_steps": 3,
}
# Weights that change fast, so that the figures do.
COURSE = {"max_steps": 3, "learning_rate": 1e-2, "ema_decay": 0.5}
NAMES = ["eval_fid", "eval_sfid", "eval_inception_score", "eval_precision", "eval_recall"]


def write_store(folder, vae=DIGITS_VAE):
    latents = np.random.default_rng(0).standard_normal((64, 4, 8, 8)).astype(np.float32)
    with StoreWriter(folder, sample_shape=(4, 8, 8), dtype="float32", num_classes=10, vae=vae) as store:
        store.append(latents, np.arange(64) % 10)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture
def train_on(call, store, tmp_path):
    """Return a function that trains by a script and gives the folder, the exit code and all that was said."""

    def train_on(name, script=TRAIN, **changes):
        flags = flags_of(script, store, tmp_path / name, **{**COURSE, **EVALUATION, **changes})
        code, out, err = call(script, *flags)
        return tmp_path / name, code, out + err

    return train_on


def figures(folder):
    """Return step -> the five figures."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: [line[name] for name in NAMES] for line in lines if "eval_fid" in line}


def assert_close(found, expected):
    """Compare figures of images that may differ by rounding, for which one of them may count as real or not."""
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step][:3] == pytest.approx(values[:3], rel=2e-3), step
        assert found[step][3:] == pytest.approx(values[3:], abs=1.01 / COUNT), step


def scalars(folder):
    from visualdl import LogReader

    (path,) = (folder / "visualdl").glob("vdlrecords*")
    reader = LogReader(file_path=str(path))
    return {
        tag: [(point.id, point.value) for point in reader.get_data("scalar", tag)]
        for tag in reader.get_tags()["scalar"]
        if tag.startswith("eval/")
    }


def test_both_scripts_log_the_same_figures_and_train_as_if_there_were_none(train_on, store, tmp_path):
    folder, code, told = train_on("ours")
    assert code == 0, told
    assert sorted(figures(folder)) == [2, 3]
    assert figures(folder)[2] != figures(folder)[3]
    shown = scalars(folder)
    assert sorted(shown) == sorted(name.replace("eval_", "eval/", 1) for name in NAMES)
    assert shown["eval/fid"] == [(step, pytest.approx(values[0])) for step, values in figures(folder).items()]
    drawn = "40 images by the averaged weights, ddim, 3 steps, guidance 1, seed 0, beside digits-train (1,497 images)"
    assert f"evaluation every 2 steps: {drawn}; features: a classifier of the embedded digits" in told
    assert told.count("40 samples are fewer than the 112 features") == 1
    assert told.count("40 samples are few:") == 1
    for step, (fid, *_) in figures(folder).items():
        assert f"step {step}: FID-40 {fid:,.3f}, sFID-40 " in told
    assert f"recall {figures(folder)[3][-1]:.3f}; of {drawn}; features: " in told

    trainer, code, told = train_on("trainer", TRAINER)
    assert code == 0, told
    assert figures(trainer) == figures(folder)
    without, code, _ = train_on("without", eval_every=0)
    assert code == 0
    assert figures(without) == {}
    for other in (trainer, without):
        assert_same(folder, other, 3, ("loss", "mse", "vb"))

    source = load_generator(folder / "checkpoint-3")  # what another command would draw of the same weights
    labels = labels_of(COUNT, source.info.config, "uniform", 0)
    images = np.concatenate(list(draw_batches(source, labels, SamplingOptions("ddim", 3, 1.0))))
    expected = evaluate_arrays(images, load_digits("train")[0], DigitFeatures())
    assert_close({3: figures(folder)[3]}, {3: list(expected.values())})


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_draw_and_find_what_one_does(train_on, store, tmp_path):
    one, code, _ = train_on("one")
    assert code == 0
    flags = flags_of(TRAIN, store, tmp_path / "two", 2, **COURSE, **EVALUATION)
    code, told = run(TRAIN, 2, *flags, log=tmp_path / "log")
    assert code == 0, told
    assert_close(figures(tmp_path / "two"), figures(one))
    for name, value in tensors(one, 3).items():
        np.testing.assert_allclose(tensors(tmp_path / "two", 3)[name], value, atol=2e-3, err_msg=name)


def test_no_random_state_is_touched_and_the_model_trains_on(train_on, monkeypatch):
    measure, seen = Duties.measure, []

    def watched(duties):
        model = duties._session.model

        def state():
            kept, (_, numpy_state, *rest) = paddle.get_rng_state(), np.random.get_state()
            following = paddle.rand([3]).tolist()
            paddle.set_rng_state(kept)
            weights = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
            return following, random.getstate(), numpy_state.tobytes(), rest, weights, model.training

        before = (
            *state(),
            model.training,
            {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        )
        measure(duties)
        after = (
            *state(),
            model.training,
            {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        )
        seen.append(before == after)

    monkeypatch.setattr(Duties, "measure", watched)
    assert train_on("run")[1] == 0
    assert seen == [True, True]


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that has a run interrupted at the so-many-th moment of its evaluations."""

    def interrupt(moment, how):
        go_on, moments = Session.go_on, itertools.count(1)

        def watched(session):
            if next(moments) == moment:
                how()
            return go_on(session)

        monkeypatch.setattr(Session, "go_on", watched)

    return interrupt


def send_signal():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)


def break_down():
    raise ZeroDivisionError


# Moments of the first evaluation: 3 predictions, 32 images decoded one by one, handed over together; then with 8 more.
@pytest.mark.parametrize(("script", "moment", "saved"), [(TRAIN, 2, 2), (TRAIN, 44, 1000), (TRAINER, 30, 1000)])
def test_a_signal_leaves_an_evaluation_and_the_same_command_makes_it(
    train_on, interrupt, monkeypatch, script, moment, saved
):
    whole = train_on("whole", script, ckpt_every=saved)[0]
    with monkeypatch.context():
        interrupt(moment, send_signal)
        folder, code, told = train_on("parts", script, ckpt_every=saved)
        monkeypatch.undo()
    assert code == STOPPED, told
    assert checkpoints(folder) == [2]
    assert json.loads((folder / "checkpoint-2" / "state.json").read_text())["undone"] == ["measure"]
    assert not figures(folder)
    assert train_on("parts", script, ckpt_every=saved)[1] == 0
    assert figures(folder) == figures(whole)
    assert_same(whole, folder, 3)


def test_a_process_that_ends_in_an_evaluation_has_saved_before(train_on, interrupt, monkeypatch):
    interrupt(9, break_down)
    with pytest.raises(ZeroDivisionError):
        train_on("run", ckpt_every=2)
    monkeypatch.undo()
    folder, code, told = train_on("run", ckpt_every=2)
    assert code == 0
    assert "continuing after step 2" in told
    assert sorted(figures(folder)) == [2, 3]
    before = (folder / "log.jsonl").read_text()
    assert "already at step 3 of 3: nothing to do" in train_on("run", ckpt_every=2)[2]
    assert (folder / "log.jsonl").read_text() == before


def fails(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("place", "error", "told"),
    [
        ((TrainingJudge, "finish"), DataError("no figures today"), "no figures today"),
        ((TrainingJudge, "add"), OSError(28, "No space left", "x.png"), "x.png: No space left"),
        ((drawn_figures, "decode"), MemoryError("no bytes\nat all"), "out of memory: no bytes at all"),
    ],
)
def test_what_fails_in_an_evaluation_costs_its_figures_alone(train_on, monkeypatch, place, error, told):
    monkeypatch.setattr(*place, lambda *_, **__: fails(error)())
    folder, code, said = train_on("run")
    assert code == 0
    assert f"warning: no figures after step 2, the training goes on: {told}\n" in said
    assert figures(folder) == {}
    assert sorted(losses(folder)) == [1, 2, 3]
    assert checkpoints(folder) == [3]


@pytest.mark.parametrize("moment", [2, 5, 36])
def test_what_fails_besides_during_an_evaluation_still_ends_the_run(train_on, interrupt, moment):
    interrupt(moment, fails(CheckpointError("the save in the background failed")))
    _, code, told = train_on("run")
    assert code == 2
    assert "error: the save in the background failed" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"eval_reference": "nowhere"}, "there is no nowhere; give a folder of images or an .npz"),
        ({"eval_features": "inception"}, "digits-train are 8 x 8 digits; add --eval-features digits"),
        ({"eval_guidance_scale": 2.0, "class_dropout_prob": 0.0}, "guided by; use --eval-guidance-scale 1"),
        ({"vae_name_or_path": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_training(train_on, change, told):
    folder, code, said = train_on("run", **change)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert told in errors[0]
    assert not folder.exists()


def test_the_trainer_names_its_own_flags(train_on):
    told = train_on("run", TRAINER, eval_features="inception")[2]
    assert "digits-train are 8 x 8 digits; add --eval_features digits" in told


def test_missing_inception_weights_are_refused(train_on, tmp_path):
    np.savez(tmp_path / "real.npz", np.zeros((4, 32, 32, 3), np.uint8))
    inception = {"eval_reference": tmp_path / "real.npz", "eval_features": "inception", "inception": tmp_path / "x.pth"}
    folder, code, told = train_on("run", **inception)
    assert code == 2
    assert "no Inception weights at" in told
    assert not folder.exists()


def test_latents_of_an_unknown_vae_are_refused(call, tmp_path):
    unknown = write_store(tmp_path / "unknown", None)
    code, _, told = call(TRAIN, *flags_of(TRAIN, unknown, tmp_path / "run", **COURSE, **EVALUATION))
    assert code == 2
    assert "the data does not say which VAE made the latents; give --vae" in told
    assert not (tmp_path / "run").exists()


def test_someone_must_evaluate(store, tmp_path):
    options = {"feature_path": store, "global_batch_size": 16, "output_dir": tmp_path / "run", **COURSE, **EVALUATION}
    plan = make_plan(TrainRecipe(model="DiT-Digits/2", **options))
    with pytest.raises(ConfigError, match="start_session"):
        start_session(plan)
