"""Converting a file of gigabytes takes the memory of the file's pages and of one tensor besides."""

import subprocess
import sys

import numpy as np
import pytest

from paddle_dit.config import DiTConfig
from paddle_dit.conversion.formats import FACEBOOK
from paddle_dit.conversion.keymaps import foreign_shapes

from ..conftest import ROOT
from .pytorch_files import state_dict, write_stream

MEASURED = """
import re, runpy, sys, threading, time

def figures():
    text = open("/proc/self/status").read()
    return {key: int(re.search(rf"{key}:\\s+(\\d+)", text)[1]) * 1024 for key in ("RssAnon", "RssFile", "VmHWM")}

peak = {}
def watch():
    while True:
        for key, value in figures().items():
            peak[key] = max(peak.get(key, 0), value)
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
sys.argv = ["convert_checkpoint.py", *sys.argv[1:]]
runpy.run_path("scripts/convert_checkpoint.py", run_name="__main__")
peak["VmHWM"] = figures()["VmHWM"]
print("peak", *(f"{key}={value}" for key, value in peak.items()))
"""


def measure(*arguments):
    """Run the command in a process of its own; return its peaks in bytes."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("peak"))
    return {key: int(value) for key, value in (pair.split("=") for pair in line.split()[1:])}


@pytest.mark.slow
def test_reading_and_writing_xl_2_takes_little_more_memory_than_the_file_has_bytes(tmp_path):
    config = DiTConfig.from_preset("DiT-XL/2", frequency_shift=0)
    shapes = foreign_shapes(FACEBOOK.rules(config), config)
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes.values())
    path = write_stream(tmp_path / "DiT-XL-2.pt", state_dict(shapes), arrays)
    size = path.stat().st_size
    assert size > 2.6e9
    for target, output in (("paddle_dit", "ours"), ("facebook", "back.safetensors")):
        source = path if target == "paddle_dit" else tmp_path / "ours"
        hint = ("--sample-size", 32) if source is path else ()
        found = measure(source, tmp_path / output, "--to", target, "--no-verify", *hint)
        told = {key: f"{value / size:.2f}" for key, value in found.items()}
        print(f"{target}: {size:,} bytes, peaks over it: {told}")
        assert found["VmHWM"] <= 1.3 * size, told
        assert found["RssAnon"] <= 0.3 * size, told
