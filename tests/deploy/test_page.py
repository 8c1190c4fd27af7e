"""docs/deploy.md: its commands and its snippet run as written, but for the model's size and the number of steps."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from paddle_dit.cli import parse
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.outputs import write_model
from paddle_dit.deploy import parity
from paddle_dit.models.refit import parameter_shapes
from paddle_dit.runtime import sees_gpu

from ..conftest import ROOT

PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


def commands(script, excluded="tensorrt"):
    found = [line for line in COMMANDS if script in line and excluded not in line]
    assert found
    return [shlex.split(line)[1:] for line in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lay out the project with a small model of ImageNet's classes in the place of the large one."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("scripts", "benchmarks", "data"):
        (folder / name).symlink_to(ROOT / name)
    config = DiTConfig(sample_size=8, hidden_size=48, depth=2, num_heads=4)
    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in parameter_shapes(config).items()
    }
    info = ModelInfo(config, None, {"name": "data/digits_vae", "image_size": 32})
    write_model(tensors, info, folder / "DiT_XL_2_256", "paddle_dit")
    return folder


def run(folder, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_an_engine_is_made_used_and_compared_as_written(folder):
    lines = commands("scripts/export_inference.py") + commands("scripts/infer.py")
    assert len(lines) == 3
    for line in lines:
        result = run(folder, *("2" if word == "25" else word for word in line))
        assert result.returncode == 0, result.stderr
    (snippet,) = blocks("python")
    assert run(folder, "-c", snippet.replace("steps=25", "steps=2")).returncode == 0
    written = ("deploy/DiT_XL_2_256/deploy.json", "outputs/samples/grid.png", "golden_retriever.png")
    assert all((folder / path).is_file() for path in written)


@pytest.mark.skipif(sees_gpu(), reason="here the backends may have what they need")
def test_what_needs_a_gpu_is_refused_in_a_line_and_leaves_nothing(folder):
    lines = commands("scripts/export_inference.py", "--max-batch-size")
    assert len(lines) == 2
    for line in lines:
        result = run(folder, *line)
        assert result.returncode == 2
        assert "TensorRT" in result.stderr.splitlines()[-1] or "Tensorrt" in result.stderr.splitlines()[-1]
        assert not (folder / line[line.index("--output") + 1]).exists()


def test_the_ladders_commands_are_understood(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from latency_ladder import Options

    lines = commands("benchmarks/latency_ladder.py")
    assert len(lines) == 4
    for _, *arguments in lines:
        parse(Options, arguments, description="").check()


def test_no_other_command_is_on_the_page_but_the_installation():
    assert [line for line in COMMANDS if not line.startswith("python ")] == [
        line for line in COMMANDS if line.startswith("pip install ")
    ]
    (pip,) = [line for line in COMMANDS if line.startswith("pip ")]
    lock = (ROOT / "requirements" / "lock-py3.11.txt").read_text(encoding="utf-8").splitlines()
    assert set(pip.split()[2:]) <= set(lock)
    assert (
        sum(len(commands(script, "nothing")) for script in ("export_inf", "infer.py", "latency_")) == len(COMMANDS) - 1
    )


@pytest.mark.parametrize("readme", ["README.md", "README_CN.md"])
def test_the_readme_names_the_same_packages(readme):
    (pip,) = [line for line in COMMANDS if line.startswith("pip ")]
    (row,) = [
        line for line in (ROOT / readme).read_text(encoding="utf-8").splitlines() if line[:15] == "| `onnxruntime`"
    ]
    named = {word for words in re.findall("`([^`]*)`", row) for word in words.split()}
    assert {package.split("==")[0] for package in pip.split()[2:]} <= named


def test_limits_and_timesteps_are_the_gates():
    assert f"largest error ≤ {parity.LARGEST_ERROR:.0e}".replace("e-0", "e-") in PAGE
    assert f"relative L2 distance ≤ {parity.LARGEST_DISTANCE:.0%}".replace("%", " %") in PAGE
    assert f"PSNR ≥ {parity.LEAST_PSNR:.0f} dB" in PAGE
    assert "timesteps {}, {} and {}".format(*parity.TIMESTEPS) in PAGE
    assert f"a whole sample of {parity.STEPS} DDIM steps" in PAGE


def test_no_figure_is_left_out():
    assert not re.findall(r"@[A-Z_]+@", PAGE)


def test_links_lead_somewhere():
    local = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "://" not in link]
    assert local
    assert all((ROOT / "docs" / link).exists() for link in local)
