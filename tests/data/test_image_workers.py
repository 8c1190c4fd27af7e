"""Images decoded ahead by real processes: the order, errors as values, and whatever may kill either side."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paddle_dit.data.image_workers import ImageReader
from paddle_dit.data.images import read_image
from paddle_dit.errors import DataError
from tests.conftest import ROOT

CONSUMER = """
import os, signal, sys
from pathlib import Path
from paddle_dit.data.image_workers import ImageReader
if __name__ == "__main__":
    {before}
    paths = sorted(Path(sys.argv[1]).glob("*.png")) * {times}
    with ImageReader(paths, {size}, num_workers=2) as reader:
        next(reader)
        print("ready", flush=True)
        {during}
        print(1 + sum(1 for _ in reader), "images", flush=True)
"""


@pytest.fixture
def paths(tmp_path):
    """Write 37 images, each of another size: not a whole number of messages."""
    found = [tmp_path / f"{number:02d}.png" for number in range(37)]
    for number, path in enumerate(found):
        pixels = np.random.default_rng(number).integers(0, 256, (16 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return found


def children(parent=None):
    """Return the ids of the processes that a process started."""
    parent, found = parent or os.getpid(), set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, of = place.read_text().rpartition(") ")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == parent and state != "Z":
            found.add(int(place.parent.name))
    return found


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.02)


@pytest.fixture
def consume(paths, tmp_path):
    """Return a function that starts a program that reads the images, in a process group of its own."""
    started = []

    def start(before="pass", during="pass", times=1, size=16):
        script = tmp_path / "consumer.py"
        script.write_text(CONSUMER.format(before=before, during=during, times=times, size=size))
        command = [sys.executable, "-u", str(script), str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_images_come_in_the_order_of_their_paths(paths, num_workers):
    with ImageReader(iter(paths), 16, num_workers) as reader:
        images = list(reader)
    assert len(images) == len(paths)
    for image, path in zip(images, paths, strict=True):
        assert (image.dtype, image.shape) == (np.uint8, (16, 16, 3))
        np.testing.assert_array_equal(image, read_image(path, 16))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_cannot_be_read_is_an_error_among_the_images(paths, num_workers):
    paths[3].write_bytes(b"no image")
    paths[20].unlink()
    with ImageReader(map(str, paths), 16, num_workers) as reader:
        images = list(reader)
    errors = {index: str(image) for index, image in enumerate(images) if isinstance(image, DataError)}
    assert list(errors) == [3, 20]
    assert str(paths[3]) in errors[3]
    assert "No such file" in errors[20]
    np.testing.assert_array_equal(images[21], read_image(paths[21], 16))


@pytest.mark.parametrize(("num_workers", "ahead", "taken"), [(0, None, 1), (1, None, 24), (2, None, 40), (2, 50, 64)])
def test_reading_ahead_is_bounded(paths, num_workers, ahead, taken):
    count = 0

    def endless():
        nonlocal count
        while True:
            count += 1
            yield paths[0]

    with ImageReader(endless(), 16, num_workers, ahead) as reader:
        next(reader)
        time.sleep(0.3)  # far longer than an unbounded reader would need to go further
        assert count == taken  # what is ahead, and the chunk of eight that is being yielded
        for _ in range(2 * taken):
            next(reader)
        assert count <= 3 * taken + 8


def test_no_process_and_nothing_to_yield_is_left_after_closing(paths):
    before = children()
    reader = ImageReader(paths, 16, num_workers=2)
    next(reader)
    assert len(children() - before) == 2
    reader.close()
    reader.close()
    assert children() == before
    assert list(reader) == []


def test_closing_does_not_wait_for_an_image(paths, tmp_path):
    os.mkfifo(tmp_path / "stuck.png")  # whoever reads it waits for ever
    with ImageReader([*paths[:8], tmp_path / "stuck.png"], 16, num_workers=1) as reader:
        next(reader)
        start = time.monotonic()
    assert time.monotonic() - start < 2


def test_a_killed_process_is_an_error_that_says_where_and_stays(paths, tmp_path):
    os.mkfifo(tmp_path / "stuck.png")
    before = children()
    with ImageReader([*paths[:8], tmp_path / "stuck.png", paths[9]], 16, num_workers=1) as reader:
        for _ in range(8):
            assert isinstance(next(reader), np.ndarray)
        (worker,) = children() - before
        os.kill(worker, signal.SIGKILL)
        for _ in range(2):  # a consumer that goes on all the same must not take it for the end
            with pytest.raises(DataError, match=r"killed by signal 9 within .*stuck\.png to .*09\.png.*fewer workers"):
                next(reader)


def test_processes_killed_in_the_middle_of_an_answer_are_an_error_too(consume):
    """A consumer that is halted takes no answers, and they are larger than a pipe: the processes wait within one."""
    process = consume(times=100_000, size=256)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    workers, spent = children(process.pid), None
    while spent != (spent := [Path(f"/proc/{worker}/stat").read_text().split()[13:15] for worker in workers]):
        time.sleep(0.3)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert errors.splitlines()[-1].startswith("paddle_dit.errors.DataError: a process that decodes images was killed")


def test_a_process_that_cannot_start_is_an_error(paths, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    with ImageReader(paths, 16, num_workers=1) as reader, pytest.raises(DataError, match="ended with exit code 1"):
        next(reader)


def test_an_image_size_that_no_vae_takes_is_refused_before_anything_starts(paths):
    before = children()
    with pytest.raises(DataError, match="image size 100 is not divisible by 8"):
        ImageReader(paths, 100, num_workers=1)
    assert children() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_of_the_whole_group_leaves_the_images_to_the_consumer(consume, number):
    process = consume(before=f"signal.signal({int(number)}, lambda *_: print('asked', flush=True))", times=40)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("asked\n1480 images\n", "")


def test_ctrl_c_ends_all_with_the_consumers_traceback_alone(consume):
    as_in_a_terminal = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job in the background ignores it
    process = consume(before=as_in_a_terminal, times=100_000)
    assert process.stdout.readline() == "ready\n"
    workers = children(process.pid)
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_processes_end_when_the_consumer_is_killed(consume):
    process = consume(during="signal.pause()")
    assert process.stdout.readline() == "ready\n"
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    assert process.communicate()[1] == ""


def test_a_consumer_that_forgets_to_close_ends_all_the_same(consume):
    process = consume(before="ImageReader.__exit__ = lambda *_: None", during="sys.exit(3)")
    assert process.stdout.readline() == "ready\n"
    workers = children(process.pid)
    assert process.wait(timeout=60) == 3
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def test_processes_have_nothing_of_paddle(consume):
    process = consume(before="import paddle", during="signal.pause()")
    assert process.stdout.readline() == "ready\n"
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in [process.pid, *children(process.pid)]}
    assert ["paddle" in text.replace(str(ROOT), "") for text in maps.values()] == [True, False, False]
    assert all("numpy" in text for text in maps.values())
