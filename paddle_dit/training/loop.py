"""The custom training loop on ``paddle.distributed``."""

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
from paddle_dit.data.loader import BatchLoader
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import CheckpointError
from paddle_dit.models.dit import DiT
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.monitor import LOG, Monitor
from paddle_dit.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from paddle_dit.training.parallel import Ranks
from paddle_dit.training.plan import Plan
from paddle_dit.training.recipe import learning_rate_at
from paddle_dit.training.step import TrainingStep


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
        recipe = self.plan.recipe
        self._prepare_folder()
        total = self.plan.total_steps
        monitor = Monitor(recipe.output_dir, total, self.updates, recipe.global_batch_size, self.ranks.is_main)
        monitor.say(self._greeting())
        loader = BatchLoader(
            self.plan.source,
            self.plan.order,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_step=self.updates,
            num_workers=recipe.num_workers,
        )
        window: list[dict] = []
        with loader:
            while self.updates < total:
                window.append(self._update(next(loader), total))
                monitor.advance()
                if self.updates % recipe.log_every == 0 or self.updates == total:
                    monitor.record(self.updates, self._figures(window, monitor, total))
                    window = []
                if self.updates % recipe.ckpt_every == 0 or self.updates == total:
                    self.save()
        monitor.close()

    def _update(self, batch, total: int) -> dict:
        self.optimizer.set_lr(learning_rate_at(self.plan.recipe, batch.step, total))
        losses = self.step(batch.step, batch.latents, batch.labels, batch.positions)
        self.updates += 1
        return losses

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
        if self.ranks.is_main:
            tensors = {
                "model": {name: value.numpy() for name, value in self.model.state_dict().items()},
                "ema": {name: value.numpy() for name, value in self.ema.shadow.items()},
                "optimizer": optimizer_tensors(self.optimizer, self.model),
            }
            save_checkpoint(self.plan.recipe.output_dir, self.updates, self.plan.info, tensors, self._state())
        self.ranks.barrier()

    def _state(self) -> dict:
        return {
            "step": self.updates,
            "images_seen": self.updates * self.plan.recipe.global_batch_size,
            "identity": self.plan.identity,
            "recipe": self.plan.recipe.to_dict(),
            "environment": {
                "ranks": self.ranks.world_size,
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "paddle_dit": __version__,
                "paddle": paddle.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def _prepare_folder(self) -> None:
        """Continue from the newest whole checkpoint, or put an earlier run aside where that was asked for."""
        folder = self.plan.recipe.output_dir
        if self.ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            if not self.plan.recipe.resume:
                _put_aside(folder)
        self.ranks.barrier()
        if self.plan.recipe.resume:
            checkpoint = newest_checkpoint(folder, report=print if self.ranks.is_main else lambda line: None)
            if checkpoint is not None:
                self.restore(checkpoint)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint.

        Raises:
            CheckpointError: it belongs to another experiment.
        """
        identity = checkpoint.state["identity"]
        for name, value in self.plan.identity.items():
            if identity.get(name) != value:
                raise CheckpointError(
                    f"{checkpoint.folder} is of another experiment: {_difference(name, identity.get(name), value)};"
                    " keep the former value, or choose another --output-dir, or start anew with --no-resume"
                )
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


def _difference(name: str, former, present) -> str:
    if isinstance(former, dict) and isinstance(present, dict):
        name, former, present = next(
            (key, former.get(key), value) for key, value in present.items() if former.get(key) != value
        )
    return f"{name} was {former}, now {present}"


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
