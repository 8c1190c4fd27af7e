"""Real runs of the training scripts, to be interrupted, continued and compared."""

import json

import numpy as np
from safetensors.numpy import load_file

from paddle_dit.evaluation import launch as launches
from paddle_dit.evaluation.launch import TRAIN, TRAINER, Launch, flags_of

__all__ = [
    "TRAIN",
    "TRAINER",
    "assert_same",
    "checkpoints",
    "errors_in",
    "fill",
    "flags_of",
    "losses",
    "run",
    "start",
    "tensors",
    "wait_for",
    "wrapped",
]
WRAPPER = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
from paddle_dit import runtime
runtime.prepare()
{change}
import {module}
{module}.main()
"""


def start(script, processes, *flags, log, environment=None):
    """Start ``script`` on ``processes`` ranks, its output in the file ``log``; use it as a context manager.

    ``code`` is its exit code (None while it runs), ``wait(seconds)`` waits for it, ``text`` is all output, ranks'
    logs included, ``pid(rank)`` is a rank's process (None as rank: the launcher), ``kill()`` ends all.
    """
    return Launch(script, flags, processes=processes, log=log, environment=environment)


def wrapped(folder, script, change):
    """Write a file that makes a small change and then runs ``script``, and return its path."""
    path = folder / f"wrapper-{len(list(folder.glob('wrapper-*')))}.py"
    path.write_text(WRAPPER.format(change=change, module=script.removesuffix(".py")))
    return path


def run(script, processes, *flags, log, seconds=120, environment=None):
    """Run to the end; return exit code and output."""
    with start(script, processes, *flags, log=log, environment=environment) as launch:
        code = launch.wait(seconds)
        return code, launch.text


def wait_for(condition, seconds, what="it"):
    """Return what ``condition()`` returns once that is true; fail after ``seconds``."""
    found = launches.wait_for(condition, seconds)
    assert found, f"{what} did not happen within {seconds} s"
    return found


def errors_in(text):
    """Return the lines that a command ends with where something must be mended."""
    return [line for line in text.splitlines() if line.startswith("error:")]


def fill(path):
    """Write a file until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def losses(folder, name="loss"):
    """Return step -> figure, of the lines of the log that have it; empty before there is a log."""
    log = folder / "log.jsonl"
    lines = (
        [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if log.exists()
        else []
    )
    return {line["step"]: line[name] for line in lines if name in line}


def checkpoints(folder):
    """Return the steps of the checkpoints that are there, in order."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def tensors(folder, step):
    """Return "kind:name" -> array, of model, ema and optimizer."""
    return {
        f"{kind}:{name}": value
        for kind in ("model", "ema", "optimizer")
        for name, value in load_file(folder / f"checkpoint-{step}" / f"{kind}.safetensors").items()
    }


def assert_same(run, other, step, names=("loss", "mse", "vb")):
    """Two runs have the same logged figures and the same tensors at ``step``, bit for bit."""
    for name in names:
        assert losses(other, name) == losses(run, name), name
    expected, found = tensors(run, step), tensors(other, step)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
