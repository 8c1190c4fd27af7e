"""The commands and the snippet of README.md, run as written but for the sizes, in a folder laid out as README says."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from .conftest import ROOT

BY_CI = ("bash scripts/", "source ")  # .ci/run calls both scripts; activating is theirs to do
SMALLER = [
    ("--nproc_per_node=8", "--nproc_per_node=1"),
    ("DiT-XL/2 --feature", "DiT-S/8 --feature"),
    ("--global-batch-size 256", "--global-batch-size 8 --max-steps 1 --num-workers 0"),
    ("--num-inference-steps 250", "--num-inference-steps 2"),
    ("--num-inference-steps 50", "--num-inference-steps 2"),
    ("num_inference_steps=25", "num_inference_steps=2"),
]


def blocks(language, name="README.md"):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(name="README.md"):
    return [line for block in blocks("bash", name) for line in block.splitlines() if not line.startswith(BY_CI)]


def smaller(text):
    for written, small in SMALLER:
        text = text.replace(written, small)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lay out the project with small stand-ins for ImageNet's latents and Stable Diffusion's VAE."""
    from ppdiffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("project")
    for name in ("train.py", "scripts", "configs", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    for kind in ("features", "labels"):
        (folder / f"data/fastdit_imagenet256/imagenet256_{kind}").mkdir(parents=True)
    for index in range(256):
        latents = random.standard_normal((1, 4, 32, 32), dtype=np.float32)
        np.save(folder / f"data/fastdit_imagenet256/imagenet256_features/{index}.npy", latents)
        np.save(folder / f"data/fastdit_imagenet256/imagenet256_labels/{index}.npy", np.array([index]))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)
    vae.save_pretrained(str(folder / "stabilityai/sd-vae-ft-mse"), safe_serialization=True)
    return folder


def run(folder, command):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def test_commands_and_snippet_run_as_written(folder):
    ran = [line for line in commands() if "benchmarks/" not in line]
    assert len(ran) == 6
    for line in ran:
        run(folder, [sys.executable, *shlex.split(smaller(line))[1:]])
    (snippet,) = blocks("python")
    run(folder, [sys.executable, "-c", smaller(snippet)])
    written = ["results/checkpoint-1", "DiT_XL_2_256/model_index.json", "outputs/samples/grid.png", "white_shark.png"]
    assert all((folder / path).exists() for path in written)


@pytest.mark.slow
def test_benchmarks_run_as_written(folder):
    ran = [line for line in commands() if "benchmarks/" in line]
    assert len(ran) == 2
    for line in ran:
        assert "ratio" in run(folder, [sys.executable, *shlex.split(line)[1:]])


def test_both_languages_give_the_same_commands():
    assert commands("README_CN.md") == commands("README.md")
    assert blocks("python", "README_CN.md") == blocks("python", "README.md")


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_no_figure_is_left_out(name):
    assert not re.findall(r"@[A-Z_]+@", (ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["README.md", "README_CN.md", "data/README.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    local = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in local if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing
