"""Verification: all that is bad is named, what is well is left alone, and every byte is read once."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from paddle_dit.data import verify
from paddle_dit.data.store import StoreWriter
from paddle_dit.data.store_index import read_index
from paddle_dit.data.verify import PairsCheck, open_check
from paddle_dit.errors import DataError
from paddle_dit.files import describe

from .test_npy_pairs import write_pairs
from .test_store import edit_index, write_store


def problems_of(path, **options):
    return list(open_check(path, **options).problems())


def rewrite(folder, name, array):
    """Replace one of the first three shards or the labels, and have the index vouch for the new file."""
    np.save(folder / name, array)
    index = read_index(folder)
    entry = describe(folder / name)
    shards = [{**shard, **(entry if shard["file"] == name else {})} for shard in index["shards"]]
    labels = {**index["labels"], **(entry if name == "labels.npy" else {})}
    edit_index(folder, shards=shards, labels=labels)


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"dtype": "float32"}, {"kind": "moments"}])
def test_a_whole_store_has_no_problems_and_its_labels_are_counted(tmp_path, options):
    _, labels = write_store(tmp_path, label_names={3: "Bär"}, vae={"scaling_factor": 0.18215}, **options)
    done = []
    check = open_check(tmp_path, num_classes=5)
    assert not list(check.problems(done.append))
    assert sum(done) == check.total == sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    counts = np.unique(labels, return_counts=True)[1]
    assert f"{len(counts)} of 5 classes occur, {min(counts)} to {max(counts)} samples each" in check.summary()
    assert f"packed store of 23 {options.get('kind', 'latents')}" in check.summary()
    assert ("mirrored" in check.summary()) == ("flip" in options)


def test_all_that_is_bad_in_a_store_is_named_at_once(tmp_path):
    write_store(tmp_path, flip=True)
    (tmp_path / "latents-00000.npy").unlink()
    with (tmp_path / "latents-00001.npy").open("ab") as file:
        file.write(b"\0")
    np.load(tmp_path / "latents_flip-00001.npy", mmap_mode="r+")[[2, 3], 1, 1, 1] = np.nan
    labels = np.load(tmp_path / "labels.npy", mmap_mode="r+")
    labels[:7], labels[20] = 5, -1
    labels.flush()
    edit_index(tmp_path, source="elsewhere")
    done = []
    check = open_check(tmp_path)
    told = [problem.removeprefix(f"{tmp_path}/") for problem in check.problems(done.append)]
    mend = "copy or make the store again"
    assert told == [
        f"index.json is not as it was written (its own sha256 differs): damaged, or edited by hand; {mend}",
        f"latents-00000.npy is missing; {mend}",
        f"latents-00001.npy has 513 bytes, index.json says 512; {mend}",
        f"latents_flip-00001.npy has changed: its sha256 is not that in index.json; {mend}",
        "latents_flip-00001.npy holds NaN or infinity in 2 samples: 10, 11; extract the features again",
        f"labels.npy has changed: its sha256 is not that in index.json; {mend}",
        "labels.npy has labels outside [0, 5) for 8 samples: 0, 1, 2, 3, 4, ...; mend the labels",
    ]
    assert sum(done) == check.total


def test_faults_that_the_sums_vouch_for_are_found(tmp_path):
    write_store(tmp_path)
    shard, labels = np.load(tmp_path / "latents-00002.npy"), np.load(tmp_path / "labels.npy")
    shard[4, 1, 0, 2], labels[6] = -np.inf, 5
    rewrite(tmp_path, "latents-00002.npy", shard)
    rewrite(tmp_path, "labels.npy", labels)
    told = "\n".join(problems_of(tmp_path))
    assert "sha256 is not" not in told
    assert "latents-00002.npy holds NaN or infinity in sample 20;" in told
    assert "labels.npy has labels outside [0, 5) for sample 6;" in told


def test_a_shard_that_the_index_does_not_name_is_named(tmp_path):
    write_store(tmp_path)
    (tmp_path / "latents-00003.npy").write_bytes((tmp_path / "latents-00001.npy").read_bytes())
    (tmp_path / "preview.png").write_bytes(b"mine")
    told = problems_of(tmp_path)
    assert len(told) == 1
    assert "latents-00003.npy is not named in index.json, so nothing reads it: of another run, or left over" in told[0]


def test_a_store_half_written_is_no_damaged_one(tmp_path):
    write_store(tmp_path)
    (tmp_path / "index.json").rename(tmp_path / "plan.json")
    with pytest.raises(
        DataError, match="holds a store half written: run the command that began it again, which continu"
    ):
        open_check(tmp_path)


def test_labels_that_are_no_classes_are_not_counted(tmp_path):
    write_store(tmp_path)
    rewrite(tmp_path, "labels.npy", np.where(np.arange(23) < 20, 3, 1 << 40))
    check = open_check(tmp_path)
    assert any("for 3 samples: 20, 21, 22;" in problem for problem in check.problems())
    assert "1 of 5 classes occur, 20 samples each" in check.summary()


@pytest.mark.parametrize("array", [np.zeros((8, 4, 3, 2), "f2"), np.zeros((8, 4, 2, 3), "f4")])
def test_a_shard_of_another_shape_or_dtype_is_named(tmp_path, array):
    write_store(tmp_path)
    rewrite(tmp_path, "latents-00001.npy", array)
    assert any("latents-00001.npy is float" in problem for problem in problems_of(tmp_path))


def test_shards_of_many_blocks_are_read_once_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_BLOCK", 1 << 16)
    with StoreWriter(tmp_path, sample_shape=(4, 8, 8), num_classes=5, shard_size=5000) as writer:
        for _ in range(10):
            writer.append(np.ones((1000, 4, 8, 8), np.float16), np.zeros(1000, np.int64))
    shard = np.load(tmp_path / "latents-00001.npy", mmap_mode="r+")
    shard[[127, 128, 300, 301, 302, 4998, 4999], 0, 0, 0] = np.nan
    shard.flush()
    check = open_check(tmp_path)
    tracemalloc.start()
    told = list(check.problems())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(told) == 2
    assert "in 7 samples: 5127, 5128, 5300, 5301, 5302, ...;" in told[1]
    assert peak < 1 << 20 < check.total / 4


def test_a_file_cut_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_BLOCK", 1 << 14)
    with StoreWriter(tmp_path, sample_shape=(4, 8, 8), num_classes=5) as writer:
        writer.append(np.ones((2000, 4, 8, 8), np.float16), np.zeros(2000, np.int64))
    path, done = tmp_path / "latents-00000.npy", []

    def cut(amount):
        if not done:
            with path.open("r+b") as file:
                file.truncate(500_000)
        done.append(amount)

    check = open_check(tmp_path)
    told = list(check.problems(cut))
    assert len(told) == 1
    assert f"{path} became shorter while it was read" in told[0]
    assert sum(done) == check.total


def test_a_folder_that_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        open_check(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found nothing"):
        open_check(tmp_path)
    write_store(tmp_path)
    assert [
        f"{tmp_path / 'index.json'} says 5 classes, --num-classes 6;" in line
        for line in problems_of(tmp_path, num_classes=6)
    ] == [True]
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=r"expected index\.json .*make the store again"):
        open_check(tmp_path)


def test_whole_pairs_have_no_problems_and_their_labels_are_counted(tmp_path):
    write_pairs(tmp_path)
    done = []
    check = open_check(tmp_path, num_classes=5)
    assert not list(check.problems(done.append))
    assert sum(done) == check.total == 12
    assert check.summary() == "12 npy pairs, float32 [4, 2, 2]; 5 of 5 classes occur, 2 to 3 samples each"


def test_all_that_is_bad_in_pairs_is_named_at_once(tmp_path):
    features, labels = write_pairs(tmp_path, stems=[*range(11), "eleven"])
    (features / "0.npy").write_bytes((features / "0.npy").read_bytes()[:-1])
    np.save(features / "1.npy", np.full((1, 4, 2, 2), np.nan, np.float32))
    np.save(features / "2.npy", np.zeros((1, 4, 2, 2), np.float16))
    np.save(features / "3.npy", np.zeros((1, 4, 2, 3), np.float32))
    np.save(labels / "3.npy", np.array([7]))
    np.save(labels / "4.npy", np.array([None]), allow_pickle=True)
    (features / "5.npy").unlink()
    (labels / "10.npy").unlink()
    (labels / "note.txt").write_text("mine")
    told = [problem.removeprefix(f"{tmp_path}/imagenet256_") for problem in problems_of(tmp_path, num_classes=5)]
    beginnings = [
        "labels/note.txt is not a .npy file; move it out",
        "labels/5.npy has no partner: imagenet256_features lacks it; add",
        "features/10.npy has no partner: imagenet256_labels lacks it; add",
        "features/eleven.npy is misnamed: other files are numbers;",
        "features/0.npy is not a readable plain .npy array",
        "features/1.npy (sample 1) holds NaN or infinity; extract",
        "features/2.npy is float16, the first file float32; extract",
        "features/3.npy is float32 [1, 4, 2, 3], expected floats of [4, 2, 2] as in the first file;",
        "labels/3.npy (sample 3) says class 7 of 5;",
        "labels/4.npy is not a readable plain .npy array",
    ]
    assert len(told) == len(beginnings), told
    for problem, beginning in zip(told, beginnings, strict=True):
        assert problem.startswith(beginning)


def test_without_a_number_of_classes_only_impossible_labels_are_named(tmp_path):
    _, labels = write_pairs(tmp_path)
    np.save(labels / "3.npy", np.array([1000]))
    assert not problems_of(tmp_path)
    np.save(labels / "3.npy", np.array([-1]))
    assert len(problems_of(tmp_path)) == 1


def test_folders_without_any_pair_are_a_problem(tmp_path):
    write_pairs(tmp_path, stems=[])
    assert ["hold no pair" in problem for problem in problems_of(tmp_path)] == [True]
    assert PairsCheck(tmp_path).summary() == "0 npy pairs; no label could be read"


def test_a_disk_that_fails_is_named_and_the_other_files_are_read(tmp_path, monkeypatch):
    write_store(tmp_path)
    opened = Path.open

    def failing(path, *arguments, **options):
        if path.name == "latents-00001.npy":
            raise OSError(5, "Input/output error")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    (tmp_path / "labels.npy").unlink()
    told = problems_of(tmp_path)
    assert len(told) == 2
    assert "latents-00001.npy cannot be read (Input/output error); copy" in told[0]
    assert "labels.npy is missing" in told[1]
