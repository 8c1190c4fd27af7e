"""The ladder of latencies as a user runs it, with a small model and few steps."""

import importlib.util
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.outputs import write_model
from paddle_dit.models.refit import parameter_shapes

from ..conftest import ROOT

LADDER = "benchmarks/latency_ladder.py"
FEW = ["--num-inference-steps", 2, "--rounds", 1, "--batch-sizes", 1, 2]


@pytest.fixture
def model(tmp_path):
    config = DiTConfig(sample_size=8, patch_size=2, hidden_size=48, depth=2, num_heads=4, num_classes=10)
    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in parameter_shapes(config).items()
    }
    write_model(tensors, ModelInfo(config, None, None), tmp_path / "model", "paddle_dit")
    return ["--pipeline", tmp_path / "model", "--vae", "data/digits_vae"]


def rows(text):
    """Return title -> its other cells, as text, of the last table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    heads = [index for index, cells in enumerate(lines) if cells[0].startswith("batch ")]
    assert set(map(len, lines)) == {11}
    return {title: cells for title, *cells in lines[heads[-1] + 2 :]}


@pytest.mark.slow
def test_rows_draw_the_same_and_one_that_cannot_run_says_why(run_command, model, tmp_path):
    picture = tmp_path / "made" / "ladder.png"
    asked = ["--rows", "cached", "cuda-graph", "--device", "cpu", "--plot", picture]
    result = run_command(LADDER, *model, *FEW, *asked)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [f"| batch {size}, s/image" in result.stdout for size in (1, 2, 3)] == [True, True, False]
    table = rows(result.stdout)
    assert list(table) == ["ours: dygraph", "+ cached conditioning"]
    loop, p95, rate, *ratios, decoder, peak, error, levels = table["+ cached conditioning"]
    assert float(p95) == float(loop) > 0  # of one turn
    assert float(rate) == pytest.approx(1 / float(loop), rel=0.05)
    assert ratios == ["-", "-", "-"]  # none of the rows that it is compared with was asked for
    assert float(decoder) > 0
    assert 50 < float(peak) < 20_000
    assert 0 < float(error) < 1e-4
    assert int(levels) <= 1
    assert re.search(r"^\+ CUDA graph: cannot run here: \S", result.stdout, flags=re.MULTILINE)
    assert Image.open(picture).width > 500


@pytest.mark.slow
def test_every_row_that_can_run_on_a_cpu_draws_the_same(run_command, model):
    peer = os.environ.get("PADDLE_DIT_PEERS_PYTHON")
    result = run_command(LADDER, *model, *FEW, "--device", "cpu", environment={"PADDLE_DIT_PEERS_PYTHON": peer})
    assert result.returncode == 0, result.stdout + result.stderr
    table = rows(result.stdout)
    refused = re.findall(r"^(.*): cannot run here: (\S.*)$", result.stdout, flags=re.MULTILINE)
    has_peer = bool(peer) or all(map(importlib.util.find_spec, ("torch", "diffusers")))
    assert len(table) == 10 + has_peer
    assert len(table) + len(refused) == 18
    assert float(table["ONNX Runtime"][7]) < float(table["ours: dygraph"][7])  # a process without Paddle
    errors = {title: float(cells[8]) for title, cells in table.items()}
    assert errors.pop("ONNX Runtime, guidance interval") > 1e-4
    assert max(errors.values()) < 5e-5
    assert all("-" not in cells[3] for cells in table.values())


@pytest.mark.slow
def test_a_preset_has_random_weights_none_of_which_is_zero(run_command):
    few = ["--num-inference-steps", 2, "--rounds", 1, "--batch-sizes", 1]
    result = run_command(LADDER, "--model", "DiT-S/8", *few, "--rows", "cached", "--device", "cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    assert 0 < float(rows(result.stdout)["+ cached conditioning"][8]) < 1e-4  # nothing would differ if layers were zero
    assert "DiT-S/8, random weights; latents 4x32x32; 2 DDIM steps, guidance 4 of 4 channels" in result.stdout


def test_a_row_that_draws_something_else_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from latency_ladder import Times, unequal

    times = {"static": Times(error=1e-5), "cached": Times(error=float("nan")), "interval": Times(error=1.0)}
    assert unequal(8, times) == ["+ cached conditioning, batch 8: nan"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "statik"], "Did you mean 'static'?"),
        (["--batch-sizes", 8, 1], "ascending"),
        (["--rounds", 1, 2, 3], "--rounds"),
        (["--guidance-interval", 700, 300], "--guidance-interval 700 300"),
        (["--threads", -3], "threads must be"),
        (["--device", "cuda"], "device must be"),
        (["--plot", "README.md/ladder.png"], "README.md is a file"),
        (["--plot", "ladder.svgx"], "end in .png"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(run_command, flags, said):
    result = run_command(LADDER, *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
