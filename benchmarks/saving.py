"""Seconds that training stands still for a checkpoint: saved at once, and in the background.

    python benchmarks/saving.py --model DiT-B/4

One real session on random latents saves in both ways in turn, so that drift of the machine hits both alike. "stands
still" is the time until the next step may begin, "whole" until the checkpoint is on the disk under its name. Written in
the background, a checkpoint shares the cores with the steps that are made meanwhile: "steps meanwhile" says how much
longer those take, and "in all" adds that to the standstill.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.data.store import StoreWriter
from paddle_dit.errors import entry_point

WAYS = {"at once": False, "in the background": True}


@dataclass
class Options:
    """What to save."""

    model: str = "DiT-B/4"
    """Preset, for 256-pixel images."""
    batch_size: int = 4
    """Samples of the steps around the saves."""
    rounds: int = 5
    """Checkpoints of each way, after one that is not counted."""
    output: Path | None = None
    """Folder on the disk to measure. Default: a temporary one."""


@dataclass
class Save:
    """Seconds of one checkpoint, and the ratio of a step's time meanwhile to its usual one."""

    still: float
    whole: float
    meanwhile: float

    def cost(self, step: float) -> float:
        """Return the seconds by which the run ends later, for a usual step of ``step`` seconds."""
        return self.still + (self.whole - self.still) * (1 - 1 / self.meanwhile)


def measure(session, rounds: int) -> tuple[dict[str, list[Save]], float]:
    """Save by turns within an open session; return the figures and the median seconds of an undisturbed step."""
    _timed(session)  # warms up
    usual = statistics.median(_timed(session) for _ in range(5))
    saves: dict[str, list[Save]] = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        for name, session.recipe.async_save in WAYS.items():
            found = _save(session, usual)
            if turn:
                saves[name].append(found)
    return saves, usual


def _save(session, usual: float) -> Save:
    start = time.perf_counter()
    session.save()
    still = time.perf_counter() - start
    steps = []
    while session.background.busy:
        steps.append(_timed(session))
    session.background.wait()
    whole = time.perf_counter() - start if steps else still
    _timed(session)
    return Save(still, whole, statistics.mean(steps) / usual if steps else 1.0)


def _timed(session) -> float:
    start = time.perf_counter()
    session.update(session.backward())
    return time.perf_counter() - start


def report(saves: dict[str, list[Save]], usual: float, mebibytes: float, model: str) -> Iterator[str]:
    """Yield the lines of the table, medians over the rounds."""
    yield f"{model}: {mebibytes:,.0f} MiB each, {usual:.2f} s a step"
    yield f"{'saved':<18} {'stands still':>13} {'ratio':>6} {'whole after':>12} {'steps meanwhile':>16} {'in all':>9}"
    first = statistics.median(save.still for save in saves["at once"])
    for name, found in saves.items():
        still, whole, meanwhile = (
            statistics.median(getattr(save, part) for save in found) for part in ("still", "whole", "meanwhile")
        )
        cost = statistics.median(save.cost(usual) for save in found)
        yield f"{name:<18} {still:>11.2f} s {still / first:>6.2f} {whole:>10.2f} s {meanwhile:>15.2f}x {cost:>7.2f} s"


@entry_point
def main() -> None:
    """Measure and print."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    from paddle_dit.training.plan import make_plan
    from paddle_dit.training.recipe import TrainRecipe
    from paddle_dit.training.session import start_session

    with tempfile.TemporaryDirectory(dir=options.output) as name:
        folder = Path(name)
        random = np.random.default_rng(0)
        with StoreWriter(folder / "latents", sample_shape=(4, 32, 32), dtype="float32", num_classes=1000) as store:
            store.append(random.standard_normal((64, 4, 32, 32), dtype=np.float32), np.arange(64))
        recipe = TrainRecipe(
            model=options.model,
            feature_path=folder / "latents",
            output_dir=folder / "run",
            global_batch_size=options.batch_size,
            image_logging_steps=-1,
            save_total_limit=1,
            visualdl=False,
            progress_bar=False,
            async_save=False,
        )
        found = []
        start_session(make_plan(recipe)).run(lambda session: found.extend(measure(session, options.rounds)))
        size = sum(path.stat().st_size for path in (folder / "run").glob("checkpoint-*/*")) / 2**20
        print("\n".join(report(*found, size, options.model)))


if __name__ == "__main__":
    main()
