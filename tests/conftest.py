"""What every test shares: the settings of the entry points, a small model, and real processes."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import configuration, settings

from paddle_dit import runtime

runtime.prepare()

# The same examples every time, whatever the machine's speed; hypothesis keeps nothing in the project's folder.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "paddle-dit-hypothesis")
settings.register_profile("tests", database=None, derandomize=True, deadline=None)
settings.load_profile("tests")

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def tiny_config():
    """Return a model small enough to build and run in milliseconds."""
    from paddle_dit.config import DiTConfig

    return DiTConfig(sample_size=8, patch_size=2, hidden_size=48, depth=2, num_heads=4, num_classes=10)


@pytest.fixture
def latent_store(tmp_path):
    """Write 64 random latents of ten classes and return the packed store's folder."""
    import numpy as np

    from paddle_dit.data.store import StoreWriter

    random = np.random.default_rng(0)
    with StoreWriter(
        tmp_path / "latents",
        sample_shape=(4, 8, 8),
        dtype="float32",
        num_classes=10,
        label_names={label: f"class {label}" for label in range(10)},
        vae={"name": "none", "scaling_factor": 1.0, "image_size": 64},
    ) as store:
        store.append(random.standard_normal((64, 4, 8, 8)).astype(np.float32), np.arange(64) % 10)
    return tmp_path / "latents"


@pytest.fixture
def run_command():
    """Return a function that runs ``python ARGUMENTS`` at the project's root and gives its result.

    ``environment`` changes variables; None takes one out.
    """

    def run(*arguments, processes: int = 1, log_dir=None, environment=None) -> subprocess.CompletedProcess:
        command = [sys.executable]
        if processes > 1:
            command += [
                "-m",
                "paddle.distributed.launch",
                "--nproc_per_node",
                str(processes),
                "--log_dir",
                str(log_dir),
            ]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
        kept = {key: value for key, value in {**kept, **(environment or {})}.items() if value is not None}
        return subprocess.run(
            [*command, *map(str, arguments)], cwd=ROOT, env=kept, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture
def run_here(monkeypatch):
    """Return a function that does what ``run_command`` does, in this process, where Paddle is loaded already.

    For what does not depend on a process of its own: most of a script's time goes into its start.
    """
    monkeypatch.chdir(ROOT)

    def run(script: str, *arguments) -> subprocess.CompletedProcess:
        command, code = [script, *map(str, arguments)], 0
        monkeypatch.setattr(sys, "argv", command)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    return run
