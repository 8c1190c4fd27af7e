"""What a user should see at the end of an extraction: counts, figures that betray a wrong scale, and a picture."""

from pathlib import Path

import numpy as np

from paddle_dit.data.images import ImageFolder, read_image
from paddle_dit.data.moments import mean_latents
from paddle_dit.data.shards import Summary
from paddle_dit.data.store import PackedStore
from paddle_dit.data.store_index import plain_name
from paddle_dit.files import replace_file
from paddle_dit.models.vae import decode
from paddle_dit.pictures import labelled_grid

PREVIEW = "preview.png"
_PICTURES, _COLUMNS = 16, 4
_PROBED = 256  # samples whose noise is looked at
_FAR = 1.5  # how much more or less than 1 the deviation of scaled latents may be: the paper's is 0.9 to 1.1


def count_lines(store: PackedStore) -> list[str]:
    """Say how many samples there are in each class, and which classes have none.

    Args:
        store: finished.
    """
    counts = np.bincount(store.labels, minlength=store.num_classes)
    there, names = counts[counts > 0], store.label_names or {}
    empty = [names.get(label, str(label)) for label in np.flatnonzero(counts == 0).tolist()]
    often = f"{there.min():,}" if there.min() == there.max() else f"{there.min():,} to {there.max():,}"
    mirrored = ", each with its mirrored image's" if store.has_flip else ""
    lines = [
        f"{len(store):,} {store.kind} {list(store.sample_shape)}{mirrored}, {store.index['dtype']}; "
        f"{len(there):,} classes, {often} each"
    ]
    if empty:
        more = ", …" if len(empty) > 5 else ""
        lines.append(f"warning: {len(empty):,} classes have no sample: {', '.join(empty[:5])}{more}")
    return lines


def figure_lines(store: PackedStore, summary: Summary) -> list[str]:
    """Give mean and deviation of each channel, and warn where the VAE's scaling factor does not fit the latents.

    Args:
        store: finished.
        summary: of the same store.
    """
    parts = {"latents": slice(None)}
    if store.kind == "moments":
        channels = store.sample_shape[0] // 2
        parts = {"means": slice(0, channels), "log-variances": slice(channels, None)}
    lines = [
        f"{name}: mean of each channel {_row(summary.mean[part])}, deviation {_row(summary.std[part])}"
        for name, part in parts.items()
    ]
    factor, implied = store.vae["scaling_factor"], _implied_factor(store, summary)
    if not implied / _FAR < factor < implied * _FAR:
        lines.append(
            f"warning: the VAE's scaling factor is {factor:.5g}, but these latents have deviation 1 at {implied:.5g}: "
            "are these the images that the VAE is for, and is this its config.json? --scaling-factor sets another"
        )
    return lines


def _row(values: np.ndarray) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def _implied_factor(store: PackedStore, summary: Summary) -> float:
    """Return 1 / deviation of the latents before they are scaled, over all channels."""
    if store.kind == "latents":
        mean, variance, scale = summary.mean, summary.std**2, store.vae["scaling_factor"]
    else:  # what noise will add is seen from some of the samples
        channels, scale = store.sample_shape[0] // 2, 1.0
        probed = np.unique(np.linspace(0, len(store) - 1, _PROBED).astype(np.int64))
        noise = np.exp(store.gather(probed)[0][:, channels:].astype(np.float64)).mean(axis=(0, 2, 3))
        mean, variance = summary.mean[:channels], summary.std[:channels] ** 2 + noise
    total = np.mean(variance + mean**2) - np.mean(mean) ** 2
    return float(scale / np.sqrt(max(total, np.finfo(np.float64).tiny)))


def write_preview(store: PackedStore, images: ImageFolder, image_size: int, vae) -> Path:
    """Write a picture of 16 images, each beside what the VAE makes of its stored latents; return its path.

    Args:
        store: finished; of moments the mean is decoded.
        images: those that it was made of.
        image_size: side of the images in pixels.
        vae: see :func:`paddle_dit.models.vae.load_vae`.

    Raises:
        DataError: an image is no longer there.
    """
    kept = np.arange(len(images))
    if skipped := set(store.index["skipped"]):
        kept = np.array([number for number in kept if plain_name(images.paths[number]) not in skipped])
    numbers = np.unique(np.linspace(0, len(store) - 1, _PICTURES).astype(np.int64))
    samples, labels = store.gather(numbers)
    latents = mean_latents(samples, store.kind, store.vae["scaling_factor"])
    originals = [read_image(images.file(image), image_size) for image in kept[numbers]]
    pairs = np.concatenate([np.stack(originals), decode(vae, latents)], axis=2)
    captions = [(store.label_names or {}).get(label, str(label)) for label in labels.tolist()]
    grid = labelled_grid(pairs, captions, columns=_COLUMNS, cell=2 * min(max(image_size, 96), 256))
    path = store.folder / PREVIEW
    replace_file(path, lambda file: grid.save(file, format="PNG"))
    return path
