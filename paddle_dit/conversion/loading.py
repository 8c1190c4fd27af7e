"""From whatever a user calls "the model" to weights: a run, a checkpoint, a DiTPipeline folder or a single file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from paddle_dit.checkpoint import INFO, find_checkpoint, load_weights, read_info
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.ppdiffusers_pipeline import MODEL_INDEX, read_pipeline
from paddle_dit.data.labels import imagenet_labels
from paddle_dit.errors import CheckpointError
from paddle_dit.readers import read_tensors


def read_weights(path: str | Path, weights: str = "ema") -> tuple[dict[str, np.ndarray], ModelInfo]:
    """Find and read weights under our names.

    Args:
        path: a run folder (its newest whole checkpoint is taken), a checkpoint folder, a DiTPipeline folder, or a
            ``.safetensors`` or ``.pdparams`` file of ours with its ``config.json`` beside it.
        weights: "ema" or "model"; a pipeline or a file holds just one kind, and this is ignored.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one without these weights.
        ConversionError: a pipeline folder or a file that cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return read_tensors(path), read_info(path.with_name(INFO))
    if (path / MODEL_INDEX).is_file():
        return read_pipeline(path)
    checkpoint = find_checkpoint(path)
    if not (checkpoint.folder / f"{weights}.safetensors").is_file():
        other = "model" if weights == "ema" else "ema"
        raise CheckpointError(f"{checkpoint.folder} holds no {weights} weights; ask for --weights {other}")
    return checkpoint.tensors(weights), checkpoint.info


def load_model(path: str | Path, weights: str = "ema"):
    """Return ``(model, info)``: a :class:`~paddle_dit.models.dit.DiT` in evaluation mode, and what travelled with it.

    Arguments and errors as for :func:`read_weights`; besides, CheckpointError for weights of another model.
    """
    tensors, info = read_weights(path, weights)
    return build_dit(tensors, info.config, path), info


def build_dit(tensors: Mapping[str, np.ndarray], config: DiTConfig, source: str | Path):
    """Return a :class:`~paddle_dit.models.dit.DiT` in evaluation mode with these weights.

    Raises:
        CheckpointError: names or shapes do not fit the configuration; ``source`` is named.
    """
    from paddle_dit.models.dit import DiT

    model = DiT(config)
    load_weights(model, tensors, source)
    model.eval()
    return model


def class_names(info: ModelInfo) -> dict[int, str]:
    """Return the names that travelled with a model, else ImageNet's for 1000 classes, else the numbers."""
    if info.label_names:
        return info.label_names
    classes = info.config.num_classes
    return imagenet_labels() if classes == 1000 else {label: str(label) for label in range(classes)}
