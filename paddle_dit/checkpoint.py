"""Checkpoints that are whole or absent: ``checkpoint-<step>/`` folders of safetensors and JSON.

A checkpoint is written into a folder beside its final name. Every file is flushed to the disk, ``manifest.json``, which
names the size and hash of all others, comes last, and a single rename makes the folder visible. A process that dies at
any moment leaves either the whole checkpoint or a leftover that nobody takes for one.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from paddle_dit.config import ModelInfo
from paddle_dit.errors import CheckpointError, ConfigError
from paddle_dit.files import describe, flush_to_disk, read_json, sha256, write_json

FORMAT_VERSION = 1
MANIFEST, INFO, STATE = "manifest.json", "config.json", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.tmp")
_RESTORE = "restore it from a copy"
_HEADERS = 2**20  # ample for what a checkpoint holds besides numbers


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    step: int

    @property
    def info(self) -> ModelInfo:
        """The model's configuration, label names and VAE."""
        return read_info(self.folder / INFO)

    @property
    def state(self) -> dict:
        """Counters, recipe and versions; CheckpointError where they cannot be read."""
        return read_json(self.folder / STATE, CheckpointError)

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Return the tensors of ``model``, ``ema`` or ``optimizer`` by structured name, or raise CheckpointError."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"{self.folder} holds no {path.name}")
        try:
            return load_file(path)
        except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the latter two: no number of NumPy's
            raise CheckpointError(f"{path} cannot be read ({error}); it was not written by this program") from None


def save_checkpoint(run_folder: Path, step: int, info: ModelInfo, tensors: dict[str, dict], state: dict) -> Checkpoint:
    """Write ``run_folder/checkpoint-<step>`` and return it.

    Args:
        run_folder: the run's output folder.
        step: updates made so far.
        info: travels with the weights.
        tensors: file stem ("model", "ema", "optimizer") -> structured name -> float array.
        state: JSON values.

    Raises:
        CheckpointError: it could not be written; nothing of it is left, and earlier checkpoints are untouched.
    """
    final = run_folder / f"checkpoint-{step}"
    partial = run_folder / f".checkpoint-{step}.tmp"
    _delete(partial)
    try:
        _check_space(run_folder, tensors)
        _write(partial, step, info, tensors, state)
        replaced = run_folder / f"checkpoint-{step}.replaced"
        if os.path.lexists(final):  # whatever is in the way, it goes when the new one is there
            _delete(replaced)
            os.rename(final, replaced)
        os.rename(partial, final)
        flush_to_disk(run_folder)
        _delete(replaced)
    except (OSError, SafetensorError) as error:
        _delete(partial)
        raise CheckpointError(
            f"cannot write {final}: {error}; earlier checkpoints are whole: free some space or mend the folder, "
            "then run the same command again"
        ) from error
    return Checkpoint(final, step)


def _check_space(run_folder: Path, tensors: dict[str, dict]) -> None:
    run_folder.mkdir(parents=True, exist_ok=True)  # it may have been moved away while the run went on
    needed = sum(value.nbytes for values in tensors.values() for value in values.values()) + _HEADERS
    free = shutil.disk_usage(run_folder).free
    if free < needed:
        raise OSError(f"it takes {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there")


def _write(partial: Path, step: int, info: ModelInfo, tensors: dict[str, dict], state: dict) -> None:
    partial.mkdir(parents=True)
    info.save(partial / INFO)
    write_json(partial / STATE, state)
    for stem, values in tensors.items():
        save_file(
            {name: np.ascontiguousarray(value) for name, value in values.items()}, partial / f"{stem}.safetensors"
        )
    entries = {path.name: describe(path) for path in sorted(partial.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": entries}
    write_json(partial / MANIFEST, manifest)
    for path in [*partial.iterdir(), partial]:
        flush_to_disk(path)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Verify a checkpoint folder against its manifest and return it.

    Raises:
        CheckpointError: a file is missing, of another size or of another hash, or the folder is no checkpoint.
    """
    folder = Path(folder)
    step, files = _read_manifest(folder)
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} is of step {step}; delete the folder or {_RESTORE}")
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            whole = path.stat().st_size == size and sha256(path) == digest
        except OSError as error:
            lost = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise CheckpointError(f"{folder} is damaged: {name} {lost}; delete the folder or {_RESTORE}") from None
        if not whole:
            raise CheckpointError(f"{folder} is damaged: {name} has changed; delete the folder or {_RESTORE}")
    for name in (INFO, STATE, "model.safetensors"):
        if name not in files:
            raise CheckpointError(f"{folder} is incomplete: {name} is not in its manifest")
    return Checkpoint(folder, step)


def _read_manifest(folder: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Return the step, and of every file its size and hash."""
    try:
        manifest = read_json(folder / MANIFEST, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error}; delete the folder or {_RESTORE}") from None
    version, step, files = manifest.get("format_version"), manifest.get("step"), manifest.get("files")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has checkpoint format {version!r}, this program reads {FORMAT_VERSION}")
    good = type(step) is int and step >= 0 and isinstance(files, dict)
    if not good or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise CheckpointError(f"{folder / MANIFEST} is damaged; delete the folder or {_RESTORE}")
    return step, {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def _is_entry(name: str, entry: object) -> bool:
    """Whether a manifest may say this of a file; its name must not lead out of the folder."""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or not isinstance(entry, dict):
        return False
    return type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def newest_checkpoint(
    run_folder: str | Path,
    report: Callable[[str], None] = print,
    check: Callable[[Checkpoint], object] = lambda checkpoint: None,
) -> Checkpoint | None:
    """Return the newest checkpoint of a run that is whole, or None where there is none at all.

    Args:
        run_folder: holds ``checkpoint-<step>`` folders.
        report: is told, in one line each, which others were passed over, and why.
        check: raises CheckpointError for a whole one that is no use.

    Raises:
        CheckpointError: there are checkpoints and none is good.
    """
    run_folder, reasons = Path(run_folder), []
    for folder in checkpoint_folders(run_folder):
        try:
            checkpoint = open_checkpoint(folder)
            check(checkpoint)
            return checkpoint
        except CheckpointError as error:
            report(f"skipped a checkpoint: {error}")
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints in {run_folder} can be used; the newest: {reasons[0]}; restore one"
            " from a copy, or start anew with --no-resume"
        )
    return None


def find_checkpoint(path: str | Path) -> Checkpoint:
    """Return the checkpoint that ``path`` is, or the newest whole one of the run that ``path`` is.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no such checkpoint or run folder: {path}")
    if (path / MANIFEST).exists() or _NAME.fullmatch(path.name):
        return open_checkpoint(path)
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no checkpoint-<step> folder; give a checkpoint or a run's output folder")
    return checkpoint


def remove_leftovers(run_folder: Path) -> None:
    """Delete what an interrupted save left behind."""
    for path in run_folder.glob(".checkpoint-*"):
        if _LEFTOVER.fullmatch(path.name):
            _delete(path)


def remove_old(
    newest: Checkpoint, limit: int, keep_every: int | None = None, report: Callable[[str], None] = print
) -> None:
    """Delete the checkpoints beside ``newest`` but the newest ``limit``, once it has been verified.

    Args:
        newest: counts among those kept.
        limit: 1 or more.
        keep_every: those of steps divisible by this are kept besides.
        report: is told, in one line each, which could not be deleted.

    Raises:
        CheckpointError: ``newest`` is not whole; nothing has been deleted.
    """
    old = [
        folder
        for folder in checkpoint_folders(newest.folder.parent)[limit:]
        if folder != newest.folder and not (keep_every and step_of(folder) % keep_every == 0)
    ]
    if old:
        open_checkpoint(newest.folder)
    for folder in old:  # each vanishes at once, or becomes a leftover
        leftover = folder.with_name(f".{folder.name}.tmp")
        try:
            os.rename(folder, leftover)
        except OSError as error:
            report(f"cannot delete {folder}: {error.strerror}")
        else:
            _delete(leftover)


def _delete(path: Path) -> None:
    """Delete a folder, or the link or file that is there in its stead, if any; what a link points to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(_NAME.fullmatch(folder.name)[1])


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """Return what has a checkpoint's name in a run, whole or not, the newest first; a link may lead nowhere."""
    found = [path for path in run_folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def load_weights(layer, tensors: dict[str, np.ndarray], source: Path | str) -> None:
    """Copy ``tensors`` into a layer; every name and shape must match.

    Raises:
        CheckpointError: names or shapes that do not fit this model; some are listed.
    """
    own = layer.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [name for name in own.keys() & tensors.keys() if list(own[name].shape) != list(tensors[name].shape)]
    if missing or unexpected or wrong:
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": sorted(wrong)}
        told = "; ".join(f"{what}: {', '.join(names[:3])} ({len(names)})" for what, names in parts.items() if names)
        raise CheckpointError(f"{source} holds another model's weights ({told})")
    for name, tensor in own.items():
        tensor.set_value(tensors[name].astype(str(tensor.dtype).split(".")[-1], copy=False))


def fingerprint(layer) -> str:
    """Return the SHA-256 of a layer's names and numbers, in hexadecimal: the same wherever they were read from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(layer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def read_info(path: Path) -> ModelInfo:
    """Read the model description at ``path``, as a checkpoint's error rather than a recipe's."""
    try:
        return ModelInfo.load(path)
    except ConfigError as error:
        raise CheckpointError(f"{error}; weights need their {INFO} beside them") from None
