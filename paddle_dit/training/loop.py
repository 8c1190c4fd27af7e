"""The custom training loop on ``paddle.distributed``."""

import json
import os
import platform
from pathlib import Path

import numpy as np
import paddle

from paddle_dit import __version__
from paddle_dit.checkpoint import (
    Checkpoint,
    load_weights,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from paddle_dit.data.loader import Batch, BatchLoader
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import CheckpointError, NonFiniteLossError, PaddleDiTError
from paddle_dit.models.dit import DiT
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.monitor import LOG, Monitor
from paddle_dit.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from paddle_dit.training.plan import Plan
from paddle_dit.training.ranks import Ranks
from paddle_dit.training.recipe import learning_rate_at
from paddle_dit.training.step import TrainingStep

_OF_ONE_COMMAND = ("config", "resume", "dry_run")  # options that say nothing of the run


class TrainingRun:
    """One run: model, optimizer, EMA and data, from the newest checkpoint to the last step."""

    def __init__(self, plan: Plan, ranks: Ranks):
        self.plan, self.ranks = plan, ranks
        recipe = plan.recipe
        paddle.seed(recipe.global_seed)
        self.model = DiT(plan.info.config, recompute_every=recipe.recompute)
        self.ranks.copy_from_main(self.model.parameters())
        self.optimizer = build_optimizer(recipe, self.model)
        self.ema = ExponentialMovingAverage(self.model, recipe.ema_decay)
        self.step = TrainingStep(
            self.model, GaussianDiffusion(), self.optimizer, self.ema, ranks, recipe.global_seed, recipe.accumulation
        )
        self.updates = 0  # made so far

    def train(self) -> None:
        """Train to the last step, saving and logging on the way."""
        recipe, total = self.plan.recipe, self.plan.total_steps
        self._prepare_folder()
        if self.updates >= total:
            self._say(f"already at step {self.updates:,} of {total:,}: nothing to do; raise --max-steps to go on")
            return
        monitor = Monitor(recipe.output_dir, total, self.updates, recipe.global_batch_size, self.ranks.is_main)
        loader = BatchLoader(
            self.plan.source,
            self.plan.order,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_step=self.updates,
            num_workers=recipe.num_workers,
        )
        window: list[dict] = []
        with monitor, loader:
            while self.updates < total:
                with self.ranks.together():
                    losses = self._backward(next(loader))
                self.optimizer.set_lr(learning_rate_at(recipe, self.updates, total))
                self.step.update()
                self.updates += 1
                window.append(losses)
                monitor.advance()
                if self.updates % recipe.log_every == 0 or self.updates == total:
                    monitor.record(self.updates, self._figures(window, monitor, total))
                    window = []
                if self.updates % recipe.ckpt_every == 0 or self.updates == total:
                    self.save()
                    monitor.restart_clock()

    def _backward(self, batch: Batch) -> dict:
        try:
            return self.step.backward(batch.step, batch.latents, batch.labels, batch.positions)
        except NonFiniteLossError as error:
            samples = ", ".join(map(str, self.plan.order.global_batch(batch.step)[error.positions][:8]))
            raise PaddleDiTError(
                f"{error}, samples {samples}; the weights are as before, and earlier checkpoints are whole: lower"
                " --learning-rate, or look at these samples"
            ) from error

    def _figures(self, window: list[dict], monitor: Monitor, total: int) -> dict[str, float]:
        """Return the window's mean losses over all ranks, the learning rate and the rate of images."""
        names = list(window[0])
        means = self.ranks.mean(float(sum(losses[name] for losses in window)) / len(window) for name in names)
        return {
            **dict(zip(names, map(float, means), strict=True)),
            "learning_rate": learning_rate_at(self.plan.recipe, self.updates - 1, total),
            "images_per_second": monitor.images_per_second(),
        }

    def save(self) -> None:
        """Write a checkpoint; every rank returns when it is whole."""
        with self.ranks.together():
            if self.ranks.is_main:
                tensors = {
                    "model": {name: value.numpy() for name, value in self.model.state_dict().items()},
                    "ema": {name: value.numpy() for name, value in self.ema.shadow.items()},
                    "optimizer": optimizer_tensors(self.optimizer, self.model),
                }
                save_checkpoint(self.plan.recipe.output_dir, self.updates, self.plan.info, tensors, self._state())

    def _state(self) -> dict:
        return {
            "step": self.updates,
            "images_seen": self.updates * self.plan.recipe.global_batch_size,
            "identity": self.plan.identity,
            "recipe": self.plan.recipe.to_dict(),
            "environment": {
                "ranks": self.ranks.world_size,
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "mkl_kernels": os.environ.get("MKL_DEBUG_CPU_TYPE"),  # other kernels round otherwise
                "paddle_dit": __version__,
                "paddle": paddle.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def _prepare_folder(self) -> None:
        """Continue from the newest whole checkpoint, or put an earlier run aside where that was asked for."""
        folder, step = self.plan.recipe.output_dir, -1
        with self.ranks.together():
            if self.ranks.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
                if not self.plan.recipe.resume:
                    _put_aside(folder)
                elif (newest := newest_checkpoint(folder)) is not None:
                    step = newest.step
        # One rank verifies, all load the same: hashing takes a while, and folders may look different from elsewhere.
        step = self.ranks.from_main(step)
        if step >= 0:
            with self.ranks.together():
                self.restore(Checkpoint(folder / f"checkpoint-{step}", step))
        self._say(self._greeting())

    def _say(self, line: str) -> None:
        if self.ranks.is_main:
            print(line, flush=True)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a verified checkpoint, and say what has changed since.

        Raises:
            CheckpointError: it belongs to another experiment, or this rank cannot see it.
        """
        if not checkpoint.folder.is_dir():
            raise CheckpointError(f"this rank does not see {checkpoint.folder}; put --output-dir where all ranks can")
        former = checkpoint.state
        for name, value in self.plan.identity.items():
            if former["identity"].get(name) != value:
                changed = _differences({name: former["identity"].get(name)}, {name: value})[0]
                raise CheckpointError(
                    f"{checkpoint.folder} is of another experiment: {changed}; keep the former value, or choose another"
                    " --output-dir, or start anew with --no-resume"
                )
        present = self._state()
        for group in ("recipe", "environment"):
            for changed in _differences(former[group], present[group]):
                if changed.split()[0] not in _OF_ONE_COMMAND:
                    self._say(f"changed since the checkpoint: {changed}")
        load_weights(self.model, checkpoint.tensors("model"), checkpoint.folder)
        shadow = checkpoint.tensors("ema")
        for name, tensor in self.ema.shadow.items():
            tensor.set_value(shadow[name])
        restore_optimizer(self.optimizer, self.model, checkpoint.tensors("optimizer"))
        self.updates = checkpoint.step

    def _greeting(self) -> str:
        config, recipe = self.plan.info.config, self.plan.recipe
        start = f"continuing after step {self.updates:,}" if self.updates else "starting at step 0"
        return (
            f"{recipe.model}: {config.num_parameters() / 1e6:.1f} M parameters, {len(self.plan.source):,} latents,"
            f" {config.num_classes} classes, batch {recipe.global_batch_size} on {self.ranks.world_size} rank(s),"
            f" {self.plan.total_steps:,} steps; {start}; writing to {recipe.output_dir}"
        )


def _differences(former: dict, present: dict) -> list[str]:
    """Return one line per value that differs, looking into nested values; lists and tuples are alike, as in JSON."""
    lines = []
    for name, value in json.loads(json.dumps(present)).items():
        before = former.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            lines += _differences(before, value)
        elif before != value:
            lines.append(f"{name} was {before}, now {value}")
    return lines


def _put_aside(folder: Path) -> None:
    """Move an earlier run's checkpoints and logs into ``previous-<n>/``: nothing is overwritten or deleted."""
    old = [path for path in folder.iterdir() if path.name.startswith("checkpoint-") or path.name in (LOG, "visualdl")]
    if not old:
        return
    number = next(n for n in range(1, 10**6) if not (folder / f"previous-{n}").exists())
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    print(f"moved the earlier run to {aside}")
