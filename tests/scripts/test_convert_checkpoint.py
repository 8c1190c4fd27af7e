"""The conversion of any format to any other, as a user runs it."""

import json

import numpy as np
import paddle
import pytest

from paddle_dit.conversion import exact_frequencies, load_model, read_weights

from ..conftest import GOLDEN
from ..conversion.pytorch_files import write_pt

SCRIPT = "scripts/convert_checkpoint.py"
VAE = "data/digits_vae"


@pytest.fixture
def published(tmp_path):
    """Return a ``.pt`` as the paper's code publishes it; its head count has to be said."""
    with np.load(GOLDEN / "dit_tiny.npz") as golden:
        weights = {key[8:]: golden[key] for key in golden.files if key.startswith("weights/")}
    return write_pt(tmp_path / "DiT-tiny.pt", weights)


def test_published_weights_become_ours_and_are_drawn_with(published, tmp_path, run_command):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({str(label): f"digit {label}" for label in range(10)}))
    done = run_command(SCRIPT, published, tmp_path / "tiny", "--num-heads", 4, "--id2label", names)
    assert done.returncode == 0, done.stderr
    table = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert table["found"] == "facebook/DiT state dict"
    assert "2 blocks, width 48, 4 heads, patch 2, latents 4x8x8, 10 classes" in table["architecture"]
    assert "4 heads: as you say" in done.stdout
    assert "31 of the source used once each; 31 of ours read back and equal bit for bit" in table["tensors"]
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["config.json", "model.safetensors"]
    drawn = run_command(
        *("scripts/sample.py", "--model", tmp_path / "tiny", "--vae", VAE, "--class-labels", "digit 3"),
        *("--num-inference-steps", 2, "--output", tmp_path / "images"),
    )
    assert drawn.returncode == 0, drawn.stderr
    assert any(path.suffix == ".png" for path in (tmp_path / "images").rglob("*"))


def test_a_pipeline_says_how_far_the_frequencies_move_it_and_is_mended(published, tmp_path, run_here):
    from ppdiffusers import DiTPipeline

    output = tmp_path / "pipe"
    done = run_here(SCRIPT, published, output, "--to", "ppdiffusers", "--vae", VAE, "--num-heads", 4)
    assert done.returncode == 0, done.stderr
    assert "DiTPipeline computes frequency_shift 1, the model was trained with 0" in done.stdout
    assert "999: 0.0" in done.stdout
    assert "paddle_dit.conversion.exact_frequencies(pipe)" in done.stdout
    pipe = exact_frequencies(DiTPipeline.from_pretrained(str(output)))
    model, info = load_model(output)
    assert info.config.frequency_shift == 0
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 4, 8, 8), dtype=np.float32))
    timesteps, labels = paddle.to_tensor([7, 999]), paddle.to_tensor([3, 9])
    with paddle.no_grad():
        stock = pipe.transformer(x, timestep=timesteps, class_labels=labels).sample
        assert float((stock - model(x, timesteps, labels)).abs().max()) <= 1e-5


def test_around_all_formats_nothing_changes(published, tmp_path, run_here):
    first, _ = read_weights(published, num_heads=4)
    source, hint = published, ("--num-heads", 4)
    steps = [("diffusers", "a"), ("ppdiffusers", "b"), ("paddle_dit", "c"), ("facebook", "d.safetensors")]
    for target, name in steps:
        done = run_here(SCRIPT, source, tmp_path / name, "--to", target, "--vae", VAE, "--no-verify", *hint)
        assert done.returncode == 0, done.stderr
        assert "not compared (--no-verify)" in done.stdout
        source, hint = tmp_path / name, ()
    last, info = read_weights(source, num_heads=4)
    assert info.config.frequency_shift == 0
    assert all(np.array_equal(first[name], last[name]) for name in first)


def test_outputs_are_compared_with_the_stock_class_on_both_sides(published, tmp_path, run_here):
    done = run_here(SCRIPT, published, tmp_path / "a", "--to", "diffusers", "--num-heads", 4)
    assert done.returncode == 0, done.stderr
    assert "against ppdiffusers' transformer on what was written: error" in done.stdout
    assert "diffusers computes frequency_shift 1" in done.stdout
    done = run_here(SCRIPT, tmp_path / "a", tmp_path / "b")
    assert "against ppdiffusers' transformer on the source: error" in done.stdout, done.stderr


def test_help_imports_no_paddle(run_command):
    probe = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path('{SCRIPT}', run_name='__main__')"
    done = run_command("-X", "importtime", "-c", probe)
    assert "--drop-trained-positions" in done.stdout
    assert not any(line.endswith((" paddle", " ppdiffusers")) for line in done.stderr.splitlines())


def test_without_verification_no_paddle_is_imported(published, tmp_path, run_command):
    arguments = ["x", str(published), str(tmp_path / "out"), "--num-heads", "4", "--no-verify"]
    probe = f"import runpy, sys; sys.argv = {arguments}; runpy.run_path('{SCRIPT}', run_name='__main__')"
    done = run_command("-X", "importtime", "-c", probe)
    assert done.returncode == 0, done.stderr
    assert not any(line.endswith((" paddle", " torch", " ppdiffusers")) for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out"], "no tensor shows the number of heads, and no preset has width 48; give --num-heads"),
        (["out", "--num-heads", "4", "--to", "facebook"], "let its name end in .safetensors or .pt"),
        (["out", "--num-heads", "4", "--wieghts", "ema"], "Did you mean"),
        (["DiT-tiny.pt"], "DiT-tiny.pt exists; choose another DST"),
        (["out", "--frequency-shift", "2", "--num-heads", "4"], "frequency_shift must be 0"),
        (["out", "--to", "ppdiffusers", "--num-heads", "4", "--vae", "nowhere/at/all"], "no such VAE folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(published, tmp_path, run_here, arguments, message):
    done = run_here(SCRIPT, published, tmp_path / arguments[0], *arguments[1:])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["DiT-tiny.pt"]
