"""Two runs of one command in one output folder: real processes, one of them killed."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from paddle_dit.folder_lock import LOCK
from tests.conftest import ROOT
from tests.faults.runs import TRAIN, TRAINER, checkpoints, flags_of, losses, run, start, wait_for

ENDLESS = 100_000  # steps
RACER = """
import sys, time
from pathlib import Path
from paddle_dit.errors import ConfigError
from paddle_dit.folder_lock import FolderLock

while time.time() < float(sys.argv[2]):
    pass
try:
    lock = FolderLock(Path(sys.argv[1]), "--output-dir")
    print("won", flush=True)
    time.sleep(float(sys.argv[3]))
except ConfigError as error:
    print(error, flush=True)
"""


def snapshot(folder):
    """Return name -> hash of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def errors_in(text):
    return sorted({line for line in text.splitlines() if line.startswith("error:")})


CASES = [
    (TRAIN, 1),
    *(
        pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.distributed])
        for case in [(TRAIN, 2), (TRAINER, 1), (TRAINER, 2)]
    ),
]


@pytest.mark.parametrize(("script", "processes"), CASES)
def test_a_second_run_is_refused_and_takes_over_once_the_first_was_killed(store, tmp_path, script, processes):
    folder = tmp_path / "run"
    endless = flags_of(script, store, folder, processes, max_steps=ENDLESS, ckpt_every=2)
    with start(script, processes, *endless, log=tmp_path / "first") as first:
        wait_for(lambda: checkpoints(folder), 60, "a checkpoint")
        holder = f"process {first.pid(0) or first.pid()} on {socket.gethostname()}"
        # Stopped, it still holds the folder, and what changes there is the second run's doing.
        pids = [pid for pid, rank in first.pids().items() if rank is not None or processes == 1]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        before = snapshot(folder)
        code, text = run(script, processes, *endless, log=tmp_path / "second")
        assert code == 2, text
        assert snapshot(folder) == before
        told = {re.sub("^error: (rank 0: )?", "", line) for line in errors_in(text)}
        flag = "--output-dir" if script == TRAIN else "--output_dir"
        assert told == {f"{flag} {folder} is in use by {holder}; wait for it, stop it, or choose another folder"}
        assert "Traceback" not in text
        first.kill()
    last = max(checkpoints(folder))
    flags = flags_of(script, store, folder, processes, max_steps=last + 2, ckpt_every=2)
    code, text = run(script, processes, *flags, log=tmp_path / "third")
    assert code == 0, text
    assert f"{folder} was in use by {holder}, which ended without a word: taking over" in text
    assert f"continuing after step {last}" in text
    code, text = run(script, processes, *flags, log=tmp_path / "fourth")
    assert code == 0, text
    assert "taking over" not in text


def test_a_run_that_a_signal_stopped_has_released_its_folder(store, tmp_path):
    folder = tmp_path / "run"
    with start(TRAIN, 1, *flags_of(TRAIN, store, folder, max_steps=ENDLESS), log=tmp_path / "first") as first:
        wait_for(lambda: losses(folder), 60, "a step")
        os.kill(first.pid(), signal.SIGTERM)
        assert first.wait(30) == 75
    assert (folder / LOCK).read_text() == ""


def test_runs_beside_each_other_do_not_mind(store, tmp_path):
    with start(TRAIN, 1, *flags_of(TRAIN, store, tmp_path / "one", max_steps=ENDLESS), log=tmp_path / "first") as first:
        wait_for(lambda: losses(tmp_path / "one"), 60, "a step")
        code, text = run(TRAIN, 1, *flags_of(TRAIN, store, tmp_path / "two", max_steps=2), log=tmp_path / "second")
        assert code == 0, text
        assert first.code is None


@pytest.fixture
def race(tmp_path):
    """Return a function that starts processes which take the lock at one moment, and gives what each says."""
    import time

    started = []

    def race(number, folder=tmp_path):
        moment = str(time.time() + 0.5)
        command = [sys.executable, "-c", RACER, str(folder), moment, "60"]
        racers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(number)]
        started.extend(racers)
        return {racer: racer.stdout.readline().strip() for racer in racers}

    yield race
    for racer in started:
        racer.kill()
        racer.communicate()


def test_of_many_processes_one_wins_and_a_killed_winner_is_followed(race):
    for number in range(3):
        said = race(6)
        won = [racer for racer, line in said.items() if line == "won" or "taking over" in line]
        refused = [line for line in said.values() if "is in use by" in line]
        assert (len(won), len(refused)) == (1, 5), said
        assert ("taking over" in said[won[0]]) == (number > 0)
        for racer in said:
            racer.kill()
            racer.wait()
