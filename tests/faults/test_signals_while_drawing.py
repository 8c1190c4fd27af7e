"""Signals while a preview is drawn or an evaluation is made: left at once, done by the run that continues."""

import json
import signal

import numpy as np
import pytest

from paddle_dit.data.store import StoreWriter
from paddle_dit.training.signals import STOPPED
from tests.faults.runs import TRAIN, TRAINER, assert_same, checkpoints, flags_of, losses, run, start, wait_for, wrapped
from tests.faults.test_signals import send, state_of

DIGITS_VAE = {"name": "data/digits_vae", "scaling_factor": 0.98597276, "image_size": 64}
SLOW_PREDICTIONS = """
from paddle_dit.training.session import Session
predict = Session.predict
def slow(session, *inputs):
    session.say("predicting now")
    time.sleep(0.3)
    return predict(session, *inputs)
Session.predict = slow
"""
SLOW_DECODING = """
from paddle_dit.training import sampling_preview
decode = sampling_preview.decode
def slow(*inputs, **named):
    print("decoding now", flush=True)
    time.sleep(0.5)
    return decode(*inputs, **named)
sampling_preview.decode = slow
"""
SLOW_JUDGING = """
from paddle_dit.evaluation.while_training import TrainingJudge
finish = TrainingJudge.finish
def slow(judge, still_here):
    print("judging now", flush=True)
    for _ in range(100):
        time.sleep(0.5)
        still_here()
    return finish(judge, still_here)
TrainingJudge.finish = slow
"""


@pytest.fixture
def digits_store(tmp_path):
    """Write random latents that the digits' VAE can decode."""
    latents = np.random.default_rng(0).standard_normal((64, 4, 8, 8)).astype(np.float32)
    form = {"sample_shape": (4, 8, 8), "dtype": "float32", "num_classes": 10, "vae": DIGITS_VAE}
    with StoreWriter(tmp_path / "digits", **form) as store:
        store.append(latents, np.arange(64) % 10)
    return tmp_path / "digits"


def stop_when_it_says(launch, line, whom="launcher"):
    """Send SIGTERM once a line has been printed, and return the exit code."""
    wait_for(lambda: line in launch.text, 60, line)
    send(launch, whom, signal.SIGTERM)
    return launch.wait(30)


PREVIEWS = [
    (TRAIN, 1, SLOW_PREDICTIONS, "predicting now"),
    (TRAIN, 2, SLOW_PREDICTIONS, "predicting now"),
    (TRAIN, 2, SLOW_DECODING, "decoding now"),
    (TRAINER, 1, SLOW_PREDICTIONS, "predicting now"),
    (TRAINER, 2, SLOW_DECODING, "decoding now"),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("script", "processes", "change", "line"), PREVIEWS)
def test_a_signal_leaves_a_preview_and_the_same_command_draws_it(
    digits_store, tmp_path, script, processes, change, line
):
    folder, picture = tmp_path / "run", tmp_path / "run" / "samples" / "step-0000003.png"
    values = {"max_steps": 4, "image_logging_steps": 3, "num_inference_steps": 10}
    flags = flags_of(script, digits_store, folder, processes, **values)
    with start(wrapped(tmp_path, script, change), processes, *flags, log=tmp_path / "log") as launch:
        code = stop_when_it_says(launch, line, "rank 0" if processes > 1 else "launcher")
        assert code == STOPPED, launch.text
    assert checkpoints(folder) == [3]
    assert state_of(folder, 3)["undone"] == ["draw"]
    assert not picture.exists()
    code, text = run(script, processes, *flags, log=tmp_path / "second.log")
    assert code == 0, text
    assert picture.exists()
    assert checkpoints(folder)[-1] == 4
    assert state_of(folder, 4)["undone"] == []
    whole = tmp_path / "whole"
    code, text = run(script, processes, *flags_of(script, digits_store, whole, processes, **values), log=tmp_path / "w")
    assert code == 0, text
    assert picture.read_bytes() == (whole / "samples" / picture.name).read_bytes()
    assert_same(whole, folder, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "processes"),
    [
        (TRAIN, 1),
        pytest.param(TRAIN, 2, marks=pytest.mark.distributed),
        (TRAINER, 1),
    ],
)
def test_a_signal_leaves_an_evaluation_and_the_same_command_makes_it(store, tmp_path, script, processes):
    folder, figures = tmp_path / "run", ("loss", "eval_loss", "eval_loss_ema")
    values = {"max_steps": 5, "eval_steps": 3, "held_out_samples": 16}
    flags = flags_of(script, store, folder, processes, **values)
    with start(wrapped(tmp_path, script, SLOW_PREDICTIONS), processes, *flags, log=tmp_path / "log") as launch:
        code = stop_when_it_says(launch, "predicting now", f"rank {processes - 1}" if processes > 1 else "launcher")
        assert code == STOPPED, launch.text
    assert checkpoints(folder) == [3]
    assert state_of(folder, 3)["undone"] == ["evaluate"]
    assert losses(folder, "eval_loss") == {}
    code, text = run(script, processes, *flags, log=tmp_path / "second.log")
    assert code == 0, text
    whole = tmp_path / "whole"
    code, text = run(script, processes, *flags_of(script, store, whole, processes, **values), log=tmp_path / "w")
    assert code == 0, text
    assert sorted(losses(folder, "eval_loss")) == [3, 5]
    assert_same(whole, folder, 5, figures)


@pytest.mark.slow
def test_what_was_left_after_the_last_step_is_done_once(digits_store, tmp_path):
    folder = tmp_path / "run"
    flags = flags_of(TRAIN, digits_store, folder, max_steps=3, eval_steps=3, held_out_samples=16)
    with start(wrapped(tmp_path, TRAIN, SLOW_PREDICTIONS), 1, *flags, log=tmp_path / "log") as launch:
        assert stop_when_it_says(launch, "predicting now") == STOPPED, launch.text
    for name, told in (("second", "continuing after step 3"), ("third", "already at step 3 of 3")):
        code, text = run(TRAIN, 1, *flags, log=tmp_path / name)
        assert code == 0, text
        assert told in text
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sum("eval_loss" in line for line in lines) == 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("script", [TRAIN, TRAINER])
def test_a_signal_to_any_rank_leaves_the_figures_of_drawn_images_and_they_are_made_later(
    digits_store, tmp_path, script
):
    values = {"max_steps": 4, "eval_every": 3, "eval_samples": 20, "eval_inference_steps": 3}
    values |= {"eval_features": "digits", "eval_reference": "digits-train"}
    folder, whole = tmp_path / "run", tmp_path / "whole"
    flags = flags_of(script, digits_store, folder, 2, **values)
    with start(wrapped(tmp_path, script, SLOW_JUDGING), 2, *flags, log=tmp_path / "log") as launch:
        assert stop_when_it_says(launch, "judging now", "rank 1") == STOPPED, launch.text
    assert state_of(folder, 3)["undone"] == ["measure"]
    assert losses(folder, "eval_fid") == {}
    for name, where in (("second", flags), ("w", flags_of(script, digits_store, whole, 2, **values))):
        code, text = run(script, 2, *where, log=tmp_path / name)
        assert code == 0, text
    assert sorted(losses(folder, "eval_fid")) == [3, 4]
    assert_same(whole, folder, 4, ("loss", "eval_fid", "eval_precision"))
