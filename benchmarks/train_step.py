"""Time one training step (loss, backward, AdamW, EMA) in fp32 on this machine's CPU, beside PyTorch's.

    python benchmarks/train_step.py --models DiT-S/4 DiT-S/2 --peer-python ~/peers/bin/python --variants

Ours is the real TrainingStep; the peer is diffusers' DiTTransformer2DModel (peer_train_step.py). Both processes stay
alive and take turns, step by step, so that drift of the machine hits both alike. The ratio is the median over the
turns of the peer's seconds divided by ours: above 1 ours is faster. Trust it on an idle machine only: where other
processes compete for the cores, PyTorch loses several times more than we do.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field

from turns import FOLDER, Worker, peer_is_missing, serve

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.config import DiTConfig
from paddle_dit.errors import entry_point

SERVE, SHARES = "serve", "shares"


@dataclass
class Options:
    """What to time."""

    models: list[str] = field(default_factory=lambda: ["DiT-S/4"])
    """Presets."""
    batch_size: int = 16
    """Samples per step."""
    threads: int = 2
    """Threads of each process."""
    rounds: int = 10
    """Steps timed of each, after two untimed ones."""
    variants: bool = False
    """Also train the first model with recomputation, accumulation, two processes and tensor parallelism."""
    peer_python: str = sys.executable
    """Interpreter that has torch and diffusers (requirements/peers.txt)."""


class Framework:
    """A process that makes a training step whenever it is asked."""

    def __init__(self, name: str, command: list[str], threads: int):
        self._worker = Worker(name, command, {"OMP_NUM_THREADS": str(threads)})
        self.name, self.seconds, self.mebibytes = name, [], 0.0
        self.parameters = self._worker.hello()["parameters"]

    def step(self, *, timed: bool = True) -> None:
        """Have one step made, and keep its time unless it is a warm-up."""
        answer = self._worker.ask()
        self.mebibytes = answer["mebibytes"]
        self.seconds += [answer["seconds"]] if timed else []

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def measure(options: Options, model: str, with_peer: bool) -> None:
    """Print a line per framework for one model."""
    arguments = [model, str(options.batch_size)]
    workers = [Framework("paddle_dit", [sys.executable, __file__, SERVE, *arguments], options.threads)]
    if with_peer:
        peer = [options.peer_python, str(FOLDER / "peer_train_step.py"), *arguments]
        workers.append(Framework("diffusers (PyTorch)", peer, options.threads))
    for turn in range(-2, options.rounds):
        for worker in workers:
            worker.step(timed=turn >= 0)
    for worker in workers:
        worker.close()
        ratio = statistics.median(theirs / own for theirs, own in zip(worker.seconds, workers[0].seconds, strict=True))
        median, best = 1e3 * statistics.median(worker.seconds), 1e3 * min(worker.seconds)
        row = f"{model:<12} {worker.name:<20} {worker.parameters / 1e6:>8.1f} {median:>8.0f} {best:>8.0f}"
        print(f"{row} {worker.mebibytes:>9.0f} {ratio:>8.2f}", flush=True)


def make_ours(name: str, batch_size: int):
    """Return the real TrainingStep, and a function that makes a step with it."""
    runtime.prepare()
    import numpy as np

    from paddle_dit.diffusion.objective import GaussianDiffusion
    from paddle_dit.models.dit import DiT
    from paddle_dit.training.data_parallel import DataParallel
    from paddle_dit.training.ema import ExponentialMovingAverage
    from paddle_dit.training.optimizer import build_optimizer
    from paddle_dit.training.recipe import TrainRecipe
    from paddle_dit.training.step import TrainingStep

    config = DiTConfig.from_preset(name)
    model = DiT(config)
    optimizer, ema = build_optimizer(TrainRecipe(), model), ExponentialMovingAverage(model)
    training_step = TrainingStep(model, GaussianDiffusion(), optimizer, ema, DataParallel(), seed=0)
    latents = np.random.default_rng(0).standard_normal((batch_size, *config.sample_shape), dtype=np.float32)
    labels = np.arange(batch_size) % config.num_classes

    def step() -> None:
        losses = training_step.backward(0, latents, labels, np.arange(batch_size))
        training_step.update(0)
        float(losses["loss"])

    return training_step, step


@entry_point
def main() -> None:
    """Print the table."""
    options = parse(Options, description=__doc__)
    for model in options.models:
        DiTConfig.from_preset(model)
    if missing := peer_is_missing(options.peer_python):
        print(f"ours alone, the peer cannot run: {missing}")
    print(f"{'model':<12} {'framework':<20} {'M params':>8} {'ms':>8} {'best ms':>8} {'peak MiB':>9} {'ratio':>8}")
    for model in options.models:
        measure(options, model, with_peer=missing is None)
    print(
        f"batch {options.batch_size}, fp32, {options.threads} threads of {os.cpu_count()} cores, "
        f"{options.rounds} rounds; load average {os.getloadavg()[0]:.1f}"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    shares = [sys.executable, __file__, SHARES, options.models[0], str(options.batch_size)]
    subprocess.run(shares, env=environment, check=True)
    if options.variants:
        from train_variants import print_variants

        print_variants(options.models[0], options.batch_size, options.threads, rounds=3)


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        from peer_train_step import timed

        training_step, step = make_ours(sys.argv[2], int(sys.argv[3]))
        parameters = sum(weight.size for weight in training_step.model.parameters())
        serve(lambda: (timed(step), {"parameters": parameters}))
    elif sys.argv[1:2] == [SHARES]:
        from train_variants import print_shares

        print_shares(*make_ours(sys.argv[2], int(sys.argv[3])))
    else:
        main()
