"""A run that is stopped and continued by the same command equals the unbroken one."""

import itertools
import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

import train
import train_image_generation_dit_trainer as trainer
from paddle_dit.data.store import PackedStore
from paddle_dit.evaluation.launch import write_random_latents
from paddle_dit.training import loop
from paddle_dit.training.plan import make_plan
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.session import Session, start_session
from paddle_dit.training.signals import STOPPED
from tests.faults.runs import TRAIN, TRAINER, assert_same, checkpoints, flags_of, losses, run

STEPS = 14  # an epoch has four
RECIPE = {"max_steps": STEPS, "log_every": 3, "accumulation": 2}
# One rank sends itself a signal before micro-batch MICRO (of two) of update STEP, both counted from 0.
STOPS = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
from paddle_dit import runtime
runtime.prepare()
from paddle_dit.diffusion.objective import GaussianDiffusion

losses, calls = GaussianDiffusion.training_losses, []
def stopping(*inputs):
    calls.append(1)
    rank = os.environ.get("PADDLE_TRAINER_ID", "0")
    if (str(len(calls)), rank) == (os.environ["STOP_CALL"], os.environ["STOP_RANK"]):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    return losses(*inputs)
GaussianDiffusion.training_losses = stopping
__import__(os.environ["STOP_SCRIPT"].removesuffix(".py")).main()
"""
MOMENTS = {  # update and micro-batch, from 0, before which the signal comes
    "epoch boundary": (7, 0),
    "mid-epoch": (4, 0),
    "mid-accumulation": (6, 1),
}
FAST = {(TRAIN, 2, "mid-accumulation")}


def cases(*groups, fast):
    """Return the combinations as parameters; those that are not fast are slow."""
    found = []
    for case in itertools.product(*groups):
        marks = [] if case in fast else [pytest.mark.slow]
        marks += [pytest.mark.distributed] if 2 in case else []
        found.append(pytest.param(*case, marks=marks, id="-".join(map(str, case))))
    return found


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    """Return a function that gives the folder of an unbroken run, made when first asked for."""
    made = {}

    def unbroken(script, processes, **recipe):
        key = script, processes, *recipe.items()
        if key not in made:
            base = tmp_path_factory.mktemp("unbroken")
            flags = flags_of(script, store, base / "run", processes, **recipe)
            code, text = run(script, processes, *flags, log=base / "log")
            assert code == 0, text
            made[key] = base / "run"
        return made[key]

    return unbroken


@pytest.mark.parametrize(("script", "processes", "moment"), cases([TRAIN, TRAINER], [1, 2], MOMENTS, fast=FAST))
def test_a_stopped_run_goes_on_bit_for_bit(store, unbroken, tmp_path, script, processes, moment):
    whole = unbroken(script, processes, **RECIPE)
    update, micro = MOMENTS[moment]
    (tmp_path / "stops.py").write_text(STOPS)
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = flags_of(script, store, folder, processes, **RECIPE)
    stop = {"STOP_CALL": str(2 * update + micro + 1), "STOP_RANK": str(processes - 1), "STOP_SCRIPT": script}
    code, text = run(tmp_path / "stops.py", processes, *flags, log=log, environment=stop)
    assert code == STOPPED, text
    assert checkpoints(folder) == [update + 1]
    state = json.loads((folder / f"checkpoint-{update + 1}" / "state.json").read_text())
    assert state["window"]["steps"] == (update + 1) % RECIPE["log_every"] > 0

    code, text = run(script, processes, *flags, log=log)
    assert code == 0, text
    assert f"continuing after step {update + 1}" in text
    assert sorted(losses(folder)) == [3, 6, 9, 12, 14]
    assert_same(whole, folder, STEPS)


@pytest.mark.distributed
@pytest.mark.parametrize(("former", "processes"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on_with_the_same_losses(store, unbroken, tmp_path, former, processes):
    recipe = {"max_steps": 25, "ckpt_every": 5}
    whole = unbroken(TRAIN, former, **recipe)
    folder = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-5", folder / "checkpoint-5")
    flags = flags_of(TRAIN, store, folder, processes, **recipe)
    code, text = run(TRAIN, processes, *flags, log=tmp_path / "log")
    assert code == 0, text
    assert f"ranks was {former}, now {processes}" in text
    for name in ("loss", "mse", "vb"):
        expected = {step: value for step, value in losses(whole, name).items() if step > 5}
        assert sorted(expected) == list(range(6, 26))
        assert losses(folder, name) == pytest.approx(expected, abs=1e-5, rel=0), name


@pytest.fixture
def call(monkeypatch):
    """Return a function that runs a script's ``main`` in this process and gives its exit code."""

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            (trainer if script == TRAINER else train).main()
        except SystemExit as stop:
            return stop.code
        return 0

    return call


@pytest.mark.parametrize("interrupted", ["evaluation", "preview"])
@pytest.mark.parametrize("script", [TRAIN, TRAINER])
def test_what_a_signal_kept_from_being_done_is_done_by_the_next_run(call, monkeypatch, tmp_path, script, interrupted):
    store = write_random_latents(tmp_path / "latents", vae={"name": "data/digits_vae", "scaling_factor": 0.98597276})
    recipe = {
        "max_steps": 6,
        "eval_steps": 4,
        "held_out_samples": 16,
        "image_logging_steps": 4,
        "num_inference_steps": 3,
    }
    whole, parts = (flags_of(script, store, tmp_path / name, **recipe) for name in ("whole", "parts"))
    assert call(script, *whole) == 0
    predict, predictions = Session.predict, []

    def stopping(session, *inputs):
        predictions.append(1)
        if len(predictions) == at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return predict(session, *inputs)

    # The Trainer draws before it evaluates, train.py after. An evaluation predicts twice, three steps at two scales six
    # times; the signal comes before the second time of what is interrupted.
    comes_first = (interrupted == "evaluation") == (script == TRAIN)
    at = 2 + (0 if comes_first else 2 if interrupted == "preview" else 6)
    with monkeypatch.context() as patched:
        patched.setattr(Session, "predict", stopping)
        assert call(script, *parts) == STOPPED
    state = json.loads((tmp_path / "parts" / "checkpoint-4" / "state.json").read_text())
    duty = {"evaluation": "evaluate", "preview": "draw"}[interrupted]
    assert sorted(state["undone"]) == (["draw", "evaluate"] if comes_first else [duty])
    assert call(script, *parts) == 0
    for name in ("eval_loss", "eval_loss_ema"):
        assert sorted(losses(tmp_path / "parts", name)) == [4, 6]
    assert_same(
        tmp_path / "whole", tmp_path / "parts", 6, ("loss", "eval_loss", "eval_mse", "eval_vb", "eval_loss_ema")
    )
    pictures = [tmp_path / name / "samples" / "step-0000004.png" for name in ("whole", "parts")]
    np.testing.assert_array_equal(*(np.asarray(Image.open(picture)) for picture in pictures))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_data_is_read_again_to_continue(store, monkeypatch, tmp_path, num_workers):
    def session(steps):
        options = {"model": "DiT-Digits/2", "global_batch_size": 16, "image_logging_steps": -1, "max_steps": steps}
        options |= {"feature_path": store, "output_dir": tmp_path / "run", "num_workers": num_workers}
        return start_session(make_plan(TrainRecipe(**options)))

    session(5).run(loop.train)
    read, gather = [], PackedStore.gather
    monkeypatch.setattr(
        PackedStore, "gather", lambda own, indices, *more: read.append(indices) or gather(own, indices, *more)
    )
    continued = session(9)
    continued.run(loop.train)
    order = continued.plan.order
    assert 4 <= len(read) <= 4 + 2 * num_workers  # what a thread has read ahead
    for step, indices in enumerate(read, 5):
        np.testing.assert_array_equal(indices, order.global_batch(step))
