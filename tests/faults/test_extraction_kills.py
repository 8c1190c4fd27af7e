"""scripts/extract_features.py killed, stopped and short of space, on 1 to 3 processes: the end is always the same."""

import os
import random
import re
import shutil
import signal
import time

import pytest

from paddle_dit.data.verify import open_check
from paddle_dit.training.signals import STOPPED
from tests.digit_images import write_digit_images
from tests.faults.runs import errors_in, fill, run, start, wait_for

SCRIPT = "scripts/extract_features.py"
COUNT, SHARD = 400, 40
BEGUN = ".meeting.json"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write digits as PNG files, a folder for each class."""
    return write_digit_images(tmp_path_factory.mktemp("images") / "digits", COUNT, numbered=False)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Return the store that one unbroken process makes."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    code, text = run(SCRIPT, 1, *flags(images, folder), log=folder.with_name("log"))
    assert code == 0, text
    assert not list(open_check(folder).problems())
    return folder


def flags(images, folder):
    values = {"data-path": images, "features-path": folder, "image-size": 32, "vae": "data/digits_vae"}
    values |= {"shard-size": SHARD, "batch-size": 6, "num-workers": 1}
    return [text for name, value in values.items() for text in (f"--{name}", value)] + ["--flip"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(folder):
    """Return number -> when it was written, of the shards that are finished."""
    return {
        int(path.stem.split("-")[1]): path.with_name(f"latents-{path.stem.split('-')[1]}.npy").stat().st_mtime_ns
        for path in folder.glob("shard-*.json")
    }


def has_begun(folder, launch):
    return (folder / BEGUN).exists() or launch.code is not None


def go_on(images, folder, processes, log):
    """Run to the end; what was finished before is not written again, and nothing but the store is left."""
    before = finished(folder)
    mtimes = {}
    with start(SCRIPT, processes, *flags(images, folder), log=log) as launch:
        while launch.code is None:
            mtimes |= finished_so_far(folder)
            time.sleep(0.01)
        assert launch.code == 0, launch.text
    assert {number: mtimes.get(number, when) for number, when in before.items()} == before


def finished_so_far(folder):
    try:
        return finished(folder)
    except FileNotFoundError:  # the end of the extraction removes them
        return {}


@pytest.mark.distributed
def test_two_processes_killed_and_continued_by_one_end_with_the_same_bytes(images, whole, tmp_path):
    """Whatever number of threads the environment asks for: it would change the last bits."""
    folder, threads = tmp_path / "store", {"OMP_NUM_THREADS": "1" if os.environ["OMP_NUM_THREADS"] != "1" else "2"}
    with start(SCRIPT, 2, *flags(images, folder), log=tmp_path / "log", environment=threads) as launch:
        wait_for(lambda: len(list(folder.glob("shard-*.json"))) >= 2, 60, "two finished shards")
        launch.kill()
    assert 2 <= len(finished(folder)) < COUNT / SHARD
    go_on(images, folder, 1, tmp_path / "log-1")
    assert contents(folder) == contents(whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_kills_at_random_moments_cost_at_most_a_shard_for_each_process(images, whole, tmp_path, processes):
    folder, moments = tmp_path / "store", random.Random(processes)
    for attempt in range(5):
        before = finished(folder) if folder.exists() else {}
        with start(SCRIPT, processes, *flags(images, folder), log=tmp_path / f"log-{attempt}") as launch:
            wait_for(lambda launch=launch: has_begun(folder, launch), 60, "a start")
            time.sleep(moments.uniform(0, 1))
            alone = launch.pid(moments.randrange(processes)) if attempt == 3 else None
            launch.kill([alone] if alone else ())
        if (folder / "index.json").exists():
            break
        assert before.items() <= finished(folder).items()
    assert attempt >= 2
    go_on(images, folder, processes, tmp_path / "log")
    assert contents(folder) == contents(whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_others_and_another_number_of_processes_goes_on(images, whole, tmp_path):
    folder = tmp_path / "store"
    with start(SCRIPT, 2, *flags(images, folder), log=tmp_path / "log") as launch:
        wait_for(lambda: finished_so_far(folder), 60, "a finished shard")
        os.kill(launch.pid(1), signal.SIGKILL)
        assert launch.wait(60) != 0
        wait_for(lambda: not launch.pids(), 30, "the end of all processes")
    go_on(images, folder, 3, tmp_path / "log-3")
    assert contents(folder) == contents(whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_broken_image_of_any_rank_ends_all_in_one_line_or_is_skipped(images, tmp_path):
    root = tmp_path / "damaged" / "digits"
    shutil.copytree(images, root)
    broken = sorted(root.rglob("*.png"))[SHARD + 7]  # in the share of rank 1
    broken.write_text("no picture")
    code, text = run(SCRIPT, 2, *flags(root, tmp_path / "several"), log=tmp_path / "log")
    assert code == 2, text
    told = {re.sub("rank 1: ", "", line) for line in errors_in(text)}
    assert len(told) == 1, text
    assert f"cannot read the image {broken}: it is no image" in told.pop()
    for name, processes in (("several", 2), ("one", 1)):
        code, text = run(SCRIPT, processes, *flags(root, tmp_path / name), "--on-error", "skip", log=tmp_path / "log")
        assert code == 0, text
        assert f"skipped 1 images that cannot be read: {broken.relative_to(root)}" in text
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


@pytest.mark.slow
def test_ranks_may_be_started_by_hand_in_any_order(images, whole, tmp_path):
    folder = tmp_path / "store"
    ranks = [{"PADDLE_TRAINER_ID": str(rank), "PADDLE_TRAINERS_NUM": "2"} for rank in range(2)]
    with start(SCRIPT, 1, *flags(images, folder), log=tmp_path / "log-1", environment=ranks[1]) as other:
        time.sleep(5)
        code, text = run(SCRIPT, 1, *flags(images, folder), log=tmp_path / "log-0", environment=ranks[0])
        assert code == 0, text
        assert other.wait(30) == 0, other.text
    assert contents(folder) == contents(whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "whom"), [(1, 0), (2, 0), (2, 1), (2, "launcher")])
def test_a_signal_stops_between_batches_and_leaves_nothing_half_written(images, whole, tmp_path, processes, whom):
    folder = tmp_path / "store"
    with start(SCRIPT, processes, *flags(images, folder), log=tmp_path / "log") as launch:
        # Before its first shard a process may not have begun to listen for signals.
        wait_for(
            lambda: len({number % processes for number in finished_so_far(folder)}) == processes,
            60,
            "a finished shard of each process",
        )
        pid = launch.pid(None if whom == "launcher" or processes == 1 else whom)
        os.kill(pid, signal.SIGTERM)
        assert launch.wait(60) == (15 if whom == "launcher" else STOPPED), launch.text
        assert "stopped; finished shards are kept, the same command continues" in launch.text
        wait_for(lambda: not launch.pids(), 30, "the end of all processes")
        assert not errors_in(launch.text)
    shards = finished(folder)
    assert 0 < len(shards) < COUNT / SHARD
    left = {name for name in contents(folder) if not re.fullmatch(r"(shard|latents(_flip)?)-\d+\.(json|npy)", name)}
    assert left == {"plan.json"}
    assert len(list(folder.glob("*.npy"))) == 2 * len(shards)
    if processes > 1:  # a test of stops within a process goes on too
        go_on(images, folder, 1, tmp_path / "log-1")
        assert contents(folder) == contents(whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_fills_is_one_line_and_the_same_command_goes_on(images, whole, small_disk, tmp_path, processes):
    folder = small_disk(4) / "store"
    with start(SCRIPT, processes, *flags(images, folder), log=tmp_path / "log") as launch:
        wait_for(lambda: finished_so_far(folder), 60, "a finished shard")
        with pytest.raises(OSError, match="No space left"):
            fill(folder.parent / "another's")
        assert launch.wait(60) == 2, launch.text
        told = {re.sub("rank 1: ", "", line) for line in errors_in(launch.text)}
        assert all(re.match("error: cannot write .*: No space left on device; free some space", line) for line in told)
        assert "Traceback" not in launch.text
    kept = finished(folder)
    assert kept
    assert not list(folder.glob("*.partial"))
    (folder.parent / "another's").unlink()
    go_on(images, folder, processes, tmp_path / "next")
    assert contents(folder) == contents(whole)


@pytest.mark.slow
def test_a_disk_without_enough_space_is_noticed_before_anything_is_written(images, small_disk, tmp_path):
    folder = small_disk(1) / "deep" / "store"
    with pytest.raises(OSError, match="No space left"):
        fill(folder.parents[1] / "another's")
    code, text = run(SCRIPT, 1, *flags(images, folder), log=tmp_path / "log")
    assert code == 2
    assert re.search(r"error: .*store will take \d MiB more, and 0 MiB are free there; free some space", text), text
    assert not folder.parent.exists()
