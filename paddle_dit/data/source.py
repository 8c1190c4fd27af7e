"""Where latents come from: one reading interface, and the function that recognises what a folder holds."""

from pathlib import Path
from typing import Protocol

import numpy as np

from paddle_dit.data.npy_pairs import NpyPairs
from paddle_dit.data.shards import check_not_half_written
from paddle_dit.data.store import INDEX, PackedStore
from paddle_dit.errors import DataError


class LatentSource(Protocol):
    """Labelled latents, already multiplied by the VAE's scaling factor, read in batches by index."""

    kind: str  # "latents"; "moments": mean and log-variance along the channels; or "images", to be encoded
    sample_shape: tuple[int, ...]  # (C, h, w), of images that of their latents; of moments as gathered, (2C, h, w)
    num_classes: int | None  # None: unknown until given
    label_names: dict[int, str] | None
    labels: np.ndarray | None  # int64 [N]; None where knowing them would mean reading every file
    fingerprint: str  # names the data: other samples or labels have another
    has_flip: bool  # whether the mirrored images' latents are there too
    vae: dict | None  # name, scaling_factor, image_size where known

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 samples ``[B,*sample_shape]`` and int64 labels ``[B]`` for the integer ``indices [B]``.

        The samples of images are uint8 ``[B,S,S,3]``.

        ``flipped``, booleans ``[B]``, takes some from the mirrored images, where ``has_flip``.

        Safe to call from several threads. Raises DataError for a damaged, non-finite or wrongly labelled sample.
        """
        ...


def open_source(
    path: str | Path, *, num_classes: int | None = None, sample_shape: tuple[int, ...] | None = None
) -> LatentSource:
    """Open the packed store or the npy pairs in the folder ``path``.

    Args:
        path: a folder with ``index.json`` or with ``*_features/`` and ``*_labels/``.
        num_classes: what the model was asked for, or ``None`` to take the data's.
        sample_shape: the model's input ``(C, h, w)``, or ``None`` for any.

    Raises:
        DataError: there is neither, it is damaged, or it does not fit ``num_classes`` or ``sample_shape``.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; give one that holds a packed store or *_features and *_labels")
    check_not_half_written(path)
    source: LatentSource = PackedStore(path) if (path / INDEX).exists() else NpyPairs(path, num_classes)
    if num_classes is not None and source.num_classes != num_classes:
        raise DataError(
            f"{path} has {source.num_classes} classes, --num-classes says {num_classes}; "
            f"use --num-classes {source.num_classes} or other data"
        )
    if sample_shape is not None and tuple(sample_shape) != latent_shape_of(source):
        raise DataError(_shape_message(path, source, tuple(sample_shape)))
    return source


def latent_shape_of(source: LatentSource) -> tuple[int, ...]:
    """Return the shape ``(C, h, w)`` of the latents that a model is given: of moments, half the channels."""
    channels, *size = source.sample_shape
    return (channels // 2 if source.kind == "moments" else channels, *size)


def image_size_of(source: LatentSource) -> int:
    """Return the height in pixels of the images behind the latents.

    Stable Diffusion's VAE, which every DiT uses, shrinks by 8; another VAE's store states its image size.
    """
    return (source.vae or {}).get("image_size") or 8 * source.sample_shape[1]


def _shape_message(path: Path, source: LatentSource, wanted: tuple[int, ...]) -> str:
    """Say which flag would help: the image size if only that differs, another store otherwise."""
    found = latent_shape_of(source)
    mend = "use another store, or a model for these latents"
    if found[0] == wanted[0] and found[1] == found[2]:
        mend = f"use --image-size {image_size_of(source)} or another store"
    what = "latents drawn from the moments" if source.kind == "moments" else source.kind
    return f"{what} in {path} are {list(found)} but the model takes {list(wanted)}; {mend}"
