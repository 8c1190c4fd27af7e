"""Runs that continue from a checkpoint that was named, and what may have happened to it or to its successors."""

import shutil

import pytest

from paddle_dit.checkpoint import open_checkpoint
from paddle_dit.errors import CheckpointError
from tests.faults.runs import assert_same, checkpoints, losses
from tests.faults.test_checkpoint_damage import train_here


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """Return an unbroken run of eight steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_here(store, folder, max_steps=8, ckpt_every=2)
    return folder


@pytest.fixture
def named(whole, tmp_path):
    """Return a checkpoint in another folder, to go back to."""
    return shutil.copytree(whole / "checkpoint-2", tmp_path / "kept" / "checkpoint-2")


def go_on(store, folder, named, steps, **changes):
    train_here(store, folder, max_steps=steps, ckpt_every=2, resume_from_checkpoint=named, **changes)


def test_the_same_command_goes_on_although_the_named_checkpoint_has_gone(whole, store, named, tmp_path):
    folder = tmp_path / "run"
    go_on(store, folder, named, 6)
    shutil.rmtree(named)
    go_on(store, folder, named, 8)
    assert_same_end(whole, folder)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        go_on(store, tmp_path / "other", named, 8)


def assert_same_end(whole, folder):
    assert losses(folder) == {step: loss for step, loss in losses(whole).items() if step > 2}
    assert open_checkpoint(folder / "checkpoint-8").step == 8


def test_the_limit_may_delete_the_named_checkpoint(whole, store, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    go_on(store, folder, folder / "checkpoint-2", 6, save_total_limit=1)
    assert checkpoints(folder) == [6]
    go_on(store, folder, folder / "checkpoint-2", 8, save_total_limit=1)
    assert checkpoints(folder) == [8]
    assert_same(whole, folder, 8)


def test_damaged_successors_are_named(store, named, tmp_path, capsys):
    folder = tmp_path / "run"
    go_on(store, folder, named, 6)
    for step in (4, 6):
        (folder / f"checkpoint-{step}" / "ema.safetensors").write_bytes(b"")
    capsys.readouterr()
    go_on(store, folder, named, 8)
    told = capsys.readouterr().out
    assert told.count("skipped a checkpoint") == 2
    assert "continuing after step 2" in told
    assert "moved later checkpoints" in told


def test_another_runs_checkpoint_of_the_same_step_is_put_aside_with_its_log(whole, store, named, tmp_path):
    folder = tmp_path / "run"
    train_here(store, folder, max_steps=2, global_seed=1)
    other = losses(folder)
    go_on(store, folder, named, 4)
    assert open_checkpoint(folder / "previous-1" / "checkpoint-2").step == 2
    assert losses(folder / "previous-1") == other
    assert checkpoints(folder) == [4]


def test_a_folder_is_the_same_by_whatever_path(whole, store, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    go_on(store, folder.relative_to(tmp_path), folder / "checkpoint-6", 8)
    assert checkpoints(folder) == [2, 4, 6, 8]
    assert_same(whole, folder, 8)
