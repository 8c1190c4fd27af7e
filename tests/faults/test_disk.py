"""Disks that are full or cannot be written, and folders that go away: one line, and the last checkpoint is whole."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from paddle_dit import checkpoint as checkpoints_of
from paddle_dit.checkpoint import newest_checkpoint, open_checkpoint
from paddle_dit.errors import CheckpointError
from paddle_dit.training import saving
from tests.faults.runs import (
    TRAIN,
    TRAINER,
    checkpoints,
    errors_in,
    fill,
    flags_of,
    losses,
    run,
    start,
    wait_for,
    wrapped,
)
from tests.faults.test_checkpoint_damage import train_here
from tests.faults.test_signals import leftovers

ENDLESS = 100_000  # steps
MIB = 2**20
FILES_STAY_SMALL = """
import resource
from paddle_dit.training.session import Session
update = Session.update
def limited(session, losses):
    update(session, losses)
    if session.updates == 4:
        session.background.wait()  # for the checkpoint before, which is not meant
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
Session.update = limited
"""
ANOTHER_FILLS_THE_DISK = """
from paddle_dit import checkpoint
check = checkpoint._check_space
def filled(folder, tensors):
    check(folder, tensors)
    if (folder / "checkpoint-3").exists():
        free = os.statvfs(folder)
        (folder.parent / "another's").write_bytes(bytes(free.f_bavail * free.f_bsize - 2**20))
checkpoint._check_space = filled
"""


def assert_one_line(text, told):
    """All ranks say the same in one line, and nothing else that looks like an error."""
    lines = {re.sub("^error: (rank 0: )?", "", line) for line in errors_in(text)}
    assert len(lines) == 1, text
    assert re.search(told, next(iter(lines))), lines
    assert "Traceback" not in text


def assert_last_is_whole(folder, step):
    assert checkpoints(folder) == [step]
    assert newest_checkpoint(folder, lambda line: pytest.fail(line)).step == step
    assert leftovers(folder) == []
    assert not list(folder.rglob("*.partial"))


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def checkpoint_mib(store, tmp_path_factory):
    """Return how large a checkpoint of these runs is."""
    folder = tmp_path_factory.mktemp("size") / "run"
    train_here(store, folder, max_steps=1)
    return size_of(folder / "checkpoint-1") / MIB


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_a_disk_without_enough_space_is_noticed_before_anything_is_written(
    store, small_disk, checkpoint_mib, monkeypatch, in_background
):
    folder, written = small_disk(int(1.9 * checkpoint_mib) + 1) / "run", []
    write = checkpoints_of._write
    monkeypatch.setattr(checkpoints_of, "_write", lambda *inputs: written.append(inputs[1]) or write(*inputs))
    with pytest.raises(CheckpointError, match=r"checkpoint-6: it takes \d+ MiB, and \d+ MiB are free there"):
        train_here(store, folder, async_save=in_background)
    assert written == [3]
    assert_last_is_whole(folder, 3)


DISKS = [
    pytest.param(TRAIN, 1, False),
    *(
        pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.distributed])
        for case in [(TRAIN, 1, True), (TRAIN, 2, True), (TRAIN, 2, False), (TRAINER, 1, False), (TRAINER, 2, True)]
    ),
]


@pytest.mark.parametrize(("script", "processes", "in_background"), DISKS)
def test_a_disk_that_fills_while_a_checkpoint_is_written(
    store, small_disk, tmp_path, checkpoint_mib, script, processes, in_background
):
    folder = small_disk(int(3 * checkpoint_mib) + 4) / "run"
    values = {"max_steps": 9, "ckpt_every": 3, "async_save": in_background}
    flags = flags_of(script, store, folder, processes, **values)
    code, text = run(wrapped(tmp_path, script, ANOTHER_FILLS_THE_DISK), processes, *flags, log=tmp_path / "log")
    assert code == 2, text
    assert_one_line(text, r"cannot write .*checkpoint-6: .*No space left.*; earlier checkpoints are whole")
    assert_last_is_whole(folder, 3)
    (folder.parent / "another's").unlink()
    flags = flags_of(script, store, folder, processes, **values, save_total_limit=2)
    code, text = run(script, processes, *flags, log=tmp_path / "next")
    assert code == 0, text
    assert "continuing after step 3" in text
    assert checkpoints(folder) == [6, 9]


@pytest.mark.parametrize(("script", "processes", "in_background"), DISKS)
def test_a_file_that_may_not_grow_is_as_a_full_disk(store, tmp_path, script, processes, in_background):
    folder = tmp_path / "run"
    flags = flags_of(script, store, folder, processes, max_steps=ENDLESS, ckpt_every=3, async_save=in_background)
    change = FILES_STAY_SMALL.format(limit=100_000)
    code, text = run(wrapped(tmp_path, script, change), processes, *flags, log=tmp_path / "log")
    assert code == 2, text
    assert_one_line(text, "cannot write .*checkpoint-6: .*File too large.*; earlier checkpoints are whole")
    assert_last_is_whole(folder, 3)
    assert max(losses(folder)) < (30 if in_background else 7), "the failure is raised at the next step's boundary"


def test_a_run_outlives_a_disk_that_cannot_take_a_line_of_its_log(store, small_disk, tmp_path):
    disk = small_disk(32)
    folder = disk / "run"
    with start(TRAIN, 1, *flags_of(TRAIN, store, folder, max_steps=ENDLESS), log=tmp_path / "log") as launch:
        wait_for(lambda: len(losses(folder)) >= 3, 60, "the third step")
        with pytest.raises(OSError, match="No space left"):
            fill(disk / "another's")
        wait_for(lambda: "log.jsonl is lost: No space left on device" in launch.text, 30, "the warning")
        last = max(losses(folder))
        (disk / "another's").unlink()
        wait_for(lambda: max(losses(folder)) > last + 1, 30, "a later line")
        os.kill(launch.pid(), signal.SIGTERM)
        assert launch.wait(30) == 75, launch.text
    assert checkpoints(folder) == [max(losses(folder))]


@pytest.mark.parametrize("script", [TRAIN, pytest.param(TRAINER, marks=pytest.mark.slow)])
def test_a_disk_that_cannot_be_written_is_refused_in_one_line(store, small_disk, tmp_path, checkpoint_mib, script):
    disk = small_disk(int(3 * checkpoint_mib) + 4)
    folder = disk / "run"
    flags = flags_of(script, store, folder, max_steps=3)
    train_here(store, folder, max_steps=3)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, text = run(script, 1, *flags, log=tmp_path / "log")
    assert code == 2, text
    assert_one_line(text, f"({folder}|no permission to write)")
    assert_last_is_whole(folder, 3)


@pytest.fixture
def immutable():
    """Return a function after which nobody can write into a folder; undone at the end."""
    made = []

    def immutable(folder):
        done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a folder cannot be made immutable here: {done.stderr.strip()}")
        made.append(folder)

    if os.geteuid() != 0 or shutil.which("chattr") is None:
        pytest.skip("a folder can be made immutable by root alone")
    yield immutable
    for folder in made:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


@pytest.mark.parametrize("in_background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_that_cannot_be_written_any_more_stops_the_run(store, tmp_path, immutable, in_background):
    folder = tmp_path / "run"
    flags = flags_of(TRAIN, store, folder, max_steps=ENDLESS, ckpt_every=40, async_save=in_background)
    with start(TRAIN, 1, *flags, log=tmp_path / "log") as launch:
        wait_for(lambda: checkpoints(folder), 60, "a checkpoint")
        immutable(folder)
        last = max(checkpoints(folder))
        assert launch.wait(60) == 2, launch.text
        assert_one_line(launch.text, "(Operation not permitted|Permission denied).*earlier checkpoints are whole")
    assert max(checkpoints(folder)) == last
    assert newest_checkpoint(folder, lambda line: pytest.fail(line)).step == last


@pytest.mark.parametrize("how", ["renamed", pytest.param("removed", marks=pytest.mark.slow)])
def test_an_output_folder_that_goes_away_is_made_anew_by_the_next_save(store, tmp_path, how):
    folder, aside = tmp_path / "run", tmp_path / "aside"
    flags = flags_of(TRAIN, store, folder, max_steps=ENDLESS, ckpt_every=10)
    with start(TRAIN, 1, *flags, log=tmp_path / "log") as launch:
        wait_for(lambda: checkpoints(folder), 60, "a checkpoint")
        folder.rename(aside)
        before = max(losses(aside))
        if how == "removed":
            shutil.rmtree(aside)
        wait_for(lambda: checkpoints(folder), 60, "the next checkpoint")
        os.kill(launch.pid(), signal.SIGTERM)
        assert launch.wait(30) == 75, launch.text
        assert "Traceback" not in launch.text
    assert min(losses(folder)) >= before
    last = max(losses(folder))
    assert checkpoints(folder)[-1] == last
    for step in checkpoints(folder):
        open_checkpoint(folder / f"checkpoint-{step}")
    flags = flags_of(TRAIN, store, folder, max_steps=last + 1)
    code, text = run(TRAIN, 1, *flags, log=tmp_path / "next")
    assert code == 0, text
    assert f"continuing after step {last}" in text


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_the_newest_and_every_so_many_steps_are_kept(store, tmp_path, in_background):
    folder = tmp_path / "run"
    keep = {"save_total_limit": 2, "keep_every": 4, "async_save": in_background}
    train_here(store, folder, max_steps=11, ckpt_every=1, **keep)
    assert checkpoints(folder) == [4, 8, 10, 11]
    assert leftovers(folder) == []


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_nothing_is_deleted_for_a_checkpoint_that_is_not_whole(store, tmp_path, monkeypatch, in_background):
    """What the disk gives back differs from what was written."""
    folder, save = tmp_path / "run", saving.save_checkpoint

    def spoiled(*inputs):
        saved = save(*inputs)
        if saved.step == 4:
            (saved.folder / "ema.safetensors").write_bytes(b"spoiled")
        return saved

    monkeypatch.setattr(saving, "save_checkpoint", spoiled)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged: ema\.safetensors"):
        train_here(store, folder, max_steps=9, ckpt_every=1, save_total_limit=2, async_save=in_background)
    assert checkpoints(folder) == [2, 3, 4]
    told = []
    assert newest_checkpoint(folder, told.append).step == 3
    assert len(told) == 1
