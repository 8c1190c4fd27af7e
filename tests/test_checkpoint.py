import dataclasses
import os

import numpy as np
import pytest

from paddle_dit.checkpoint import (
    checkpoint_folders,
    find_checkpoint,
    load_weights,
    newest_checkpoint,
    open_checkpoint,
    remove_leftovers,
    remove_old,
    save_checkpoint,
)
from paddle_dit.config import ModelInfo
from paddle_dit.errors import CheckpointError

FILES = ["config.json", "ema.safetensors", "manifest.json", "model.safetensors", "state.json"]


@pytest.fixture
def save(tmp_path, tiny_config):
    """Return a function that saves a small checkpoint at a step of the run in ``tmp_path``."""

    def save(step: int):
        tensors = {"model": {"a.weight": np.full((2, 3), step, np.float32)}, "ema": {"a.weight": np.zeros((2, 3))}}
        return save_checkpoint(tmp_path, step, ModelInfo(tiny_config, {0: "zero"}), tensors, {"step": step})

    return save


def test_a_checkpoint_comes_back_whole(save, tmp_path, tiny_config):
    save(7)
    found = open_checkpoint(tmp_path / "checkpoint-7")
    assert found.step == 7
    assert found.state == {"step": 7}
    assert found.info == ModelInfo(tiny_config, {0: "zero"})
    assert (found.tensors("model")["a.weight"] == 7).all()
    assert sorted(path.name for path in found.folder.iterdir()) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_the_newest_is_by_number(save, tmp_path):
    for step in (9, 10, 2):
        save(step)
    assert newest_checkpoint(tmp_path).step == 10
    assert find_checkpoint(tmp_path).step == 10
    assert find_checkpoint(tmp_path / "checkpoint-2").step == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "empty"])
def test_damage_is_found_and_the_one_before_is_taken(save, tmp_path, name, damage):
    save(1)
    path = save(2).folder / name
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncate": content[:-1], "flip": flipped, "empty": b""}[damage])
    told = []
    if name == "manifest.json" and damage in ("truncate", "flip"):
        # The manifest is JSON text: losing its last line break changes nothing, and a flipped bit may hit white space.
        path.write_bytes(content[: len(content) // 2])
    assert newest_checkpoint(tmp_path, report=told.append).step == 1
    assert len(told) == 1
    assert "checkpoint-2" in told[0]


def test_if_all_are_damaged_nothing_is_started_anew(save, tmp_path):
    (save(3).folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        newest_checkpoint(tmp_path, report=lambda line: None)


def test_a_folder_without_checkpoints_has_none(tmp_path):
    (tmp_path / "checkpoint-x").mkdir()
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such"):
        find_checkpoint(tmp_path / "absent")


def test_a_manifest_cannot_point_outside(save, tmp_path):
    manifest = save(1).folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("state.json", "../state.json"))
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(manifest.parent)


def test_leftovers_are_removed_and_nothing_else(save, tmp_path):
    save(1)
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    (tmp_path / ".checkpoint-notes").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checkpoint-notes", "checkpoint-1"]


def test_a_damaged_checkpoint_in_the_way_is_replaced(save, tmp_path):
    (save(1).folder / "model.safetensors").write_bytes(b"")
    save(1)
    assert newest_checkpoint(tmp_path).step == 1


def test_weights_of_another_model_are_refused(tiny_config):
    from paddle_dit.models.dit import DiT

    model = DiT(tiny_config)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    load_weights(model, tensors, "here")
    other = DiT(dataclasses.replace(tiny_config, depth=3))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.2"):
        load_weights(other, tensors, "here")
    wider = DiT(dataclasses.replace(tiny_config, num_classes=11))
    with pytest.raises(CheckpointError, match="of another shape: y_embedder"):
        load_weights(wider, tensors, "here")


def test_a_save_that_fails_is_told_and_leaves_nothing(save, tmp_path):
    """A real limit on the size of files, as a full disk would be."""
    import resource
    import signal

    save(1)
    former, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, former[1]))
    try:
        with pytest.raises(CheckpointError, match="earlier checkpoints are whole"):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path).step == 1


def test_only_the_newest_are_kept(save, tmp_path):
    for step in (9, 10, 2, 100):
        newest = save(step)
    (tmp_path / "checkpoint-x").mkdir()
    remove_old(newest, 4)
    assert [path.name for path in checkpoint_folders(tmp_path)] == [f"checkpoint-{step}" for step in (100, 10, 9, 2)]
    remove_old(newest, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-x"]
    assert newest_checkpoint(tmp_path).step == 100


def test_one_that_cannot_be_deleted_is_told_and_the_others_go(save, tmp_path, monkeypatch):
    newest = [save(step) for step in (1, 2, 3)][-1]
    rename = os.rename

    def also_deleted_by_another(source, target):
        if source.name == "checkpoint-1":
            raise FileNotFoundError(2, "No such file or directory", str(source))
        rename(source, target)

    monkeypatch.setattr("paddle_dit.checkpoint.os.rename", also_deleted_by_another)
    told = []
    remove_old(newest, 1, report=told.append)
    assert told == [f"cannot delete {tmp_path / 'checkpoint-1'}: No such file or directory"]
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-3", "checkpoint-1"]


def test_what_is_replaced_goes_last(save, tmp_path, monkeypatch):
    before = save(2).folder.joinpath("manifest.json").read_bytes()
    rename = os.rename

    def killed_before_the_second(source, target):
        if target.name == "checkpoint-2":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("paddle_dit.checkpoint.os.rename", killed_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        save(2)
    assert (tmp_path / "checkpoint-2.replaced" / "manifest.json").read_bytes() == before
    monkeypatch.undo()
    save(2)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["checkpoint-2"]


def test_a_checkpoint_that_is_being_deleted_is_a_leftover_and_no_checkpoint(save, tmp_path, monkeypatch):
    from paddle_dit import checkpoint

    for step in (1, 2):
        save(step)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *arguments, **options: None)  # as if killed just then
    checkpoint.remove_old(open_checkpoint(tmp_path / "checkpoint-2"), 1)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checkpoint-1.tmp", "checkpoint-2"]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
