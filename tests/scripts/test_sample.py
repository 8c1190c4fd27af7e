"""scripts/sample.py and scripts/check_parity.py as processes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from paddle_dit.checkpoint import save_checkpoint
from paddle_dit.config import DiTConfig, ModelInfo

from ..conftest import GOLDEN, ROOT

DIGITS_SCALE = json.loads((ROOT / "data/digits_vae/config.json").read_text())["scaling_factor"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Return a run of a random digits model whose store named the shipped VAE."""
    return make_run(
        tmp_path_factory.mktemp("run"), DiTConfig.from_preset("DiT-Digits/2"), {0: "zero", 1: "one", 2: "two"}
    )


def make_run(folder, config, names=None):
    from paddle_dit.models.dit import DiT

    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(0, 0.05, value.shape).astype(np.float32) for name, value in DiT(config).state_dict().items()
    }
    info = ModelInfo(config, names, {"name": "data/digits_vae", "scaling_factor": DIGITS_SCALE})
    save_checkpoint(folder, 1, info, {"model": tensors, "ema": tensors}, {})
    return folder


def sample(run_command, folder, output, *flags):
    return run_command("scripts/sample.py", "--ckpt", folder, "--output", output, "--num-inference-steps", 2, *flags)


def test_images_a_grid_and_their_record_are_written(run_folder, run_command, tmp_path):
    flags = ["--class-labels", "two", "0", "--seed", "3", "--sampler", "ddim", "--guidance-interval", "100", "900"]
    result = sample(run_command, run_folder, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000001.png", "grid.png", "samples.json"]
    assert Image.open(tmp_path / "000001.png").size == (32, 32)
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["class_labels"] == [2, 0]
    assert (record["sampler"], record["seed"], record["guidance_channels"]) == ("ddim", 3, 3)
    assert record["guidance_scale"] == 4.0
    result = sample(run_command, run_folder, tmp_path, "--class-labels", "1")
    assert result.returncode == 2
    assert "holds an earlier set of images" in result.stderr
    result = sample(run_command, run_folder, tmp_path, "--class-labels", "1", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "grid.png", "samples.json"]


def test_an_unconditional_oblong_model_draws_without_flags(run_command, tmp_path):
    fields = {"sample_size": (4, 8), "hidden_size": 48, "depth": 1, "num_heads": 4, "num_classes": 0}
    make_run(tmp_path / "run", DiTConfig(**fields))
    result = sample(run_command, tmp_path / "run", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (record["class_labels"], record["guidance_scale"]) == ([0] * 8, 1.0)
    assert Image.open(tmp_path / "out" / "000007.png").size == (32, 16)
    assert Image.open(tmp_path / "out" / "grid.png").size == (8 * 64 + 9 * 4, 32 + 18 + 8)
    result = sample(run_command, tmp_path / "run", tmp_path / "guided", "--class-labels", "0", "--guidance-scale", "2")
    assert result.returncode == 2
    assert "an unconditional model has nothing to guide towards" in result.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--class-labels", "thre"], "no class is called 'thre'"),
        (["--class-labels", "twoo"], "Did you mean 'two'"),
        (["--class-labels", "1", "--guidance-scale", "0.5"], "guidance_scale must be 1"),
        (["--class-labels", "1", "--num-inference-steps", "2000"], "1 to 1000"),
        (["--class-labels", "1", "--vae", "absent"], "no such VAE folder"),
        (["--class-labels", "1", "--batch-size", "0"], "batch_size must be 1 or more"),
        (["--class-labels", "1", "--seed", "-1"], "seed must be 0 to"),
        (["--ckpt", "nowhere", "--output", "README.md/out"], "README.md is a file"),
    ],
)
def test_bad_requests_are_one_line(run_folder, run_command, tmp_path, flags, told):
    result = sample(run_command, run_folder, tmp_path / "out", *flags)
    assert result.returncode == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_vae_of_another_scale_is_refused(run_folder, run_command, tmp_path):
    shutil.copytree(ROOT / "data/digits_vae", tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.18215}))
    result = sample(run_command, run_folder, tmp_path / "out", "--vae", tmp_path / "vae")
    assert result.returncode == 2
    assert "this VAE scales latents by 0.18215" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_parity_table_passes_and_a_wrong_file_fails(run_command, tmp_path):
    result = run_command("scripts/check_parity.py", GOLDEN / "dit_tiny.npz")
    assert result.returncode == 0
    assert "30 of 30 within tolerance" in result.stdout
    with np.load(GOLDEN / "dit_tiny.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key.split("/")[0] in ("config", "weights", "forward")}
    np.savez(tmp_path / "wrong.npz", **{**arrays, "forward/out": arrays["forward/out"] + 1e-3})
    result = run_command("scripts/check_parity.py", tmp_path / "wrong.npz")
    assert result.returncode == 1
    assert "FAILED" in result.stdout
