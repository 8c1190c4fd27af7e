"""From whatever a user calls "the model" to weights or a model: every format that is known, and what it was made of."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from paddle_dit.checkpoint import load_weights
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.architecture import Hints
from paddle_dit.conversion.sources import open_model
from paddle_dit.data.labels import imagenet_labels


def read_weights(
    path: str | Path,
    weights: str = "ema",
    *,
    num_heads: int | None = None,
    sample_size: int | None = None,
    frequency_shift: int | None = None,
    drop_trained_positions: bool = False,
) -> tuple[dict[str, np.ndarray], ModelInfo]:
    """Find a model, recognise its format by its content, and read its weights under our names.

    Args:
        path: one of ours: a run folder (its newest whole checkpoint is taken), a checkpoint folder, a model folder of
            ``save_pretrained``, a DiTPipeline folder, or a weights file with its ``config.json`` beside it. Or a
            weights file of the paper's code, fast-DiT or PaddleMIX; a folder of diffusers or ppdiffusers, a whole
            pipeline or its transformer; a checkpoint folder of PaddleMIX's trainer; a folder with one such file. Or the
            name of a model on the hub, which is downloaded once.
        weights: "ema" or "model"; where there is just one kind, and nothing says which, it is taken.
        num_heads: attention heads, where no configuration and no preset of that width tells.
        sample_size: side of the latents, where no position table and no configuration tells.
        frequency_shift: 0 or 1 instead of the format's own: 0 of the paper's code and PaddleMIX, 1 of the others.
        drop_trained_positions: take the fixed position table where the file has a trained one, as PaddleMIX makes it.

    Returns:
        Float32 arrays, which may be read-only views of the file: it must stay until they have been used.

    Raises:
        CheckpointError: no such place, a damaged checkpoint, or one without these weights.
        ConversionError: files that cannot be read, hold something else than a DiT, contradict each other, or leave
            something open.
        ConfigError: a damaged ``paddle_dit.json``.
    """
    source = open_model(path, weights, Hints(num_heads, sample_size, frequency_shift, drop_trained_positions))
    return dict(source.tensors), source.info


def load_model(path: str | Path, weights: str = "ema", **hints):
    """Return ``(model, info)``: a :class:`~paddle_dit.models.dit.DiT` in evaluation mode, and what travelled with it.

    Arguments and errors as for :func:`read_weights`; besides, CheckpointError for weights of another model.
    """
    tensors, info = read_weights(path, weights, **hints)
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
    """Return what :func:`known_names` does, else the numbers."""
    return known_names(info) or {label: str(label) for label in range(info.config.num_classes)}


def known_names(info: ModelInfo) -> dict[int, str] | None:
    """Return the names that travelled with a model, else ImageNet's for 1000 classes, else None."""
    return info.label_names or (imagenet_labels() if info.config.num_classes == 1000 else None)
