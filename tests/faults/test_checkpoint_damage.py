"""Every byte-level damage to a real run's checkpoint is found, named in one line, and costs only that checkpoint."""

import json
import shutil

import pytest

from paddle_dit.checkpoint import checkpoint_folders, newest_checkpoint, open_checkpoint, save_checkpoint
from paddle_dit.config import DiTConfig
from paddle_dit.data.store import StoreWriter
from paddle_dit.errors import CheckpointError
from paddle_dit.training.loop import train
from paddle_dit.training.plan import make_plan
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.session import start_session

FILES = ["config.json", "state.json", "manifest.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"]


def train_here(store, folder, **changes):
    """Train in this process, six small steps with a checkpoint after the third and the last."""
    options = {"model": "DiT-Digits/2", "global_batch_size": 16, "log_every": 1, "image_logging_steps": -1}
    options |= {"feature_path": store, "output_dir": folder, "num_workers": 0, "max_steps": 6, "ckpt_every": 3}
    start_session(make_plan(TrainRecipe(**(options | {"visualdl": False} | changes)))).run(train)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """Return the folder of a run, which every test leaves as it was."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_here(store, folder)
    return folder


@pytest.fixture
def run_folder(trained, tmp_path):
    """Return a copy of that run for a test to spoil."""
    return shutil.copytree(trained, tmp_path / "run")


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


CONTENTS = {
    "one byte short": lambda content: content[:-1],
    "cut in half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "first byte flipped": lambda content: flip(content, 0),
    "middle byte flipped": lambda content: flip(content, len(content) // 2),
    "last byte flipped": lambda content: flip(content, len(content) - 1),
    "one byte more": lambda content: content + b"x",
    "zeros": lambda content: bytes(len(content)),
}
PLACES = {
    "deleted": lambda path: path.unlink(),
    "a folder": as_folder,
    "a dangling link": as_dangling_link,
    "of the older checkpoint": lambda path: shutil.copy(path.parents[1] / "checkpoint-3" / path.name, path),
}
# These change nothing: a manifest is JSON with a line break at its end, and all checkpoints of a run are of one model.
HARMLESS = {("manifest.json", "one byte short"), ("config.json", "of the older checkpoint")}


def spoil(path, damage):
    if damage in CONTENTS:
        path.write_bytes(CONTENTS[damage](path.read_bytes()))
    else:
        PLACES[damage](path)


def test_every_kind_of_file_of_a_checkpoint_is_damaged_here(trained):
    assert sorted(path.name for path in (trained / "checkpoint-6").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", [*CONTENTS, *PLACES])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_in_one_line_and_the_older_checkpoint_is_taken(run_folder, name, damage):
    spoiled = run_folder / "checkpoint-6"
    spoil(spoiled / name, damage)
    told = []
    found = newest_checkpoint(run_folder, told.append)
    if (name, damage) in HARMLESS:
        assert (found.step, told) == (6, [])
        return
    assert found.step == 3
    assert len(told) == 1
    assert "\n" not in told[0]
    assert told[0].startswith(f"skipped a checkpoint: {spoiled} is ")
    with pytest.raises(CheckpointError, match="delete the folder or restore it from a copy") as refused:
        open_checkpoint(spoiled)
    if damage != "of the older checkpoint" or name != "manifest.json":  # which then names the wrong step
        assert name in str(refused.value) or name == "manifest.json"
    open_checkpoint(run_folder / "checkpoint-3")


def test_the_damages_are_counted():
    assert len(FILES) * (len(CONTENTS) + len(PLACES)) - len(HARMLESS) == 70


@pytest.mark.parametrize("place", range(0, 100, 7))
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(run_folder, name, place):
    path = run_folder / "checkpoint-6" / name
    content = path.read_bytes()
    where = len(content) * place // 100
    path.write_bytes(content[:where] + bytes([content[where] ^ (1 << place % 8)]) + content[where + 1 :])
    assert newest_checkpoint(run_folder, lambda line: None).step == 3


def test_checkpoints_that_changed_their_names_are_both_found(run_folder):
    (run_folder / "checkpoint-3").rename(run_folder / "aside")
    (run_folder / "checkpoint-6").rename(run_folder / "checkpoint-3")
    (run_folder / "aside").rename(run_folder / "checkpoint-6")
    told = []
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        newest_checkpoint(run_folder, told.append)
    assert [line.count("manifest.json is of step") for line in told] == [1, 1]


@pytest.mark.parametrize("kind", ["a dangling link", "a file", "an empty folder"])
def test_what_only_has_a_checkpoints_name_is_named_and_passed_over(run_folder, kind):
    path, told = run_folder / "checkpoint-9", []
    if kind == "an empty folder":
        path.mkdir()
    elif kind == "a file":
        path.write_text("no folder")
    else:
        path.symlink_to("nowhere")
    assert newest_checkpoint(run_folder, told.append).step == 6
    assert len(told) == 1
    assert "checkpoint-9 is no checkpoint" in told[0]


@pytest.mark.parametrize("kind", ["a dangling link", "a file"])
def test_a_run_whose_only_checkpoint_has_gone_elsewhere_does_not_start_from_zero(store, tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "checkpoint-6"
    path.symlink_to("nowhere") if kind == "a dangling link" else path.write_text("no folder")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        train_here(store, folder)


@pytest.mark.parametrize("kind", ["a link", "a dangling link", "a file"])
def test_what_is_in_a_checkpoints_way_is_put_aside(run_folder, store, kind):
    """It has been passed over, and the run comes to its step again."""
    newest = run_folder / "checkpoint-6"
    newest.rename(run_folder / "elsewhere")
    if kind == "a file":
        newest.write_text("no folder")
    else:
        newest.symlink_to("elsewhere" if kind == "a link" else "nowhere")
        (run_folder / "elsewhere" / "manifest.json").unlink()
    train_here(store, run_folder)
    assert open_checkpoint(newest).step == 6
    assert not newest.is_symlink()
    assert (run_folder / "elsewhere" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["a link", "a dangling link", "a file", "a folder"])
def test_a_save_replaces_what_is_there_under_its_names(trained, tmp_path, kind):
    whole = open_checkpoint(trained / "checkpoint-6")
    tensors = {kind: whole.tensors(kind) for kind in ("model", "ema", "optimizer")}
    for name in ("checkpoint-6", ".checkpoint-6.tmp"):
        (tmp_path / f"{name}-elsewhere").mkdir()
        path = tmp_path / name
        if kind == "a file":
            path.write_text("no folder")
        elif kind == "a folder":
            (path / "more").mkdir(parents=True)
        else:
            path.symlink_to(f"{name}-elsewhere" if kind == "a link" else "nowhere")
    save_checkpoint(tmp_path, 6, whole.info, tensors, whole.state)
    assert open_checkpoint(tmp_path / "checkpoint-6").state == whole.state
    assert sorted(path.name for path in (tmp_path / "checkpoint-6").iterdir()) == sorted(FILES)
    assert not (tmp_path / "checkpoint-6").is_symlink()
    assert not (tmp_path / ".checkpoint-6.tmp").exists()
    assert (tmp_path / "checkpoint-6-elsewhere").is_dir()


def test_old_links_are_deleted_without_what_they_point_to(run_folder, store):
    oldest = run_folder / "checkpoint-3"
    oldest.rename(run_folder / "elsewhere")
    oldest.symlink_to("elsewhere")
    train_here(store, run_folder, max_steps=7, save_total_limit=2)
    assert [path.name for path in checkpoint_folders(run_folder)] == ["checkpoint-7", "checkpoint-6"]
    assert not [path for path in run_folder.iterdir() if path.name.startswith(".checkpoint-")]
    assert (run_folder / "elsewhere" / "model.safetensors").exists()


def test_a_checkpoint_of_another_model_among_good_ones_is_passed_over_with_one_line(
    run_folder, store, tmp_path, capsys
):
    config = DiTConfig(sample_size=8, patch_size=2, hidden_size=48, depth=1, num_heads=4, num_classes=10)
    (tmp_path / "model.json").write_text(json.dumps(config.to_dict()))
    train_here(store, tmp_path / "other", model=str(tmp_path / "model.json"), max_steps=1, ckpt_every=1)
    shutil.copytree(tmp_path / "other" / "checkpoint-1", run_folder / "checkpoint-8")
    manifest = run_folder / "checkpoint-8" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 8'))
    capsys.readouterr()
    train_here(store, run_folder, max_steps=7)
    out = capsys.readouterr().out
    skipped = [line for line in out.splitlines() if line.startswith("skipped a checkpoint")]
    assert len(skipped) == 1
    assert "checkpoint-8 is of another model: " in skipped[0]
    assert "continuing after step 6" in out
    assert open_checkpoint(run_folder / "checkpoint-7").step == 7


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def test_when_all_are_bad_the_run_is_refused_and_nothing_is_written(run_folder, store):
    for step in (3, 6):
        spoil(run_folder / f"checkpoint-{step}" / "ema.safetensors", "middle byte flipped")
    before = snapshot(run_folder)
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* start anew with --no-resume"):
        train_here(store, run_folder)
    assert snapshot(run_folder) == before


def test_bad_checkpoints_are_put_aside_when_asked_for(run_folder, store):
    for step in (3, 6):
        spoil(run_folder / f"checkpoint-{step}" / "ema.safetensors", "middle byte flipped")
    before = snapshot(run_folder)
    train_here(store, run_folder, resume=False)
    assert newest_checkpoint(run_folder).step == 6
    aside = snapshot(run_folder / "previous-1")
    assert aside == before


def other_store(folder):
    import numpy as np

    with StoreWriter(folder, sample_shape=(4, 8, 8), dtype="float32", num_classes=10) as store:
        store.append(np.ones((64, 4, 8, 8), np.float32), np.arange(64) % 10)
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data", "data was"),
        ({"global_seed": 5}, "global_seed was 0, now 5"),
        ({"global_batch_size": 32}, "global_batch_size was 16, now 32"),
    ],
    ids=["data", "seed", "batch"],
)
def test_what_changes_the_experiment_is_refused_and_admitted_when_asked_for(run_folder, store, tmp_path, change, told):
    data, changes = (other_store(tmp_path / "other"), {}) if change == "data" else (store, change)
    before = snapshot(run_folder)
    with pytest.raises(CheckpointError, match=f"is of another experiment: {told}"):
        train_here(data, run_folder, max_steps=7, **changes)
    assert snapshot(run_folder) == before
    train_here(data, run_folder, max_steps=7, allow_changes=True, **changes)
    assert open_checkpoint(run_folder / "checkpoint-7").step == 7
