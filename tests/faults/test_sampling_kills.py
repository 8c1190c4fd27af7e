"""scripts/sample_ddp.py killed, stopped and damaged, on one and two processes: the end is always the same."""

import os
import random
import signal
import time

import numpy as np
import pytest

from paddle_dit.config import DiTConfig
from paddle_dit.training.signals import STOPPED
from tests.faults.runs import run, start, wait_for
from tests.faults.test_disk import errors_in
from tests.scripts.test_sample import make_run

SCRIPT = "scripts/sample_ddp.py"
COUNT, BATCH = 72, 6


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), DiTConfig.from_preset("DiT-Digits/2"))


@pytest.fixture(scope="module")
def whole(run_folder, tmp_path_factory):
    """Return the set that one unbroken process makes."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    code, text = run(SCRIPT, 1, *flags(run_folder, folder), log=folder.with_name("log"))
    assert code == 0, text
    return folder


def flags(run_folder, folder):
    return [
        *("--ckpt", run_folder, "--num-fid-samples", COUNT, "--per-proc-batch-size", BATCH, "--cfg-scale", 1.5),
        *("--num-sampling-steps", 20, "--sample-dir", folder),
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(folder):
    """Return part -> when it was written, of the parts that are finished."""
    return {path.stem: path.stat().st_mtime_ns for path in (folder / ".parts").glob("*.json")}


def has_begun(folder, launch):
    return (folder / ".meeting.json").exists() or launch.code is not None


def go_on(run_folder, folder, processes, log):
    code, text = run(SCRIPT, processes, *flags(run_folder, folder), log=log)
    assert code == 0, text
    return text


@pytest.mark.distributed
def test_two_processes_killed_and_continued_by_one_end_with_the_same_bytes(run_folder, whole, tmp_path):
    folder = tmp_path / "set"
    with start(SCRIPT, 2, *flags(run_folder, folder), log=tmp_path / "log") as launch:
        wait_for(lambda: len(finished(folder)) >= 2, 60, "two finished batches")
        launch.kill()
    before = finished(folder)
    assert 2 <= len(before) < COUNT / BATCH
    damaged = min(before)
    path = folder / f"{int(damaged) * BATCH + 1:06d}.png"
    path.write_bytes(path.read_bytes()[:-1])
    text = go_on(run_folder, folder, 1, tmp_path / "log-1")
    assert f"{(len(before) - 1) * BATCH} of {COUNT} images are done already" in text
    assert contents(folder) == contents(whole)


def test_what_was_written_is_what_the_suites_read(whole):
    with np.load(whole / "samples.npz", allow_pickle=False) as file:
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((COUNT, 32, 32, 3), np.uint8)
        assert (file["arr_1"].shape, file["arr_1"].dtype) == ((COUNT,), np.int64)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_end_with_the_same_bytes(run_folder, whole, tmp_path, processes):
    folder, moments = tmp_path / "set", random.Random(processes)
    for attempt in range(4):
        before = finished(folder)
        with start(SCRIPT, processes, *flags(run_folder, folder), log=tmp_path / f"log-{attempt}") as launch:
            wait_for(
                lambda launch=launch: (folder / ".meeting.json").exists() or launch.code is not None, 60, "a start"
            )
            time.sleep(moments.uniform(0, 1))
            launch.kill()
        if "complete" in (folder / "samples.json").read_text():
            break
        assert before.items() <= finished(folder).items()
    go_on(run_folder, folder, processes, tmp_path / "log")
    assert contents(folder) == contents(whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "whom"), [(1, None), (2, 0), (2, 1), (2, "launcher")])
def test_a_signal_stops_between_steps_and_the_same_command_continues(run_folder, whole, tmp_path, processes, whom):
    folder = tmp_path / "set"
    with start(SCRIPT, processes, *flags(run_folder, folder), log=tmp_path / "log") as launch:
        # Before its first batch a process may not have begun to listen for signals.
        wait_for(
            lambda: len({int(number) % processes for number in finished(folder)}) == processes,
            60,
            "a finished batch of each process",
        )
        os.kill(launch.pid(None if whom == "launcher" else whom), signal.SIGTERM)
        assert launch.wait(60) == (15 if whom == "launcher" else STOPPED), launch.text
        assert "stopped; finished batches are kept, the same command continues" in launch.text
        wait_for(lambda: not launch.pids(), 30, "the end of all processes")
        assert not errors_in(launch.text)
    assert 0 < len(finished(folder)) < COUNT / BATCH
    go_on(run_folder, folder, 1, tmp_path / "log-1")
    assert contents(folder) == contents(whole)


@pytest.mark.distributed
def test_other_settings_are_one_line_on_two_processes_and_nothing_is_overwritten(run_folder, whole, tmp_path):
    before = contents(whole)
    code, text = run(SCRIPT, 2, *flags(run_folder, whole), "--seed", 1, log=tmp_path / "log")
    assert code == 2, text
    assert any("holds samples of other settings (seed was 0, now 1)" in line for line in errors_in(text)), text
    assert "Traceback" not in text
    assert contents(whole) == before
