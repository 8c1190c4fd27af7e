"""From whatever a user calls "the model" to tensors under our names: every format, recognised by content."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_dit.checkpoint import INFO, MANIFEST, checkpoint_folders, find_checkpoint, read_info
from paddle_dit.config import ModelInfo
from paddle_dit.conversion.architecture import Description, Hints, check_positions, describe_stock, infer_config
from paddle_dit.conversion.formats import MODEL_INDEX, OURS, OWN, OWN_INFO, STOCK_NAMES, Format, recognise
from paddle_dit.conversion.from_hub import find_model
from paddle_dit.conversion.keymaps import Joined, our_rules
from paddle_dit.conversion.tables import Renamed, Table, open_table
from paddle_dit.errors import CheckpointError, ConversionError
from paddle_dit.files import read_json
from paddle_dit.readers import SafetensorsFile
from paddle_dit.weight_files import find_weights

_TRAINER, _TRAINER_EMA = "model_state.pdparams", "ema_state.pdparams"  # of PaddleMIX


@dataclass(frozen=True)
class Source:
    """A model that was found; of its tensors, only those that tell what it is have been read.

    Attributes:
        path: the file that holds the tensors, or the index of several.
        format: see :mod:`paddle_dit.conversion.formats`.
        kind: what it is, for the user.
        foreign: its tensors under their own names.
        tensors: the same under our names, float32, each made when it is asked for.
        info: configuration, label names and VAE.
        notes: what was assumed, a line each.
        vae: the folder of the VAE that came with it, if any.
    """

    path: Path
    format: Format
    kind: str
    foreign: Mapping[str, np.ndarray]
    tensors: Mapping[str, np.ndarray]
    info: ModelInfo
    notes: tuple[str, ...] = ()
    vae: Path | None = None


@dataclass(frozen=True)
class VaeSource:
    """The tensors of an autoencoder that was found, under the names of diffusers or CompVis."""

    path: Path
    tensors: Mapping[str, np.ndarray]
    notes: tuple[str, ...] = ()


def open_model(path: str | Path, weights: str = "ema", hints: Hints | None = None) -> Source:
    """Find a DiT and recognise its format.

    Args:
        path: see :func:`~paddle_dit.conversion.loading.read_weights`.
        weights: "ema" or "model".
        hints: what the files may leave open.

    Raises:
        CheckpointError: no such place, a damaged checkpoint of ours, or one without these weights.
        ConversionError: files that cannot be read, hold something else, contradict each other, or leave something open.
        ConfigError: a damaged ``paddle_dit.json``.
    """
    source = open_source(path, weights, hints)
    if isinstance(source, VaeSource):
        raise ConversionError(f"{source.path} holds a VAE, and a DiT was expected; name it with --vae")
    return source


def pinned(path: str | Path) -> Path:
    """Return the newest whole checkpoint where ``path`` is a run of ours, which may go on, else ``path`` itself.

    Raises:
        CheckpointError: none of the run's checkpoints is whole.
    """
    path = Path(path)
    is_run = any((folder / MANIFEST).is_file() for folder in checkpoint_folders(path))
    return find_checkpoint(path).folder if is_run else path


def open_source(path: str | Path, weights: str = "ema", hints: Hints | None = None) -> Source | VaeSource:
    """As :func:`open_model`, but a VAE is admitted."""
    path, hints = find_model(path), hints or Hints()
    if path.is_file():
        return _open_file(path, weights, hints)
    if (path / MODEL_INDEX).is_file():
        return _open_pipeline(path, weights, hints)
    if (path / MANIFEST).exists() or (found := _find_weights(path, weights)) is None:
        return _open_checkpoint(path, weights, hints)
    return _open_file(found, weights, hints)


def _find_weights(folder: Path, weights: str) -> Path | None:
    pair = {"ema": folder / _TRAINER_EMA, "model": folder / _TRAINER}
    return pair[weights] if all(path.is_file() for path in pair.values()) else find_weights(folder)


def _open_checkpoint(path: Path, weights: str, hints: Hints) -> Source:
    others = [folder.name for folder in checkpoint_folders(path) if (folder / _TRAINER).is_file()]
    if others:
        raise ConversionError(f"{path} holds another trainer's checkpoints ({', '.join(others[:4])}); name one of them")
    checkpoint = find_checkpoint(path)
    file = checkpoint.folder / f"{weights}.safetensors"
    if not file.is_file():
        other = "model" if weights == "ema" else "ema"
        raise CheckpointError(f"{checkpoint.folder} holds no {weights} weights; ask for --weights {other}")
    info = _agreed(checkpoint.info, hints)
    tensors = SafetensorsFile(file)
    joined = Joined(our_rules(info.config), tensors, info.config, checkpoint.folder)
    return Source(file, OWN, f"{OURS} checkpoint, {weights} weights", tensors, joined, info)


def _open_pipeline(folder: Path, weights: str, hints: Hints) -> Source | VaeSource:
    inner = folder / "transformer"
    found = find_weights(inner) if inner.is_dir() else None
    if found is None:
        raise ConversionError(f"{folder} has a {MODEL_INDEX} and no weights in transformer/; fetch the whole folder")
    source = _open_file(found, weights, hints)
    if isinstance(source, VaeSource):
        return source
    info, vae = source.info, folder / "vae"
    if info.label_names is None and not (folder / OWN_INFO).is_file():
        names = _label_names(folder / MODEL_INDEX) or {}  # some have ImageNet's names for fewer classes
        known = {label: name for label, name in names.items() if label < info.config.num_classes}
        info = replace(info, label_names=known or None)
    return replace(source, kind=f"{source.format.name} pipeline", info=info, vae=vae if vae.is_dir() else None)


def _label_names(index: Path) -> dict[int, str] | None:
    names = read_json(index, ConversionError).get("id2label") or {}
    if not isinstance(names, dict) or not all(label.isdecimal() and len(label) < 20 for label in names):
        raise ConversionError(f"{index}: 'id2label' must be class ids with their names")
    return {int(label): str(name) for label, name in names.items()} or None


def _open_file(path: Path, weights: str, hints: Hints) -> Source | VaeSource:
    try:
        table = open_table(path, weights)
        form = recognise(table.tensors)
        if form is None:
            return VaeSource(path, table.tensors, table.notes)
        info, notes = _describe(path, form, table, hints)
        positions = table.tensors.get(form.names.positions)
        if positions is not None and (line := check_positions(positions, info.config, hints)):
            notes.append(line)
        tensors = Renamed(table.tensors, {name: name for name in table.tensors if name != form.names.positions})
        joined = Joined(form.rules(info.config), tensors, info.config, path)
    except ConversionError as error:
        told = str(error)
        raise ConversionError(told if told.startswith(str(path.parent)) else f"{path}: {told}") from None
    kind = f"{form.name} {table.kind}"
    return Source(path, form, kind, table.tensors, joined, info, (*table.notes, *notes))


def _describe(path: Path, form: Format, table: Table, hints: Hints) -> tuple[ModelInfo, list[str]]:
    """Return a model's description, ours where there is one, and a line for everything that was assumed."""
    if form is OWN:
        return _agreed(read_info(path.with_name(INFO)), hints), []
    if form.names is STOCK_NAMES:
        for own in (path.with_name(OWN_INFO), path.absolute().parent.with_name(OWN_INFO)):
            if own.is_file():
                return _agreed(ModelInfo.load(own), hints), []
    description = table.description or _described_beside(path)
    config, notes = infer_config(table.tensors, form.names, form.frequency_shift, description, hints)
    return ModelInfo(config), notes


def _described_beside(path: Path) -> Description:
    beside = path.with_name(INFO)
    if not beside.is_file():
        return Description()
    values = read_json(beside, ConversionError)
    if values.get("format") == OURS:  # of weights of ours in the same folder
        return Description()
    return describe_stock(values, beside)


def _agreed(info: ModelInfo, hints: Hints) -> ModelInfo:
    """Return what is known of a model, with the frequency_shift that a user asks for; other hints must agree."""
    config = info.config
    for name in ("num_heads", "sample_size"):
        hint = getattr(hints, name)
        if hint is not None and hint != getattr(config, name):
            raise ConversionError(f"its description says {name} {getattr(config, name)}, not {hint}; leave it out")
    if hints.frequency_shift is None:
        return info
    return replace(info, config=replace(config, frequency_shift=hints.frequency_shift))
