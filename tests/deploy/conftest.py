"""A small model with the digits' VAE, and an engine of it, exported once by the command."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from paddle_dit.checkpoint import save_checkpoint
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.deploy.engine import DIGEST
from paddle_dit.files import describe, digest_of, read_json, write_json

from ..conftest import ROOT

NAMES = {label: f"digit {label}" for label in range(10)}
MAX_BATCH_SIZE = 3


def make_source(**fields):
    """Return a Generator of a small random model."""
    from paddle_dit.generation import Generator
    from paddle_dit.models.dit import DiT
    from paddle_dit.models.vae import load_vae

    config = DiTConfig(**{"sample_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 10, **fields})
    random, model = np.random.default_rng(0), DiT(config)
    for parameter in model.parameters():
        parameter.set_value(random.normal(0, 0.05, parameter.shape).astype(np.float32))
    model.eval()
    return Generator(
        model, load_vae(ROOT / "data/digits_vae"), ModelInfo(config, NAMES if config.num_classes else None)
    )


@pytest.fixture(scope="session")
def source():
    return make_source()


@pytest.fixture(scope="session")
def run_folder(source, tmp_path_factory):
    """Return a run folder with the model's weights."""
    folder = tmp_path_factory.mktemp("run")
    tensors = {name: value.numpy() for name, value in source.model.state_dict().items()}
    factor = float(source.vae.config.scaling_factor)
    info = ModelInfo(source.info.config, NAMES, {"name": "data/digits_vae", "scaling_factor": factor})
    save_checkpoint(folder, 1, info, {"model": tensors, "ema": tensors}, {})
    return folder


@pytest.fixture(scope="session")
def exported(run_folder, tmp_path_factory):
    """Return an engine of ONNX Runtime, and what the command said."""
    output = tmp_path_factory.mktemp("deploy") / "engine"
    command = [sys.executable, "scripts/export_inference.py", "--pipeline", str(run_folder), "--output", str(output)]
    done = subprocess.run(
        [*command, "--max-batch-size", str(MAX_BATCH_SIZE)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return output, done.stdout


@pytest.fixture(scope="session")
def pipeline(exported):
    from paddle_dit.deploy import InferencePipeline

    return InferencePipeline.from_pretrained(exported[0])


@pytest.fixture
def engine(exported, tmp_path):
    """Return a copy of the engine that a test may damage."""
    return shutil.copytree(exported[0], tmp_path / "engine")


def sign(folder, **changes):
    """Write other values, and the hashes of files that were changed, into deploy.json as an export would."""
    values = read_json(folder / "deploy.json", AssertionError)
    values["files"] = {name: describe(folder / name) for name in values["files"]}
    values = {name: value for name, value in {**values, **changes}.items() if name != DIGEST}
    write_json(folder / "deploy.json", {**values, DIGEST: digest_of(values)})
