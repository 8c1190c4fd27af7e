"""A session's way to its checkpoints and back: what is kept, what is checked before a run is continued."""

import contextlib
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle

from paddle_dit import __version__
from paddle_dit.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    keep_newest,
    load_weights,
    newest_checkpoint,
    open_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from paddle_dit.errors import CheckpointError
from paddle_dit.training.monitor import LOG
from paddle_dit.training.optimizer import optimizer_tensors, restore_optimizer
from paddle_dit.training.recipe import PLANNING, TrainRecipe

if TYPE_CHECKING:
    from paddle_dit.training.session import Session

_OF_THE_COMMAND = ("config", "resume", "resume_from_checkpoint", *PLANNING)  # no part of the run


def save(session: "Session") -> None:
    """Write a checkpoint of the session; every rank returns when it is whole.

    Raises:
        CheckpointError: it could not be written; earlier ones are untouched.
    """
    step, full = session.step, session.parallel.full
    tensors = {
        "model": {name: full(name, tensor) for name, tensor in session.parallel.weights(step.model, step.optimizer)},
        "ema": {name: full(name, tensor) for name, tensor in session.ema.whole()},
        "optimizer": session.parallel.merged(optimizer_tensors(step.optimizer, step.model, full)),
    }
    with session.ranks.together():
        if session.ranks.is_main:
            folder, info = session.recipe.output_dir, session.plan.info
            save_checkpoint(folder, session.updates, info, tensors, _state(session))
            if session.recipe.save_total_limit is not None:
                keep_newest(folder, session.recipe.save_total_limit)


def _state(session: "Session") -> dict:
    recipe, scaler = session.recipe, session.step.scaler
    return {
        "step": session.updates,
        "skipped_steps": session.skipped,
        "overflows": session.step.overflows,
        "loss_scaler": scaler.state() if scaler else None,
        "images_seen": session.updates * recipe.global_batch_size,
        "identity": session.plan.identity,
        "recipe": recipe.to_dict(),
        "environment": {
            "ranks": session.ranks.world_size,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "mkl_kernels": os.environ.get("MKL_DEBUG_CPU_TYPE"),  # other kernels round otherwise
            "paddle_dit": __version__,
            "paddle": paddle.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def open_run(session: "Session") -> None:
    """Continue from the newest whole checkpoint, or put an earlier run aside where that was asked for.

    Raises:
        CheckpointError: no checkpoint is whole, or it is of another experiment.
    """
    recipe, ranks, folder = session.recipe, session.ranks, session.recipe.output_dir
    step, here = -1, True
    with ranks.together():
        if ranks.is_main:
            found = _find(recipe)
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            if not recipe.resume:
                _put_aside(folder)
            if found is not None:
                step, here = found.step, found.folder.parent == folder
    # One rank verifies, all load the same: hashing takes a while, and folders may look different from elsewhere.
    step, here = ranks.from_main(step), bool(ranks.from_main(int(here)))
    if step >= 0:
        source = folder / f"checkpoint-{step}" if here else recipe.resume_from_checkpoint
        with ranks.together():
            _restore(session, Checkpoint(source, step))
            if ranks.is_main:
                _put_aside(folder, after=step)
    session.say(_greeting(session))


def _find(recipe: TrainRecipe) -> Checkpoint | None:
    """Return the checkpoint to continue from: the newest whole one, unless another was named.

    One that continues from the named one by the same command comes before it, so that a restart loses nothing.
    """
    named = recipe.resume_from_checkpoint
    if not recipe.resume:
        return None
    if named is None:
        return newest_checkpoint(recipe.output_dir)
    chosen = open_checkpoint(named)
    with contextlib.suppress(CheckpointError):
        newest = newest_checkpoint(recipe.output_dir, report=lambda line: None)
        if newest and newest.step > chosen.step and newest.state["recipe"].get("resume_from_checkpoint") == str(named):
            return newest
    return chosen


def _restore(session: "Session", checkpoint: Checkpoint) -> None:
    """Take over the state of a verified checkpoint, and say what has changed since.

    Raises:
        CheckpointError: it belongs to another experiment, or this rank cannot see it.
    """
    if not checkpoint.folder.is_dir():
        raise CheckpointError(f"this rank does not see {checkpoint.folder}; put --output-dir where all ranks can")
    former, identity = checkpoint.state, session.plan.identity
    for name in {**former["identity"], **identity}:
        before, value = former["identity"].get(name), identity.get(name)
        if before != value:
            changed = _differences({name: before}, {name: value})[0]
            raise CheckpointError(
                f"{checkpoint.folder} is of another experiment: {changed}; keep the former value, or choose another"
                " --output-dir, or start anew with --no-resume"
            )
    present = _state(session)
    for group in ("recipe", "environment"):
        for changed in _differences(former[group], present[group]):
            if changed.split()[0] not in _OF_THE_COMMAND:
                session.say(f"changed since the checkpoint: {changed}")

    def arranged(kind: str) -> dict[str, np.ndarray]:
        tensors = checkpoint.tensors(kind)
        return {name: session.parallel.arranged(name, array) for name, array in tensors.items()}

    load_weights(session.model, arranged("model"), checkpoint.folder)
    session.ema.restore(arranged("ema"))
    restore_optimizer(session.optimizer, session.model, arranged("optimizer"))
    if session.step.scaler and former.get("loss_scaler"):
        session.step.scaler.restore(former["loss_scaler"])
    session.updates, session.skipped = checkpoint.step, former.get("skipped_steps", 0)
    session.step.overflows = former.get("overflows", 0)


def _greeting(session: "Session") -> str:
    plan, recipe, config = session.plan, session.recipe, session.plan.info.config
    start = f"continuing after step {session.updates:,}" if session.updates else "starting at step 0"
    return (
        f"{recipe.model}: {config.num_parameters() / 1e6:.1f} M parameters, {len(plan.source):,} latents,"
        f" {config.num_classes} classes, batch {recipe.global_batch_size} on {session.ranks.world_size} rank(s),"
        f" {plan.total_steps:,} steps; {start}; writing to {recipe.output_dir}"
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


def _put_aside(folder: Path, after: int | None = None) -> None:
    """Move an earlier run, or its checkpoints after a step, into ``previous-<n>/``: nothing is lost."""
    if after is None:
        logs = [folder / LOG, folder / "visualdl", folder / "samples"]
        old = [*checkpoint_folders(folder), *(path for path in logs if path.exists())]
    else:
        old = [path for path in checkpoint_folders(folder) if int(path.name.split("-")[1]) > after]
    if not old:
        return
    number = next(n for n in range(1, 10**6) if not (folder / f"previous-{n}").exists())
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    print(f"moved {'the earlier run' if after is None else 'later checkpoints'} to {aside}")
