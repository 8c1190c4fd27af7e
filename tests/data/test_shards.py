"""Writing a store shard by shard: any order, any process, any interruption give the same bytes, or one clear line."""

import itertools
import json
import multiprocessing
import os
import resource

import numpy as np
import pytest

from paddle_dit.data import shards
from paddle_dit.data.shards import StorePlan, begin, finish, finished_shards, write_shard
from paddle_dit.data.source import open_source
from paddle_dit.data.store import PackedStore, StoreWriter
from paddle_dit.data.store_index import new_index
from paddle_dit.data.verify import StoreCheck
from paddle_dit.errors import DataError

SHAPE, COUNT, SIZE = (4, 2, 3), 23, 8
SAMPLES = np.random.default_rng(0).standard_normal((2, COUNT, *SHAPE)).astype(np.float32)
LABELS = np.arange(COUNT) % 5


def make_plan(flip=False, num_samples=COUNT, shard_size=SIZE, job=None, **index):
    index = {"sample_shape": SHAPE, "num_classes": 5, "source": "tests", "flip": flip, **index}
    return StorePlan(new_index(**index), num_samples, shard_size, job or {"seed": 1})


def write(folder, plan, number, skip=()):
    """Write a shard, without the samples of these numbers."""
    kept = [sample for sample in plan.span(number) if sample not in skip]
    names = [f"image {sample}" for sample in plan.span(number) if sample in skip]
    mirrored = SAMPLES[1][kept] if plan.index["has_flip"] else None
    write_shard(folder, plan, number, SAMPLES[0][kept], LABELS[kept], mirrored, names)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unbroken(folder, flip=False, **options):
    options = {"sample_shape": SHAPE, "num_classes": 5, "source": "tests", "shard_size": SIZE, **options}
    with StoreWriter(folder, flip=flip, **options) as writer:
        writer.append(SAMPLES[0], LABELS, SAMPLES[1] if flip else None)
    return contents(folder)


@pytest.mark.parametrize("flip", [False, True])
def test_shards_in_any_order_give_the_bytes_of_one_writer(tmp_path, flip):
    expected = unbroken(tmp_path / "whole", flip)
    for place, order in enumerate(itertools.permutations(range(3))):
        folder, plan = tmp_path / str(place), make_plan(flip)
        assert begin(folder, plan) is False
        for done, number in enumerate(order):
            assert finished_shards(folder, plan) == set(order[:done])
            write(folder, plan, number)
        finish(folder, plan)
        assert contents(folder) == expected


def write_all(folder, plan, numbers):
    for number in numbers:
        write(folder, plan, number)


@pytest.mark.parametrize("shares", [[[0], [1], [2]], [[0, 1, 2], [2, 1, 0], [0, 1, 2]]])
def test_several_processes_at_once_give_the_bytes_of_one_writer(tmp_path, shares):
    """Each has shards of its own, or, though no command asks for that, all write the same ones."""
    plan, folder, fork = make_plan(flip=True), tmp_path / "several", multiprocessing.get_context("fork")
    begin(folder, plan)
    processes = [fork.Process(target=write_all, args=(folder, plan, numbers)) for numbers in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    finish(folder, plan)
    assert contents(folder) == unbroken(tmp_path / "whole", flip=True)


def test_a_shard_may_be_written_twice_at_once(tmp_path):
    """Another process's half written file has another name, and the same content wins whoever renames last."""
    plan = make_plan()
    begin(tmp_path, plan)
    other = tmp_path / f"latents-00001.npy.{os.getpid() + 1}.partial"
    other.write_bytes(b"half")
    write(tmp_path, plan, 1)
    assert other.read_bytes() == b"half"
    assert finished_shards(tmp_path, plan, hashes=True) == {1}
    begin(tmp_path, plan)  # a start with the lock: nobody else writes
    assert not other.exists()


def test_the_summary_is_of_the_stored_values_and_names_what_was_skipped(tmp_path):
    plan, skip = make_plan(), (3, 8, 9)
    begin(tmp_path, plan)
    for number in range(3):
        write(tmp_path, plan, number, skip)
    summary = finish(tmp_path, plan)
    kept = np.delete(SAMPLES[0], skip, axis=0).astype(np.float16).astype(np.float64)
    assert (summary.num_samples, summary.skipped) == (20, ("image 3", "image 8", "image 9"))
    assert PackedStore(tmp_path).index["skipped"] == ["image 3", "image 8", "image 9"]
    np.testing.assert_allclose(summary.mean, kept.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(summary.std, kept.std(axis=(0, 2, 3)), rtol=1e-12)
    store = PackedStore(tmp_path)
    np.testing.assert_array_equal(store.gather(np.arange(20))[0], kept.astype(np.float32))
    np.testing.assert_array_equal(store.labels, np.delete(LABELS, skip))
    assert not list(StoreCheck(tmp_path).problems())


def test_a_shard_whose_samples_were_all_skipped_has_no_file(tmp_path):
    plan = make_plan()
    begin(tmp_path, plan)
    for number in range(3):
        write(tmp_path, plan, number, skip=range(8, 16))
    assert finished_shards(tmp_path, plan) == {0, 1, 2}
    finish(tmp_path, plan)
    assert sorted(contents(tmp_path)) == ["index.json", "labels.npy", "latents-00000.npy", "latents-00002.npy"]
    np.testing.assert_array_equal(PackedStore(tmp_path).labels, np.delete(LABELS, range(8, 16)))


def test_a_store_of_which_everything_was_skipped_is_refused(tmp_path):
    plan = make_plan()
    begin(tmp_path, plan)
    for number in range(3):
        write(tmp_path, plan, number, skip=range(COUNT))
    with pytest.raises(
        DataError, match=r"all 23 samples were skipped; mend what .*, remove the folder, then run the same"
    ):
        finish(tmp_path, plan)


@pytest.mark.parametrize("name", ["latents-00001.npy", "latents_flip-00001.npy", "shard-00001.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "one bit"])
def test_a_shard_that_is_not_as_it_was_written_is_written_again(tmp_path, name, damage):
    plan = make_plan(flip=True)
    begin(tmp_path, plan)
    for number in range(3):
        write(tmp_path, plan, number)
    content = bytearray((tmp_path / name).read_bytes())
    (tmp_path / name).unlink()
    content[len(content) // 2] ^= 4
    if damage != "missing":
        (tmp_path / name).write_bytes(content[:-1] if damage == "cut" else content)
    assert finished_shards(tmp_path, plan, hashes=True) == {0, 2}
    if damage != "one bit":
        with pytest.raises(DataError, match="lacks 1 of 3 shards, the first is shard 1; run the command"):
            finish(tmp_path, plan)
    write(tmp_path, plan, 1)
    finish(tmp_path, plan)
    assert contents(tmp_path) == unbroken(tmp_path / "whole", flip=True)


CHANGES = {
    "dtype": ({"dtype": "float32"}, "dtype was 'float16', now 'float32'"),
    "seed": ({"job": {"seed": 2}}, "seed was 1, now 2"),
    "shard size": ({"shard_size": 4}, "shard_size was 8, now 4"),
    "number of samples": ({"num_samples": 22}, "num_samples was 23, now 22"),
    "VAE": ({"vae": {"name": "b"}}, "vae was None, now {'name': 'b'}"),
    "two": ({"shard_size": 4, "dtype": "float32"}, "shard_size was 8, now 4; dtype was"),
    "one name": ({"label_names": {0: "ant", 1: "cat"}}, "1 was 'bee', now 'cat'"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_plan_is_refused_and_what_differs_is_said(tmp_path, case):
    changes, told = CHANGES[case]
    former = make_plan(label_names={0: "ant", 1: "bee"} if case == "one name" else None)
    begin(tmp_path, former)
    write(tmp_path, former, 0)
    before = contents(tmp_path)
    with pytest.raises(DataError, match="half written with other settings") as caught:
        begin(tmp_path, make_plan(**changes))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
    assert begin(tmp_path, former) is False


def test_a_long_difference_is_cut_and_further_ones_are_counted(tmp_path):
    former = make_plan(job={f"option {number}": number * "long" for number in range(20)})
    begin(tmp_path, former)
    write(tmp_path, former, 0)
    with pytest.raises(DataError, match=r"\(option 0 was '', now None; .*\(?; .* and 16 more\); run the") as caught:
        begin(tmp_path, make_plan(job={"option 1": "long" * 100}))
    assert "option 1 was 'long', now 'longlonglonglonglon…; " in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_plan_of_which_no_shard_was_finished_may_be_replaced(tmp_path):
    begin(tmp_path, make_plan())
    (tmp_path / "latents-00002.npy").write_bytes(b"of a shard without a sidecar")
    other = make_plan(dtype="float32", num_samples=8)
    begin(tmp_path, other)
    write(tmp_path, other, 0)
    finish(tmp_path, other)
    assert sorted(contents(tmp_path)) == ["index.json", "labels.npy", "latents-00000.npy"]


def test_a_shard_of_another_run_is_named(tmp_path):
    plan, other = make_plan(), make_plan(job={"seed": 2})
    begin(tmp_path / "a", plan)
    begin(tmp_path / "b", other)
    write(tmp_path / "b", other, 1)
    for name in ("shard-00001.json", "latents-00001.npy"):
        (tmp_path / "b" / name).rename(tmp_path / "a" / name)
    for look in (finished_shards, finish):
        with pytest.raises(DataError, match=r"shard-00001.json is of another run than .*plan.json; remove it"):
            look(tmp_path / "a", plan)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plan.json", b"{", "plan.json is damaged"),
        ("plan.json", shards.index_text({"plan_version": 1}), "half written by another version of this program"),
    ],
)
def test_a_plan_that_cannot_be_read_is_one_line(tmp_path, name, content, message):
    plan = make_plan()
    begin(tmp_path, plan)
    write(tmp_path, plan, 0)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        begin(tmp_path, plan)


@pytest.mark.parametrize("name", ["latents-00000.npy", "shard-00000.json", "labels.npy"])
def test_what_is_half_written_without_a_plan_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"holds {name} but no plan.json: half written by another command or version"):
        begin(tmp_path, make_plan())


def test_a_finished_store_is_not_begun_again_and_one_half_written_is_no_store(tmp_path):
    plan = make_plan()
    begin(tmp_path, plan)
    write(tmp_path, plan, 0)
    with pytest.raises(DataError, match="half written: run the command that began it again"):
        open_source(tmp_path)
    write(tmp_path, plan, 1)
    write(tmp_path, plan, 2)
    finish(tmp_path, plan)
    with pytest.raises(DataError, match="already holds a store"):
        begin(tmp_path, plan)


def test_a_half_written_store_is_replaced_by_a_writer_only_on_request(tmp_path):
    plan = make_plan()
    begin(tmp_path / "store", plan)
    write(tmp_path / "store", plan, 2)
    with pytest.raises(DataError, match="half written: run the command that began it again"):
        unbroken(tmp_path / "store")
    assert unbroken(tmp_path / "store", overwrite=True) == unbroken(tmp_path / "new")


def test_an_end_that_was_cut_off_is_made_up_for(tmp_path):
    plan = make_plan()
    begin(tmp_path, plan)
    for number in range(3):
        write(tmp_path, plan, number)
    before = contents(tmp_path)
    finish(tmp_path, plan)
    after = contents(tmp_path)
    for kept in (["plan.json"], ["plan.json", "shard-00001.json"]):
        for name in kept:
            (tmp_path / name).write_bytes(before[name])
        assert begin(tmp_path, plan) is True
        assert contents(tmp_path) == after


def test_a_disk_that_is_full_at_any_write_costs_nothing_that_was_finished(tmp_path, monkeypatch):
    """The n-th flush finds the disk full, for every n; the same steps again give the same bytes."""
    expected, plan, flush = unbroken(tmp_path / "whole", flip=True), make_plan(flip=True), os.fsync

    def attempt(folder, fails_at):
        calls = itertools.count()

        def fsync(handle):
            if next(calls) == fails_at:
                raise OSError(28, "No space left on device")
            flush(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        if not begin(folder, plan):
            for number in sorted({0, 1, 2} - finished_shards(folder, plan, hashes=True)):
                write(folder, plan, number)
            finish(folder, plan)

    for fails_at in range(13):  # the plan, three shards of two files and a sidecar, labels, index, the folder itself
        folder = tmp_path / str(fails_at)
        with pytest.raises((DataError, OSError), match="No space left on device"):
            attempt(folder, fails_at)
        assert not [name for name in contents(folder) if name.endswith(".partial")]
        assert len(finished_shards(folder, plan)) == min(3, max(0, fails_at - 1) // 3)
        attempt(folder, -1)
        assert contents(folder) == expected
    attempt(tmp_path / "13", 13)
    assert contents(tmp_path / "13") == expected


def test_files_have_the_bytes_that_numpy_gives_them(tmp_path):
    unbroken(tmp_path, shard_size=COUNT)
    np.save(tmp_path / "samples", SAMPLES[0].astype(np.float16))
    np.save(tmp_path / "classes", LABELS)
    assert (tmp_path / "latents-00000.npy").read_bytes() == (tmp_path / "samples.npy").read_bytes()
    assert (tmp_path / "labels.npy").read_bytes() == (tmp_path / "classes.npy").read_bytes()


@pytest.mark.parametrize("limit", [64, 129, 400, 505])
def test_a_disk_that_takes_only_a_part_of_a_file_is_noticed(tmp_path, limit):
    """Also at its last bytes, which ``np.save`` would lose without a word."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
        with pytest.raises(DataError, match=r"cannot write .*latents-00000.npy: File too large; free some space"):
            unbroken(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert not list(tmp_path.iterdir())


def test_a_shard_must_be_whole_and_good(tmp_path):
    plan = make_plan()
    begin(tmp_path, plan)
    with pytest.raises(ValueError, match="shard 0 takes 8 samples, got 7 and 0 skipped"):
        write_shard(tmp_path, plan, 0, SAMPLES[0][:7], LABELS[:7])
    bad = SAMPLES[0][8:16].copy()
    bad[3, 0, 0, 0] = 70_000
    with pytest.raises(DataError, match="sample 11 is not finite in float16"):
        write_shard(tmp_path, plan, 1, bad, LABELS[8:16])
    with pytest.raises(DataError, match=r"sample 9 has label 5, outside \[0, 5\)"):
        write_shard(tmp_path, plan, 1, SAMPLES[0][8:16], np.where(np.arange(8) == 1, 5, 0))
    assert finished_shards(tmp_path, plan) == set()
    with pytest.raises(DataError, match="shard size must be 1 or more"):
        make_plan(shard_size=0)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/store: Not a directory; choose another folder"):
        begin(tmp_path / "file" / "store", make_plan())


def test_a_plan_is_plain_json(tmp_path):
    begin(tmp_path, make_plan())
    assert json.loads((tmp_path / "plan.json").read_text())["job"] == {"seed": 1}
