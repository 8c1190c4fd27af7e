"""The conversion command as a user runs it, good input and bad."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from paddle_dit.checkpoint import save_checkpoint
from paddle_dit.config import DiTConfig, ModelInfo

SCRIPT = "scripts/convert_dit_to_ppdiffusers.py"
VAE = "data/digits_vae"


@pytest.fixture
def run_folder(tmp_path):
    """Return a run with one checkpoint, whose EMA weights differ from the raw ones."""
    from paddle_dit.models.dit import DiT

    config = DiTConfig(sample_size=8, hidden_size=48, depth=1, num_heads=3, num_classes=3)
    rng = np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in DiT(config).state_dict().items()}
    kinds = {
        kind: {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
        for kind in ("model", "ema")
    }
    info = ModelInfo(config, {0: "red", 1: "green", 2: "blue"})
    save_checkpoint(tmp_path / "run", 12, info, kinds, {})
    return tmp_path / "run"


def test_a_run_becomes_a_pipeline(run_folder, tmp_path, run_command):
    output = tmp_path / "pipe"
    done = run_command(SCRIPT, "--checkpoint", run_folder, "--vae", VAE, "--output", output, "--scheduler", "ddpm")
    assert done.returncode == 0, done.stderr
    assert "agrees to" in done.stdout
    assert "drops the learned variance" in done.stdout
    assert 'pipe(pipe.get_label_ids(["red"])' in done.stdout
    index = json.loads((output / "model_index.json").read_text())
    assert index["id2label"] == {"0": "red", "1": "green", "2": "blue"}
    assert index["scheduler"] == ["ppdiffusers", "DDPMScheduler"]


@pytest.mark.slow
def test_the_printed_snippet_runs(run_folder, tmp_path, run_command):
    output = tmp_path / "pipe"
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"1": "grass, meadow"}))
    done = run_command(
        *(SCRIPT, "--checkpoint", run_folder / "checkpoint-12", "--vae", VAE, "--output", output),
        *("--id2label", names, "--format", "pdparams", "--weights", "model"),
    )
    assert done.returncode == 0, done.stderr
    assert (output / "transformer" / "model_state.pdparams").is_file()
    lines = [line.strip() for line in done.stdout.splitlines()[-3:]]
    snippet = "\n".join(lines).replace("=25", "=2").replace("image.png", str(tmp_path / "image.png"))
    ran = run_command("-c", snippet)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "image.png").is_file()


def test_help_imports_no_paddle(run_command):
    probe = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path('{SCRIPT}', run_name='__main__')"
    done = run_command("-X", "importtime", "-c", probe)
    assert "--checkpoint" in done.stdout
    assert not any(line.endswith((" paddle", " ppdiffusers")) for line in done.stderr.splitlines())


def bad_names(run_folder):
    (run_folder / "names.json").write_text('{"3": "purple"}')
    return ["--id2label", run_folder / "names.json"]


def damaged(run_folder):
    path = run_folder / "checkpoint-12" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return ["--checkpoint", path.parent]


def no_ema(run_folder):
    save_checkpoint(run_folder, 13, ModelInfo(DiTConfig(depth=1)), {"model": {"x": np.zeros(1, np.float32)}}, {})
    return []


def lone_file(run_folder):
    shutil.copy(run_folder / "checkpoint-12" / "ema.safetensors", run_folder / "lone.safetensors")
    return ["--checkpoint", run_folder / "lone.safetensors"]


def foreign_file(run_folder):
    shutil.copy(run_folder / "checkpoint-12" / "config.json", run_folder)
    save_file({"conv_in.weight": np.zeros(3, np.float32)}, run_folder / "unet.safetensors")
    return ["--checkpoint", run_folder / "unet.safetensors"]


def text_file(run_folder):
    (run_folder / "notes.pdparams").write_text("no weights at all")
    return ["--checkpoint", run_folder / "notes.pdparams"]


def occupied(run_folder):
    return ["--output", run_folder]


def below_a_file(run_folder):
    return ["--output", run_folder / "checkpoint-12" / "config.json" / "made", "--checkpoint", run_folder / "nowhere"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: ["--checkpoint", run / "nowhere"], "there is no file or folder"),
        (lambda run: ["--vae", run / "nowhere"], "no such VAE folder"),
        (lambda run: ["--vae", run], "holds no VAE; place config.json"),
        (lambda run: ["--wieghts", "ema"], "Did you mean 'weights'"),
        (bad_names, '"3": "purple" must be a class id below 3'),
        (damaged, "ema.safetensors has changed"),
        (no_ema, "no ema weights; ask for --weights model"),
        (lone_file, "weights need their config.json beside them"),
        (foreign_file, "unet.safetensors: it holds the tensors of a UNet"),
        (text_file, "no Paddle weights"),
        (occupied, "exists and is no DiTPipeline folder"),
        (below_a_file, "config.json is a file; choose another folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run_folder, tmp_path, run_here, spoil, message):
    defaults = ["--checkpoint", run_folder, "--vae", VAE, "--output", tmp_path / "pipe"]
    done = run_here(SCRIPT, *defaults, *spoil(run_folder))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.glob("*pipe*"))
