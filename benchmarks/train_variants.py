"""The rows that ``train_step.py --variants`` adds: the same training in other ways, and where a step's time goes.

Every row is a real run of train.py on random latents, so that reading, averaging over processes and logging count. The
rows take turns, and each figure is the median over the turns. Equal losses show that the ways compute the same.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {  # name -> (processes, flags)
    "plain": (1, []),
    "recompute every block": (1, ["--recompute", "1"]),
    "recompute every 2nd": (1, ["--recompute", "2"]),
    "accumulation 4": (1, ["--accumulation", "4"]),
    "2 processes": (2, []),
    "tensor parallel 2": (2, ["--tensor-parallel-degree", "2"]),
}
STEPS, SKIPPED = 8, 2  # of each run; the first steps warm up


def print_variants(model: str, batch_size: int, threads: int, rounds: int) -> None:
    """Print the table of variants and the shares of a step."""
    figures: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        _write_latents(Path(folder) / "latents", model, STEPS * batch_size)
        for turn in range(rounds):
            for name, (processes, flags) in VARIANTS.items():
                command = [*_launched(processes, Path(folder)), str(ROOT / "train.py"), "--model", model, *flags]
                command += ["--feature-path", f"{folder}/latents", "--output-dir", f"{folder}/{turn}-{name}"]
                command += ["--global-batch-size", str(batch_size), "--max-steps", str(STEPS), "--log-every", "1"]
                figures[name].append(_run(command, max(1, threads // processes), Path(folder) / f"{turn}-{name}"))
    print(f"\n{'variant of ' + model:<28} {'loss':>8} {'images/s':>9} {'ratio':>6} {'tensors MiB':>12}")
    rates = {name: statistics.median(run["images_per_second"] for run in runs) for name, runs in figures.items()}
    for name, runs in figures.items():
        memory, loss = runs[0]["peak_memory_mib"], runs[0]["loss"]
        print(f"{name:<28} {loss:>8.4f} {rates[name]:>9.2f} {rates[name] / rates['plain']:>6.2f} {memory:>12,.0f}")
    print(f"batch {batch_size}, {STEPS - SKIPPED} steps, {rounds} rounds; tensors: peak of one process")


def _write_latents(folder: Path, model: str, samples: int) -> None:
    from paddle_dit.config import DiTConfig
    from paddle_dit.data.store import StoreWriter

    config = DiTConfig.from_preset(model)
    random = np.random.default_rng(0)
    with StoreWriter(folder, sample_shape=config.sample_shape, dtype="float32", num_classes=1000) as store:
        latents = random.standard_normal((samples, *config.sample_shape), dtype=np.float32)
        store.append(latents, random.integers(0, 1000, samples))


def _launched(processes: int, folder: Path) -> list[str]:
    if processes == 1:
        return [sys.executable]
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, "--log_dir", str(folder / "launch_log")]


def _run(command: list[str], threads: int, output: Path) -> dict:
    # The launcher itself sets one thread a process.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rate = statistics.median(line["images_per_second"] for line in lines[SKIPPED:])
    return {**lines[-1], "images_per_second": rate}


def print_shares(training_step, make_step, steps: int = 5) -> None:
    """Print which part of a step the optimizer and the averaged weights take.

    Args:
        training_step: a TrainingStep.
        make_step: makes a whole step of it.
        steps: how many are timed, after one untimed.
    """
    seconds = {"optimizer": 0.0, "averaged weights": 0.0}
    make_step()
    training_step.optimizer.step = _timed(training_step.optimizer.step, seconds, "optimizer")
    training_step.ema.update = _timed(training_step.ema.update, seconds, "averaged weights")
    start = time.perf_counter()
    for _ in range(steps):
        make_step()
    whole = time.perf_counter() - start
    shares = ", ".join(f"{name} {1e3 * part / steps:.0f} ms ({part / whole:.1%})" for name, part in seconds.items())
    print(f"of a step of {1e3 * whole / steps:.0f} ms: {shares}")


def _timed(function, seconds: dict[str, float], name: str):
    def timed(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] += time.perf_counter() - start
        return result

    return timed
