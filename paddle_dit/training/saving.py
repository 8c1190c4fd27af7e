"""A session's way to its checkpoints and back: what is kept, what is checked before a run is continued."""

import contextlib
import functools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paddle_dit.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    load_weights,
    newest_checkpoint,
    open_checkpoint,
    remove_leftovers,
    remove_old,
    save_checkpoint,
    step_of,
)
from paddle_dit.errors import CheckpointError
from paddle_dit.files import PARTIAL, flush_to_disk
from paddle_dit.folder_lock import FolderLock
from paddle_dit.runtime import environment
from paddle_dit.training.frozen import count_trained
from paddle_dit.training.initial_weights import fingerprint_of
from paddle_dit.training.monitor import LOG, read_log
from paddle_dit.training.optimizer import optimizer_tensors, restore_optimizer
from paddle_dit.training.recipe import PLANNING
from paddle_dit.training.sampling_preview import FOLDER as SAMPLES
from paddle_dit.training.sampling_preview import picture_of

if TYPE_CHECKING:
    from paddle_dit.training.session import Session

_OF_THE_COMMAND = ("config", "resume", "resume_from_checkpoint", "allow_changes", *PLANNING)  # no part of the run
_KEEP = "keep the former value, choose another --output-dir, start anew with --no-resume, or go on with --allow-changes"


def save(session: "Session") -> None:
    """Save a checkpoint of the session; every rank returns when it is whole, or with ``async_save`` on its way.

    Raises:
        CheckpointError: it, or the one before it in the background, could not be written; earlier ones are untouched.
    """
    recipe, step, full = session.recipe, session.step, session.parallel.full
    finished = session.background.waiting
    session.ranks.wait_for_main(finished())  # before anything is copied, so that memory never holds two checkpoints
    tensors = {
        "model": {name: full(name, tensor) for name, tensor in session.parallel.weights(step.model, step.optimizer)},
        "ema": {name: full(name, tensor) for name, tensor in session.ema.whole()},
        "optimizer": session.parallel.merged(optimizer_tensors(step.optimizer, step.model, full)),
    }
    state = _state(session) | {"window": session.window.state()}
    if session.ranks.is_main:
        if recipe.async_save:  # the next step changes the weights while these are being written
            for found in tensors.values():
                found.update({name: _own(array) for name, array in found.items()})
        # A launcher gives a run that it stops half a minute: old checkpoints can go another time.
        limit = None if session.stopping else recipe.save_total_limit
        session.background.do(functools.partial(_write, session, tensors, state, limit))
    if not recipe.async_save:
        session.ranks.wait_for_main(finished())
    session.saved = session.updates


def _own(array: np.ndarray) -> np.ndarray:
    """Return an array with memory of its own: those of CPU tensors share theirs."""
    return array if array.flags.owndata else array.copy()


def _write(session: "Session", tensors: dict[str, dict], state: dict, limit: int | None) -> None:
    """Write what is of this step, while the session may be at a later one."""
    folder = session.recipe.output_dir
    session.lock.keep()
    if (folder / LOG).exists():  # its lines up to this step must outlast a power cut as the checkpoint does
        flush_to_disk(folder / LOG)
    checkpoint = save_checkpoint(folder, state["step"], session.plan.info, tensors, state)
    if limit is not None:
        remove_old(checkpoint, limit, session.recipe.keep_every, session.say)


def _state(session: "Session") -> dict:
    recipe, scaler = session.recipe, session.step.scaler
    return {
        "step": session.updates,
        "skipped_steps": session.skipped,
        "undone": list(session.duties.undone),
        "overflows": session.step.overflows,
        "loss_scaler": scaler.state() if scaler else None,
        "images_seen": session.updates * recipe.global_batch_size,
        "identity": session.plan.identity,
        "recipe": recipe.to_dict(),
        "environment": {"ranks": session.ranks.world_size, **environment()},
    }


def open_run(session: "Session", opened: contextlib.ExitStack) -> FolderLock | None:
    """Continue from the newest whole checkpoint, or put an earlier run aside where that was asked for.

    Args:
        session: has nothing to continue from yet.
        opened: gets what must be closed at the end of the run: the output folder's lock.

    Returns:
        the lock, on the main rank.

    Raises:
        CheckpointError: no checkpoint is whole, or it is of another experiment.
        ConfigError: another run is writing into the folder.
    """
    recipe, ranks, folder = session.recipe, session.ranks, session.recipe.output_dir
    taken: list[tuple[FolderLock, Checkpoint | None]] = []
    # One rank verifies, all load the same: hashing takes a while, and folders may look different from elsewhere.
    if ranks.is_main:
        session.background.do(lambda: taken.append(_take(session, opened)))
    ranks.wait_for_main(session.background.waiting())
    lock, found = taken[0] if taken else (None, None)
    step = ranks.from_main(-1 if found is None else found.step)
    here = bool(ranks.from_main(int(found is not None and found.folder.resolve().parent == folder.resolve())))
    if step >= 0:
        source = folder / f"checkpoint-{step}" if here else recipe.resume_from_checkpoint
        with ranks.together():
            _restore(session, Checkpoint(source, step))
            if ranks.is_main:
                _put_aside(folder, after=step if here else step - 1)
        session.saved = step if here else 0
    _begin(session, step >= 0)
    session.say(_greeting(session))
    return lock


def _begin(session: "Session", continued: bool) -> None:
    """Take over the weights of ``--init-from``, unless a run is continued, and say what became of it."""
    initial, ranks = session.plan.initial, session.ranks
    if initial is None:
        return
    if continued:
        session.say(
            f"{initial.name} is not read: the run goes on from its checkpoint; for a new run name another folder"
        )
        return
    with ranks.together():
        whole = initial.take()
        fingerprint = fingerprint_of(whole)
        tensors = {name: session.parallel.arranged(name, array) for name, array in whole.items()}
        load_weights(session.model, tensors, initial.name)
        session.ema.restore(tensors)
    mains = ranks.from_main(fingerprint)
    with ranks.together():
        if fingerprint != mains:
            raise CheckpointError(f"this rank reads other weights from {initial.name} than rank 0; give all the same")
    for note in initial.notes:
        session.say(note)


def _take(session: "Session", opened: contextlib.ExitStack) -> tuple[FolderLock, Checkpoint | None]:
    """Lock the output folder, find what to continue from and clean up."""
    folder = session.recipe.output_dir

    def lock() -> FolderLock:
        folder.mkdir(parents=True, exist_ok=True)
        flush_to_disk(folder.parent)
        held = FolderLock(folder, "--output-dir", session.say)
        opened.callback(held.release)
        return held

    held = lock() if folder.is_dir() else None  # or once the checkpoint that was named has been found good
    found = _find(session)
    held = held or lock()
    _clean(folder)
    if not session.recipe.resume:
        _put_aside(folder)
    return held, found


def _clean(folder: Path) -> None:
    """Delete what a killed run left half written."""
    remove_leftovers(folder)
    for path in [folder / f"{LOG}{PARTIAL}", *(folder / SAMPLES).glob(f"*.png{PARTIAL}")]:
        path.unlink(missing_ok=True)


def _find(session: "Session") -> Checkpoint | None:
    """Return the checkpoint to continue from: the newest whole one, unless another was named.

    One that this same command has made since comes before the named one, so that a restart loses nothing, also where
    --save-total-limit has deleted the named one.
    """
    recipe, check = session.recipe, functools.partial(_check_model, session)
    named = recipe.resume_from_checkpoint
    if not recipe.resume:
        return None
    if named is None:
        return newest_checkpoint(recipe.output_dir, session.say, check)
    for folder in checkpoint_folders(recipe.output_dir):
        try:
            state = _state_of(Checkpoint(folder, step_of(folder)))
            if state["recipe"].get("resume_from_checkpoint") == str(named):
                newest = open_checkpoint(folder)
                check(newest)
                return newest
        except CheckpointError as error:
            session.say(f"skipped a checkpoint: {error}")
    chosen = open_checkpoint(named)
    check(chosen)
    return chosen


def _state_of(checkpoint: Checkpoint) -> dict:
    state = checkpoint.state
    for name in ("identity", "recipe", "environment"):
        if not isinstance(state.get(name), dict):
            raise CheckpointError(
                f"{checkpoint.folder} holds no state of a training run: its state.json lacks '{name}'"
            )
    return state


def _check_model(session: "Session", checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of another model, unless changes are allowed: then its weights decide."""
    former = _state_of(checkpoint)["identity"].get("model")
    changed = _differences({"model": former}, {"model": session.plan.identity["model"]})
    if changed and not session.recipe.allow_changes:
        raise CheckpointError(f"{checkpoint.folder} is of another model: {changed[0]}; {_KEEP}")


def _restore(session: "Session", checkpoint: Checkpoint) -> None:
    """Take over the state of a verified checkpoint, and say what has changed since.

    Raises:
        CheckpointError: it belongs to another experiment, or this rank cannot see it.
    """
    if not checkpoint.folder.is_dir():
        raise CheckpointError(f"this rank does not see {checkpoint.folder}; put --output-dir where all ranks can")
    former, present = _state_of(checkpoint), _state(session)
    changed = _differences(former["identity"], present["identity"])
    if changed and not session.recipe.allow_changes:
        raise CheckpointError(f"{checkpoint.folder} is of another experiment: {changed[0]}; {_KEEP}")
    for group in ("identity", "recipe", "environment"):
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
    made = _made(session.recipe.output_dir, checkpoint.step)
    session.duties.undone = [duty for duty in former.get("undone", []) if duty not in made]
    session.window.restore(former.get("window", {"steps": 0, "sums": {}}))


def _made(folder: Path, step: int) -> set[str]:
    """Return which duties were done after ``step``: a process may have done them and ended before the next save."""
    lines, figures = read_log(folder, step), {"evaluate": "eval_loss", "measure": "eval_inception_score"}
    made = {duty for duty, figure in figures.items() if any(figure in line for line in lines)}
    return made | ({"draw"} if (folder / SAMPLES / picture_of(step)).exists() else set())


def _greeting(session: "Session") -> str:
    plan, recipe, config = session.plan, session.recipe, session.plan.info.config
    start = f"continuing after step {session.updates:,}" if session.updates else "starting at step 0"
    images = plan.images
    kind = "latents" if images is None else f"images of {images.image_size} pixels encoded by {images.vae.name}"
    trained, of = count_trained(config, recipe.train_only)
    only = f", {trained:,} of {of:,} train" if trained < of else ""
    return (
        f"{recipe.model or recipe.init_from}: {config.num_parameters() / 1e6:.1f} M parameters{only},"
        f" {len(plan.source):,} {kind},"
        f" {config.num_classes} classes, batch {recipe.global_batch_size} on {session.ranks.world_size} rank(s),"
        f" {plan.total_steps:,} steps; {start}; writing to {recipe.output_dir}"
    )


def _differences(former: dict, present: dict) -> list[str]:
    """Return one line per value that differs, looking into nested values; lists and tuples are alike, as in JSON."""
    lines = []
    present = json.loads(json.dumps(present))
    for name in {**present, **former}:
        before, value = former.get(name), present.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            lines += _differences(before, value)
        elif before != value:
            lines.append(f"{name} was {before}, now {value}")
    return lines


def _put_aside(folder: Path, after: int | None = None) -> None:
    """Move an earlier run, or its checkpoints after a step, into ``previous-<n>/``: nothing is lost."""
    if after is None:
        logs = [folder / LOG, folder / "visualdl", folder / SAMPLES]
        old = [*checkpoint_folders(folder), *(path for path in logs if path.exists())]
    else:
        old = [path for path in checkpoint_folders(folder) if step_of(path) > after]
    if not old:
        return
    number = next(n for n in range(1, 10**6) if not (folder / f"previous-{n}").exists())
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    if after is not None and (folder / LOG).exists():  # it loses its later lines
        shutil.copy2(folder / LOG, aside / LOG)
    print(f"moved {'the earlier run' if after is None else 'later checkpoints'} to {aside}")
