"""scripts/sample.py and scripts/check_parity.py as processes."""

import json
import os
import re
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


def make_run(folder, config, names=None, seed=0):
    from paddle_dit.models.dit import DiT

    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 0.05, value.shape).astype(np.float32) for name, value in DiT(config).state_dict().items()
    }
    info = ModelInfo(config, names, {"name": "data/digits_vae", "scaling_factor": DIGITS_SCALE})
    save_checkpoint(folder, 1, info, {"model": tensors, "ema": tensors}, {})
    return folder


def sample(run, folder, output, *flags):
    return run("scripts/sample.py", "--ckpt", folder, "--output", output, "--num-inference-steps", 2, *flags)


def test_images_a_grid_and_their_record_are_written(run_folder, run_command, tmp_path):
    flags = ["--class-labels", "two", "0", "--seed", "3", "--sampler", "ddim", "--guidance-interval", "100", "900"]
    result = sample(run_command, run_folder, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000001.png", "grid.png", "samples.json"]
    assert Image.open(tmp_path / "000001.png").size == (32, 32)
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["class_labels"] == [2, 0]
    assert (record["sampler"], record["seed"], record["guidance_channels"]) == ("ddim", 3, 3)
    assert (record["guidance_interval"], record["timestep_spacing"]) == ([100, 900], "leading")
    assert (record["image_size"], record["model"]) == ([32, 32], str(run_folder / "checkpoint-1"))
    assert all(len(record[name]) == 64 for name in ("weights_sha256", "vae_sha256"))
    assert {"paddle", "numpy", "threads", "paddle_dit"} <= record["environment"].keys()
    assert re.search(r"2 images in .* s, .* images/s; peak memory \d+ MiB", result.stdout)
    assert re.search(r"2.0/2 images .* images/s\]", result.stderr)
    assert record["guidance_scale"] == 4.0
    result = sample(run_command, run_folder, tmp_path, "--class-labels", "1")
    assert result.returncode == 2
    assert "holds an earlier set of images" in result.stderr
    result = sample(run_command, run_folder, tmp_path, "--class-labels", "1", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "grid.png", "samples.json"]


def test_an_unconditional_oblong_model_draws_without_flags(run_here, tmp_path):
    fields = {"sample_size": (4, 8), "hidden_size": 48, "depth": 1, "num_heads": 4, "num_classes": 0}
    make_run(tmp_path / "run", DiTConfig(**fields))
    result = sample(run_here, tmp_path / "run", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (record["class_labels"], record["guidance_scale"]) == ([0] * 8, 1.0)
    assert Image.open(tmp_path / "out" / "000007.png").size == (32, 16)
    assert Image.open(tmp_path / "out" / "grid.png").size == (8 * 64 + 9 * 4, 32 + 18 + 8)
    result = sample(run_here, tmp_path / "run", tmp_path / "guided", "--class-labels", "0", "--guidance-scale", "2")
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
        (["--class-labels", "1", "--batch-size", "0"], "--batch-size must be 1 or more"),
        (["--image-size", "256"], "draws images of 32x32"),
        (["--model", "DiT-XL/2"], "DiT-XL/2 has"),
        (["--precision", "bf16"], "--precision bf16 needs a GPU"),
        (["--sampler", "ddpm", "--eta", "0.5"], "eta must be 0 to 1, and 0 for other samplers than ddim"),
        (["--again", "absent.png"], "no such file: absent.png"),
        (["--class-labels", "1", "--seed", "-1"], "seed must be 0 to"),
        (["--ckpt", "nowhere", "--output", "README.md/out"], "README.md is a file"),
    ],
)
def test_bad_requests_are_one_line(run_folder, run_here, tmp_path, flags, told):
    result = sample(run_here, run_folder, tmp_path / "out", *flags)
    assert result.returncode == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_images_are_drawn_again_from_what_they_say_of_themselves(run_folder, run_command, tmp_path):
    """Also by another number of threads than the machine would take, and for one image of a batch."""
    flags = ["--ckpt", run_folder, "--num-inference-steps", 3, "--batch-size", 2, "--seed", 5, "--first-index", 4]
    flags += ["--class-labels", "two", "0", "1", "--guidance-interval", 100, 900, "--output", tmp_path / "first"]
    threads = {"OMP_NUM_THREADS": "1" if os.environ["OMP_NUM_THREADS"] != "1" else "2"}
    result = run_command("scripts/sample.py", *flags, environment=threads)
    assert result.returncode == 0, result.stderr
    names = ["000004.png", "000005.png", "000006.png"]
    assert [path.name for path in sorted((tmp_path / "first").glob("0*.png"))] == names
    before = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    unset = {"OMP_NUM_THREADS": None}
    for source in ("samples.json", "000005.png", "000006.png"):
        output = tmp_path / f"again-{source}"
        again = ["--again", tmp_path / "first" / source, "--output", output]
        result = run_command("scripts/sample.py", *again, environment=unset)
        assert result.returncode == 0, result.stderr
        drawn = {path.name: path.read_bytes() for path in output.glob("0*.png")}
        expected = names if source == "samples.json" else [source]
        assert drawn == {name: before[name] for name in expected}


def test_images_of_other_weights_are_not_drawn_again(run_folder, run_here, tmp_path):
    assert sample(run_here, run_folder, tmp_path / "first", "--class-labels", "1").returncode == 0
    other = make_run(tmp_path / "run", DiTConfig.from_preset("DiT-Digits/2"), {0: "zero"}, seed=1)
    again = ["--again", tmp_path / "first" / "000000.png", "--ckpt", other, "--output", tmp_path / "second"]
    result = run_here("scripts/sample.py", *again)
    assert result.returncode == 2
    assert "000000.png was drawn with other weights; give those with --ckpt" in result.stderr
    assert not (tmp_path / "second").exists()


def test_a_record_from_strangers_is_read_as_options_and_nothing_else(run_folder, run_here, tmp_path):
    assert sample(run_here, run_folder, tmp_path / "first", "--class-labels", "1").returncode == 0
    record = json.loads((tmp_path / "first" / "samples.json").read_text())
    path = tmp_path / "record.json"
    for change, told in (
        ({"seed": "--overwrite"}, "--seed"),
        ({"class_labels": ["1", "--overwrite"]}, "a list cannot name a flag"),
        ({"sampler": {"a": 1}}, "nested mapping"),
        ({"environment": "none", "index": "one", "weights_sha256": 3}, "was drawn with other weights"),
    ):
        path.write_text(json.dumps({**record, **change}))
        result = run_here("scripts/sample.py", "--again", path, "--output", tmp_path / "second")
        assert result.returncode == 2
        assert told in result.stderr
        assert "Traceback" not in result.stderr


def test_a_vae_of_another_scale_is_refused(run_folder, run_here, tmp_path):
    shutil.copytree(ROOT / "data/digits_vae", tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.18215}))
    result = sample(run_here, run_folder, tmp_path / "out", "--vae", tmp_path / "vae")
    assert result.returncode == 2
    assert "this VAE scales latents by 0.18215" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_parity_table_passes_and_a_wrong_file_fails(run_here, tmp_path):
    result = run_here("scripts/check_parity.py", GOLDEN / "dit_tiny.npz")
    assert result.returncode == 0
    assert "30 of 30 within tolerance" in result.stdout
    with np.load(GOLDEN / "dit_tiny.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key.split("/")[0] in ("config", "weights", "forward")}
    np.savez(tmp_path / "wrong.npz", **{**arrays, "forward/out": arrays["forward/out"] + 1e-3})
    result = run_here("scripts/check_parity.py", tmp_path / "wrong.npz")
    assert result.returncode == 1
    assert "FAILED" in result.stdout
