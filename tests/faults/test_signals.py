"""Signals to real runs: every rank stops after the same step, which is saved, and the same command continues."""

import json
import os
import signal
import time

import pytest

from paddle_dit.checkpoint import newest_checkpoint, open_checkpoint
from paddle_dit.training.signals import PATIENCE, STOPPED
from tests.faults.runs import (
    TRAIN,
    TRAINER,
    assert_same,
    checkpoints,
    flags_of,
    losses,
    run,
    start,
    wait_for,
    wrapped,
)

ENDLESS = 100_000  # steps
LAUNCHERS_CODE = {signal.SIGTERM: 15, signal.SIGINT: 2}  # where the launcher itself got the signal
SLOW_SAVES = """
from paddle_dit import checkpoint
write = checkpoint.save_file
checkpoint.save_file = lambda *inputs: time.sleep({seconds}) or write(*inputs)
"""
SIGNAL_AT_THE_START = """
from paddle_dit.training.session import Session
enter = Session._enter
def entered(session, opened):
    enter(session, opened)
    if session.ranks.rank == {rank}:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
Session._enter = entered
"""
RANK_0_ENDS_LAST = """
import atexit
if os.environ["PADDLE_TRAINER_ID"] == "0":
    atexit.register(time.sleep, 2)
"""


def steps_logged(folder):
    """Return the last step in the log, 0 before there is one."""
    return max(losses(folder), default=0)


def state_of(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "state.json").read_text())


def leftovers(folder):
    return [path.name for path in folder.glob(".checkpoint-*")]


def assert_stopped_and_saved(folder, launch):
    """One checkpoint, of the last step in the log; nothing half written; no traceback. Return the step."""
    step = steps_logged(folder)
    assert checkpoints(folder) == [step], launch.text
    assert open_checkpoint(folder / f"checkpoint-{step}").step == step
    assert state_of(folder, step)["undone"] == []
    assert leftovers(folder) == []
    assert f"stopped after step {step:,}; the same command continues" in launch.text
    assert "Traceback" not in launch.text
    return step


CASES = [
    pytest.param(TRAIN, "launcher", signal.SIGTERM),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (TRAIN, "all", signal.SIGINT),
            (TRAIN, "rank 0", signal.SIGTERM),
            (TRAIN, "rank 0", signal.SIGINT),
            (TRAIN, "rank 1", signal.SIGTERM),
            (TRAIN, "rank 1", signal.SIGINT),
            (TRAIN, "launcher", signal.SIGINT),
            (TRAINER, "rank 0", signal.SIGTERM),
            (TRAINER, "rank 1", signal.SIGTERM),
            (TRAINER, "launcher", signal.SIGTERM),
            (TRAINER, "all", signal.SIGINT),
        ]
    ),
]


def send(launch, whom, number):
    if whom == "all":  # as Ctrl-C does; the launcher's ranks lead sessions of their own
        os.killpg(launch.pid(), number)
    else:
        os.kill(launch.pid() if whom == "launcher" else launch.pid(int(whom.split()[1])), number)


@pytest.mark.distributed
@pytest.mark.parametrize(("script", "whom", "number"), CASES)
def test_a_signal_stops_all_ranks_after_the_same_step_which_is_saved(store, tmp_path, script, whom, number):
    folder = tmp_path / "run"
    flags = flags_of(script, store, folder, 2, max_steps=ENDLESS)
    with start(script, 2, *flags, log=tmp_path / "log") as launch:
        wait_for(lambda: steps_logged(folder) >= 3, 60, "the third step")
        before = steps_logged(folder)
        send(launch, whom, number)
        code = launch.wait(30)
        wait_for(lambda: not launch.pids(), 5, "the end of every process")
        assert code == (STOPPED if whom.startswith("rank") else LAUNCHERS_CODE[number]), launch.text
        step = assert_stopped_and_saved(folder, launch)
    assert before <= step <= before + 30


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_ends_later_than_another_keeps_its_exit_code(store, tmp_path):
    """The launcher sends it SIGTERM as soon as the other has ended."""
    folder = tmp_path / "run"
    flags = flags_of(TRAIN, store, folder, 2, max_steps=ENDLESS)
    with start(wrapped(tmp_path, TRAIN, RANK_0_ENDS_LAST), 2, *flags, log=tmp_path / "log") as launch:
        wait_for(lambda: steps_logged(folder) >= 3, 60, "the third step")
        os.kill(launch.pid(1), signal.SIGTERM)
        assert launch.wait(30) == STOPPED, launch.text
        assert_stopped_and_saved(folder, launch)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("script", [TRAIN, TRAINER])
def test_the_same_command_then_continues_to_the_same_end_bit_for_bit(store, tmp_path, script):
    values = {"max_steps": 24, "ckpt_every": ENDLESS}
    whole, folder = tmp_path / "whole", tmp_path / "parts"
    code, text = run(script, 2, *flags_of(script, store, whole, 2, **values), log=tmp_path / "whole.log")
    assert code == 0, text
    flags = flags_of(script, store, folder, 2, **values)
    with start(script, 2, *flags, log=tmp_path / "first.log") as launch:
        wait_for(lambda: steps_logged(folder) >= 3, 60, "the third step")
        os.kill(launch.pid(1), signal.SIGTERM)
        assert launch.wait(30) == STOPPED, launch.text
        step = assert_stopped_and_saved(folder, launch)
    assert step < 24, "the signal came too late to show anything"
    code, text = run(script, 2, *flags, log=tmp_path / "second.log")
    assert code == 0, text
    assert f"continuing after step {step}" in text
    assert_same(whole, folder, 24)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", [TRAIN, pytest.param(TRAINER, marks=pytest.mark.slow)])
def test_a_single_process_stops_likewise(store, tmp_path, script, number):
    folder = tmp_path / "run"
    with start(script, 1, *flags_of(script, store, folder, max_steps=ENDLESS), log=tmp_path / "log") as launch:
        wait_for(lambda: steps_logged(folder) >= 3, 60, "the third step")
        send(launch, "all", number)
        assert launch.wait(30) == STOPPED, launch.text
        assert_stopped_and_saved(folder, launch)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.distributed])])
def test_a_signal_before_the_first_step_saves_nothing(store, tmp_path, rank):
    folder, processes = tmp_path / "run", rank + 1
    script = wrapped(tmp_path, TRAIN, SIGNAL_AT_THE_START.format(rank=rank))
    flags = flags_of(TRAIN, store, folder, processes, max_steps=ENDLESS)
    code, text = run(script, processes, *flags, log=tmp_path / "log")
    assert code == STOPPED, text
    assert checkpoints(folder) == leftovers(folder) == []
    assert losses(folder) == {}
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("in_background", [False, True])
def test_a_signal_during_a_save_lets_it_end_and_saves_the_step_that_was_reached(store, tmp_path, in_background):
    folder, script = tmp_path / "run", wrapped(tmp_path, TRAIN, SLOW_SAVES.format(seconds=0.4))
    flags = flags_of(TRAIN, store, folder, 2, max_steps=ENDLESS, ckpt_every=20, async_save=in_background)
    with start(script, 2, *flags, log=tmp_path / "log") as launch:
        wait_for(lambda: leftovers(folder) == [".checkpoint-20.tmp"], 60, "the save")
        os.kill(launch.pid(1), signal.SIGTERM)
        assert launch.wait(30) == STOPPED, launch.text
        step = steps_logged(folder)
        assert checkpoints(folder) == [20, step]
        assert (step == 21) or in_background
        for saved in (20, step):
            open_checkpoint(folder / f"checkpoint-{saved}")
        assert leftovers(folder) == []
    code, text = run(TRAIN, 2, *flags[:-2], "--output-dir", folder, "--max-steps", step + 1, log=tmp_path / "next.log")
    assert code == 0, text
    assert f"continuing after step {step}" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_a_save_at_once_and_harms_nothing(store, tmp_path, number):
    folder, script = tmp_path / "run", wrapped(tmp_path, TRAIN, SLOW_SAVES.format(seconds=3))
    values = {"max_steps": 4, "ckpt_every": 2}
    flags = flags_of(TRAIN, store, folder, **values)
    code, text = run(TRAIN, 1, *flags_of(TRAIN, store, folder, **(values | {"max_steps": 2})), log=tmp_path / "first")
    assert code == 0, text
    with start(script, 1, *flags, log=tmp_path / "log") as launch:
        wait_for(lambda: leftovers(folder), 60, "the save")
        send(launch, "launcher", number)
        time.sleep(PATIENCE / 4)
        send(launch, "launcher", number)
        time.sleep(PATIENCE)
        assert launch.code is None, "a signal soon after the first is the same one"
        send(launch, "launcher", number)
        assert launch.wait(2) == 128 + number
    assert leftovers(folder) == [".checkpoint-4.tmp"]
    assert checkpoints(folder) == [2]
    assert newest_checkpoint(folder).step == 2
    code, text = run(TRAIN, 1, *flags, log=tmp_path / "second.log")
    assert code == 0, text
    assert "ended without a word: taking over" in text
    assert leftovers(folder) == []
    assert newest_checkpoint(folder).step == 4


@pytest.mark.distributed
def test_a_second_signal_ends_a_rank_that_waits_for_one_that_is_stopped(store, tmp_path):
    folder = tmp_path / "run"
    flags = flags_of(TRAIN, store, folder, 2, max_steps=ENDLESS, ckpt_every=2)
    with start(TRAIN, 2, *flags, log=tmp_path / "log") as launch:
        wait_for(lambda: steps_logged(folder) >= 3, 60, "the third step")
        waiting, stopped = launch.pid(0), launch.pid(1)
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(0.5)  # longer than a step: rank 0 is in a collective call now
        for pause in (0.3, PATIENCE):
            os.kill(waiting, signal.SIGTERM)
            time.sleep(pause)
            assert waiting in launch.pids()
        os.kill(waiting, signal.SIGTERM)
        wait_for(lambda: waiting not in launch.pids(), 2, "the end of rank 0")
        assert "stopped at once; what was written whole is kept" in launch.text
        os.kill(stopped, signal.SIGCONT)
        assert launch.wait(40) == 128 + signal.SIGTERM, launch.text
    for step in checkpoints(folder):
        open_checkpoint(folder / f"checkpoint-{step}")
    assert leftovers(folder) == []
