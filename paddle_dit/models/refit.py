"""A trained DiT's arrays refitted to another patch size, output or set of classes. Plain NumPy, no Paddle.

The position table needs nothing: it is fixed, no weight, and a model of another image size computes its own.
"""

from collections.abc import Callable, Mapping

import numpy as np

from paddle_dit.config import DiTConfig

Tensors = dict[str, np.ndarray]

PATCHES_IN, PATCHES_OUT = "x_embedder.proj.weight", "final_layer.linear"
LABELS = "y_embedder.embedding_table.weight"
FREQUENCIES = 256  # inputs of the timestep embedder


def parameter_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of a :class:`~paddle_dit.models.dit.DiT`, in its order."""
    width, mlp, patch = config.hidden_size, int(config.hidden_size * config.mlp_ratio), config.patch_size**2
    block = {
        "attn.qkv": (width, 3 * width),
        "attn.proj": (width, width),
        "mlp.fc1": (width, mlp),
        "mlp.fc2": (mlp, width),
        "adaLN_modulation.1": (width, 6 * width),
    }
    layers = {
        "x_embedder.proj": (config.in_channels * patch, width),
        "t_embedder.mlp.0": (FREQUENCIES, width),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.embedding_table": (config.label_rows, width),
        **{f"blocks.{index}.{name}": shape for index in range(config.depth) for name, shape in block.items()},
        PATCHES_OUT: (width, patch * config.out_channels),
        "final_layer.adaLN_modulation.1": (width, 2 * width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in layers.items():
        shapes[f"{name}.weight"] = shape
        if f"{name}.weight" != LABELS:
            shapes[f"{name}.bias"] = shape[1:]
    return shapes


def resample_patches(tensors: Mapping[str, np.ndarray], config: DiTConfig, patch_size: int) -> Tensors:
    """Return the arrays for another patch size, of which only those of the patches change.

    As FlexiViT's "PI-resize" (Beyer et al. 2023, section 3.4): let B resize a patch bilinearly, its corners' pixels
    as areas and, where it shrinks, with a filter as much wider. The projection that takes resized patches becomes the
    pseudo-inverse of B's transpose times the old one: where patches grow, a resized patch then gives the very token
    that it gave before. The final layer, which that paper has not got, gives the resized patch: B times the old one.
    """
    new, old = patch_size**2, config.patch_size**2
    resize = resize_matrix(config.patch_size, patch_size)  # (new, old)
    width = config.hidden_size
    into = tensors[PATCHES_IN].astype(np.float64).reshape(config.in_channels, old, width)  # rows are (C, p, p)
    into = np.einsum("no,cow->cnw", np.linalg.pinv(resize.T), into).reshape(-1, width)
    refitted = {**tensors, PATCHES_IN: into.astype(np.float32)}
    for kind in ("weight", "bias"):
        name = f"{PATCHES_OUT}.{kind}"
        out = tensors[name].astype(np.float64).reshape(-1, old, config.out_channels)  # columns are (p, p, C)
        out = np.einsum("no,woc->wnc", resize, out).reshape(*tensors[name].shape[:-1], new * config.out_channels)
        refitted[name] = out.astype(np.float32)
    return refitted


def resize_matrix(old: int, new: int) -> np.ndarray:
    """Return the bilinear resizing of a flattened square patch, float64 ``[new * new, old * old]``; rows sum to 1."""
    scale = max(1.0, old / new)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    along = np.maximum(0.0, 1 - np.abs(centres[:, None] - np.arange(old)) / scale)
    along /= along.sum(1, keepdims=True)
    return np.kron(along, along)


def with_variance(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> Tensors:
    """Return the arrays with outputs for the variance too, all zero: half way between its two bounds, in logarithms."""
    return _for_outputs(tensors, config, lambda noise: np.concatenate([noise, np.zeros_like(noise)], axis=-1))


def without_variance(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> Tensors:
    """Return the arrays without the outputs for the variance; the noise is predicted as before."""
    return _for_outputs(tensors, config, lambda both: both[..., : config.in_channels])


def _for_outputs(tensors: Mapping[str, np.ndarray], config: DiTConfig, change: Callable) -> Tensors:
    refitted = dict(tensors)
    for name in (f"{PATCHES_OUT}.weight", f"{PATCHES_OUT}.bias"):
        array = tensors[name]
        changed = change(array.reshape(*array.shape[:-1], config.patch_size**2, config.out_channels))
        refitted[name] = np.ascontiguousarray(changed.reshape(*array.shape[:-1], -1))
    return refitted


def relabelled(tensors: Mapping[str, np.ndarray], old: DiTConfig, new: DiTConfig, kept: Mapping[int, int]) -> Tensors:
    """Return the arrays with a label table for other classes.

    Classes that the model knows keep their rows. All others start from the null row, so that the model begins by
    drawing them as it draws without a class: some image of its own kind, from which it moves away. The null row itself
    stays. A model that has none lends the mean of its rows.

    Args:
        tensors: of a model of the configuration ``old``.
        old: its configuration.
        new: of the model to be trained; ``label_rows`` is what counts.
        kept: new class -> old class.
    """
    table = tensors[LABELS]
    null = table[old.null_class] if old.has_null_class else table.mean(0)
    rows = np.repeat(null[None], new.label_rows, axis=0)
    for label, former in kept.items():
        rows[label] = table[former]
    return {**tensors, LABELS: rows}


def fresh_labels(tensors: Mapping[str, np.ndarray], new: DiTConfig, random: np.random.Generator) -> Tensors:
    """Return the arrays with newly drawn rows for all classes, normal 0.02 as at first; the null row stays."""
    rows = tensors[LABELS].copy()
    rows[: new.num_classes] = random.normal(0, 0.02, (new.num_classes, new.hidden_size))
    return {**tensors, LABELS: rows}


def match_classes(new: Mapping[int, str], old: Mapping[int, str]) -> dict[int, int]:
    """Return new class -> old class for the classes of the same name.

    Names are lists of synonyms with commas between ("tench, Tinca tinca"). The whole list counts first, then any
    synonym; upper and lower case and spaces do not matter. Of several candidates the one with the same id is taken,
    and none where there is no such.
    """
    kept: dict[int, int] = {}
    for forms in (_synonyms, _whole):  # the latter has the last word
        known: dict[str, list[int]] = {}
        for former, names in old.items():
            for form in forms(names):
                known.setdefault(form, []).append(former)
        for label, names in new.items():
            candidates = {former for form in forms(names) for former in known.get(form, ())}
            if len(candidates) == 1 or label in candidates:
                kept[label] = label if label in candidates else candidates.pop()
    return kept


def _whole(names: str) -> set[str]:
    return {" ".join(names.split()).casefold()} - {""}


def _synonyms(names: str) -> set[str]:
    return {form for name in names.split(",") for form in _whole(name)}
