"""The kill loop itself: real kills in small numbers, many of them in the slow suite, and that it can fail."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paddle_dit.checkpoint import open_checkpoint
from paddle_dit.evaluation.torture import Kill, differences
from paddle_dit.files import describe
from tests.conftest import ROOT
from tests.faults.runs import TRAIN, flags_of, run, wait_for


def torture(output, *flags):
    """Run the script and return its exit code and output."""
    command = [sys.executable, "scripts/torture.py", "--output", output, *flags]
    result = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def figure(text, name):
    return re.search(rf"^{name} +(.*)$", text, re.MULTILINE)[1]


def commands_with(folder):
    """Return how many living processes have a folder in their command."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found += str(folder).encode() in path.read_bytes()
    return found


def tamper(folder):
    """Change one number of the averaged weights by as little as possible, so that the checkpoint stays whole."""
    (checkpoint,) = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1:]
    tensors = load_file(checkpoint / "ema.safetensors")
    name = sorted(tensors)[0]
    first = tensors[name].reshape(-1)[:1]
    first[:] = np.nextafter(first, np.float32(np.inf))
    save_file(tensors, checkpoint / "ema.safetensors")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["ema.safetensors"] = describe(checkpoint / "ema.safetensors")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    open_checkpoint(checkpoint)
    return name


@pytest.mark.slow
@pytest.mark.distributed
def test_three_kills_lose_nothing_but_steps_and_one_changed_bit_is_noticed(tmp_path):
    code, text = torture(tmp_path, "--kills", 3)
    assert code == 0, text
    told = re.findall(
        r"^kill (\d): (all|rank \d) while ([\w-]+), at step \d+, whole is \d+, (\d+) steps lost", text, re.M
    )
    assert [(number, moment) for number, _, moment, _ in told] == [("1", "saving"), ("2", "training"), ("3", "saving")]
    assert [victim == "all" for _, victim, _, _ in told] == [True, False, True]
    assert all(int(lost) <= 10 for *_, lost in told)
    assert figure(text, "kills survived") == "3"
    assert figure(text, "of one rank") == "1"
    assert figure(text, "verdict") == "equal bit for bit"
    (unbroken,) = tmp_path.glob("unbroken-*")
    assert differences(unbroken, tmp_path / "killed-1") == []

    name = tamper(unbroken)
    code, text = torture(tmp_path, "--kills", 0, "--steps", 40, "--processes", 2)
    assert code == 1
    assert figure(text, "verdict") == f"NOT equal: tensor ema:{name} (1 differences)"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kills", "flags", "most"), [(52, [], 10), (12, ["--trainer", "--no-async-save"], 5)], ids=["train.py", "trainer"]
)
def test_many_kills_lose_nothing_but_steps(tmp_path, kills, flags, most):
    code, text = torture(tmp_path, "--kills", kills, "--seed", 1, *flags)
    print(text)
    assert code == 0
    lost = [int(steps) for steps in re.findall(r"^kill \d+: .* (\d+) steps lost", text, re.M)]
    assert len(lost) == kills
    assert max(lost) <= most
    assert figure(text, "kills survived") == str(kills)
    assert int(figure(text, "inside saves")) >= kills // 5
    assert figure(text, "verdict") == "equal bit for bit"


def test_runs_of_another_seed_or_length_differ_in_everything(store, tmp_path):
    runs = {"run": {}, "seed": {"global_seed": 1}, "length": {"max_steps": 3}}
    for name, more in runs.items():
        flags = flags_of(TRAIN, store, tmp_path / name, **{"max_steps": 2} | more)
        assert run(TRAIN, 1, *flags, log=tmp_path / f"{name}.log")[0] == 0
    seed, length = (differences(tmp_path / "run", tmp_path / name) for name in ("seed", "length"))
    assert sum("tensor model:" in line for line in seed) > 10
    assert sum("log line" in line for line in seed) == 2
    assert length[0] == "the last step is 2 and 3"
    assert sum("log line" in line for line in length) == 1


def test_leftovers_tell_what_was_hit():
    def hit(*leftovers, moment="saving"):
        kill = Kill(moment, "all", reached=12, whole=10, leftovers=list(leftovers))
        assert kill.lost == 2
        return kill.inside_save, kill.inside_deletion

    assert hit() == (False, False)
    assert hit(15) == (True, False)
    assert hit(5) == (False, True)
    assert hit(5, 15) == (True, True)
    assert hit(5, 15, moment="start-up") == (False, False)  # the kill before left them


def test_too_few_steps_are_refused(tmp_path):
    code, text = torture(tmp_path, "--kills", 3, "--steps", 39)
    assert code == 2
    assert "error: --steps must be 40 or more, got 39" in text
    assert "Traceback" not in text


@pytest.mark.distributed
def test_an_interruption_leaves_no_process_behind(tmp_path):
    command = [sys.executable, "scripts/torture.py", "--output", tmp_path, "--kills", "1"]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: commands_with(tmp_path / "unbroken") >= 3, 60, "the start of two ranks")
        process.terminate()
        assert process.wait(20) == 130
        assert "stopped, and with it all that it had started" in process.stderr.read()
        assert commands_with(tmp_path) == 0
    finally:
        process.kill()
