"""scripts/pack_features.py killed again and again, both ways: it goes on, and the end is that of an unbroken run."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.faults.runs import errors_in, fill

SHAPE, COUNT, SHARD = (4, 8, 8), 3000, 100


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return npy pairs and, packed from them, a store."""
    folder = tmp_path_factory.mktemp("source")
    generator = np.random.default_rng(0)
    for kind in ("features", "labels"):
        (folder / "pairs" / f"imagenet256_{kind}").mkdir(parents=True)
    for number in range(COUNT):
        latent = generator.standard_normal((1, *SHAPE)).astype(np.float32)
        np.save(folder / "pairs" / "imagenet256_features" / f"{number}.npy", latent)
        np.save(folder / "pairs" / "imagenet256_labels" / f"{number}.npy", np.array([number % 10]))
    pack(folder / "pairs", folder / "store")
    return folder


def command(start, end, *flags):
    return [sys.executable, "scripts/pack_features.py", *map(str, (start, end, *flags))]


def flags_of(start):
    return ["--num-classes", 10, "--shard-size", SHARD] if start.name == "pairs" else ["--to", "npy"]


def pack(start, end):
    """Run to the end; return what it said."""
    result = subprocess.run(
        command(start, end, *flags_of(start)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def holds(process, end):
    """Say whether the process has the folder."""
    lock = end / ".lock"
    return lock.exists() and f'"pid": {process.pid},' in lock.read_text()


def start_packing(start, end):
    """Start, and return the process once it has the folder."""
    process = subprocess.Popen(
        command(start, end, *flags_of(start)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 60
    while process.poll() is None and not holds(process, end):
        assert time.monotonic() < limit
        time.sleep(0.001)
    return process


def seconds_to_write(start, end):
    """Run to the end; return how long it had the folder."""
    process = start_packing(start, end)
    began = time.monotonic()
    assert process.wait(60) == 0
    return time.monotonic() - began


def kill_after(start, end, seconds):
    """Start, wait some seconds while it has the folder, and kill; say whether that came before its end."""
    process = start_packing(start, end)
    time.sleep(seconds)
    process.kill()
    return process.wait(60) == -9


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(folder):
    return {path.name for path in folder.glob("shard-*.json")}


@pytest.mark.parametrize("start", ["pairs", "store"])
def test_packing_killed_at_random_moments_ends_with_the_same_bytes(source, tmp_path, start):
    whole = tmp_path / "whole"
    longest = seconds_to_write(source / start, whole)
    moments, kills, end = random.Random(start), 0, tmp_path / "killed"
    for _ in range(8):
        before = finished(end)
        killed = kill_after(source / start, end, moments.uniform(0, longest / 4))
        if not killed:
            break
        kills += 1
        assert not (end / "plan.json").exists() or (end / "index.json").exists() or before <= finished(end)
    said = pack(source / start, end)
    assert kills >= 2
    assert tree(end) == tree(whole)
    assert sorted(path.name for path in end.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert "holds 3,000 latents" in said


@pytest.mark.parametrize("start", ["pairs", "store"])
def test_a_disk_that_fills_is_one_line_and_the_same_command_goes_on(source, small_disk, tmp_path, start):
    whole = tmp_path / "whole"
    pack(source / start, whole)
    disk = small_disk(32)
    with pytest.raises(OSError, match="No space left"):
        fill(disk / "another's")
    blocks = sum(path.stat().st_blocks for path in whole.rglob("*") if path.is_file())
    os.truncate(disk / "another's", (disk / "another's").stat().st_size - int(0.7 * 512 * blocks))
    end, arguments = disk / "end", command(source / start, disk / "end", *flags_of(source / start))
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (told,) = errors_in(result.stderr)
    assert re.match(f"error: cannot write {end}.*: No space left on device; free some space", told), told
    assert (end / "plan.json").exists()
    written = {path: path.stat().st_mtime_ns for path in end.rglob("*.npy")}
    assert len(written) > 0.6 * len(list(whole.rglob("*.npy")))
    (disk / "another's").unlink()
    pack(source / start, end)
    assert tree(end) == tree(whole)
    if start == "pairs":
        assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_second_one_at_the_same_time_is_refused_and_harms_nothing(source, tmp_path):
    end = tmp_path / "store"
    arguments = command(source / "pairs", end, *flags_of(source / "pairs"))
    first = start_packing(source / "pairs", end)
    first.send_signal(signal.SIGSTOP)  # it holds the folder for as long as the other looks
    try:
        other = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    finally:
        first.send_signal(signal.SIGCONT)
    assert other.returncode == 2
    assert f"is in use by process {first.pid}" in other.stderr
    assert first.wait(60) == 0
    assert tree(end) == tree(source / "store")
