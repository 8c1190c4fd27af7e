"""The commands and the snippets of README.md, run as written but for the sizes, in a folder laid out as README says."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from .conftest import ROOT
from .conversion.pytorch_files import write_pt
from .evaluation.inception_weights import formula_weights

# .ci/run calls the first two; activating is theirs to do; several machines have a test of their own
ELSEWHERE = ("bash scripts/quickstart.sh", "bash scripts/test.sh", "source ", "bash scripts/train_multi_node.sh")
SMALLER = [
    ("--max_steps 1000000000", "--max_steps 1 --model_name_or_config DiT-S/8"),
    ("--max_steps 400000", "--max_steps 1 --model_name_or_config DiT-S/8 --logging_steps 1 --seed 23"),
    ("--per_device_train_batch_size 16", "--per_device_train_batch_size 4"),
    ("--per_device_train_batch_size 32", "--per_device_train_batch_size 4"),
    ("-n 8", "-n 1"),
    ("--nproc_per_node=8", "--nproc_per_node=1"),
    ("--nproc_per_node 8 scripts/sample_ddp.py", "--nproc_per_node 1 scripts/sample_ddp.py"),
    ("--nproc_per_node 8", "--nproc_per_node 2"),
    ("--num-fid-samples 50000", "--num-fid-samples 4 --num-sampling-steps 2"),
    ("scripts/evaluate.py samples", "scripts/evaluate.py --inception inception.safetensors samples"),
    ("DiT-XL/2 --feature", "DiT-S/8 --feature"),
    ("DiT-XL/2 --data", "DiT-S/8 --global-batch-size 4 --max-steps 1 --data"),
    ("--global-batch-size 256", "--global-batch-size 8 --max-steps 1 --num-workers 0"),
    ("--num-inference-steps 250", "--num-inference-steps 2"),
    ("--num-inference-steps 50", "--num-inference-steps 2"),
    ("num_inference_steps=25", "num_inference_steps=2"),
    ("--kills 10", "--kills 1"),
    ("--max-steps 24000", "--max-steps 1 --global-batch-size 8"),
]


# What takes long is run by a slow test; tests/deploy and tests/faults have the same commands in small
LONG = ("benchmarks/", "torture.py", "export_inference.py", "infer.py", "paddle_dit.deploy")


def blocks(language, name="README.md"):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(name="README.md"):
    lines = [line for block in blocks("bash", name) for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if not line.startswith(ELSEWHERE)]


def smaller(text):
    for written, small in SMALLER:
        text = text.replace(written, small)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lay out the project with small stand-ins for ImageNet, its latents and Stable Diffusion's VAE."""
    from ppdiffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("project")
    for name in ("train.py", "train_image_generation_dit_trainer.py", "scripts", "configs", "benchmarks", "tests"):
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
    for index in range(8):
        path = folder / "imagenet/train" / ("n01440764", "n01443537")[index % 2] / f"{index}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (280, 300, 3), dtype=np.uint8)).save(path)
    (folder / "imagenet/val").symlink_to("train")
    reference = random.integers(0, 256, (8, 256, 256, 3), dtype=np.uint8)
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=reference)
    save_file(formula_weights(), folder / "inception.safetensors")
    write_published(folder / "DiT-XL-2-256x256.pt")
    return folder


def write_published(path):
    """Write random weights as the paper's code publishes its own; the width tells the number of heads."""
    from paddle_dit.config import DiTConfig
    from paddle_dit.conversion.keymaps import facebook_rules, split
    from paddle_dit.models.refit import parameter_shapes
    from paddle_dit.positions import sincos_position_table

    config = DiTConfig(patch_size=8, hidden_size=384, depth=1, num_heads=6)
    random = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    ours = {name: random.standard_normal(shape, np.float32) / 50 for name, shape in shapes.items()}
    table = sincos_position_table(config.hidden_size, config.grid)[None]
    write_pt(path, {"pos_embed": table, **dict(split(facebook_rules(config), ours))})


def environment():
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
    return {**kept, "PADDLE_DIT_VENV": sys.prefix}


def run(folder, command):
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def is_long(text):
    return any(name in text for name in LONG)


def run_line(folder, line):
    program, *arguments = shlex.split(smaller(line))
    return run(folder, [{"python": sys.executable}.get(program, program), *arguments])


def test_commands_and_snippet_run_as_written(folder):
    ran = [line for line in commands() if not is_long(line)]
    assert len(ran) == 22
    for line in ran:
        run_line(folder, line)
    for snippet in blocks("python"):
        if not is_long(snippet):
            run(folder, [sys.executable, "-c", smaller(snippet)])
    written = [
        "data/imagenet256/preview.png",
        "outputs/data.png",
        "results-from-images/checkpoint-1",
        "results/checkpoint-1",
        "results-finetuned/checkpoint-1",
        "DiT-XL-2-256/model.safetensors",
        "DiT-XL-2-256-diffusers/config.json",
        "image_generation_dit_output_trainer/checkpoint-1",
        "results-trainer/checkpoint-1",
        "DiT_XL_2_256/model_index.json",
        "outputs/samples/grid.png",
        "samples/samples.npz",
        "samples/metrics.json",
        "imagenet256-val.npz",
        "white_shark.png",
    ]
    assert all((folder / path).exists() for path in written)


@pytest.mark.slow
def test_what_takes_long_runs_as_written(folder):
    """In the folder that the commands before it have filled; alone, with the one that it needs."""
    if not (folder / "DiT_XL_2_256").exists():
        test_commands_and_snippet_run_as_written(folder)
    for line in commands():
        if is_long(line):
            told = run_line(folder, line)
            assert "benchmarks/" not in line or "ratio" in told
    for snippet in blocks("python"):
        if is_long(snippet):
            run(folder, [sys.executable, "-c", smaller(snippet)])
    assert (folder / "deploy/DiT_XL_2_256/deploy.json").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_machines_train_together_as_written(folder):
    (line,) = [line for line in "".join(blocks("bash")).splitlines() if "train_multi_node" in line]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = shlex.split(smaller(line).replace("10.0.0.1:6170", address))
    machines = [subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    state = json.loads((folder / "results-2x8" / "checkpoint-1" / "state.json").read_text())
    assert state["environment"]["ranks"] == 2


def test_both_languages_give_the_same_commands():
    assert commands("README_CN.md") == commands("README.md")
    assert blocks("python", "README_CN.md") == blocks("python", "README.md")


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_no_figure_is_left_out(name):
    assert not re.findall(r"@[A-Z_]+@", (ROOT / name).read_text(encoding="utf-8"))


PAGES = [
    "README.md",
    "README_CN.md",
    "data/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    local = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in local if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing
