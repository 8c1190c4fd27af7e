"""The layout of fast-DiT: one ``.npy`` file per latent and one per label.

``<dir>/imagenet256_features/{i}.npy [1,4,32,32]`` and ``<dir>/imagenet256_labels/{i}.npy [1]``, paired by file stem.
Any one pair ``X_features``/``X_labels`` or ``features``/``labels`` will do. fast-DiT writes its features already
multiplied by 0.18215, the VAE's scaling factor, so they are read as they are.

Millions of small files are slow to list and to read: pack them once for training (``data/store.py``).
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from paddle_dit.data.images import holds_images
from paddle_dit.data.npy import non_finite_rows, read_npy
from paddle_dit.errors import DataError


class NpyPairs:
    """Read-only npy pairs; a :class:`paddle_dit.data.source.LatentSource`.

    Opening lists names and reads one sample. Labels are read with their latents, so ``labels`` is ``None`` and
    ``num_classes`` is what the caller says.

    Args:
        folder: the folder that holds the two folders.
        num_classes: if given, ``gather`` refuses labels outside ``[0, num_classes)``.

    Raises:
        DataError: no such pair of folders, an empty one, unpaired or misnamed files, a first sample that is damaged.
    """

    kind = "latents"
    has_flip = False
    label_names = None
    labels = None
    vae = None

    def __init__(self, folder: str | Path, num_classes: int | None = None) -> None:
        self.num_classes = num_classes
        features, labels = find_pair(Path(folder))
        self._stems = _paired_stems(features, labels)
        # Strings, not Paths: joining Paths would take longer than reading the file.
        self._features, self._labels = f"{features}{os.sep}", f"{labels}{os.sep}"
        self.sample_shape = read_latent(self._file(self._features, 0)).shape
        self.gather(np.zeros(1, np.int64))
        # Of the names alone: hashing the contents would read every file.
        self.fingerprint = hashlib.sha256(self._stems.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._stems)

    def gather(self, indices: np.ndarray, flipped: None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 latents ``[B,C,h,w]`` and int64 labels ``[B]`` for the integer ``indices [B]``.

        Raises:
            DataError: a file is missing, damaged, of another shape or type, not finite, or its label is out of range.
        """
        latents = np.empty((len(indices), *self.sample_shape), np.float32)
        labels = np.empty(len(indices), np.int64)
        for row, index in enumerate(indices):
            latents[row] = read_latent(self._file(self._features, index), self.sample_shape)
            labels[row] = read_label(self._file(self._labels, index), index, self.num_classes)
        bad = non_finite_rows(latents)
        if len(bad):
            index = indices[bad[0]]
            raise DataError(not_finite(self._file(self._features, index), index))
        return latents, labels

    def _file(self, folder: str, index: int) -> str:
        return f"{folder}{self._stems[index]}.npy"


def read_latent(path: str, sample_shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return the latent ``[C,h,w]`` in a file, floats of any width, finite or not.

    Raises:
        DataError: the file is missing, damaged, no floats, or not of ``sample_shape`` (where given).
    """
    latent = read_npy(path)
    shape = latent.shape[1:] if latent.ndim == 4 and latent.shape[0] == 1 else latent.shape
    if latent.dtype.kind != "f" or len(shape) != 3 or 0 in shape or sample_shape not in (None, shape):
        wanted = "[1,C,h,w] or [C,h,w]" if sample_shape is None else f"{list(sample_shape)} as in the first file"
        raise DataError(f"{path} is {latent.dtype} {list(latent.shape)}, expected floats of {wanted}; extract it again")
    return latent.reshape(shape)


def read_label(path: str, index: int, num_classes: int | None) -> int:
    """Return the label of sample ``index`` in a file.

    Raises:
        DataError: the file is missing, damaged, or its integer is no class (of ``num_classes``, where given).
    """
    label = read_npy(path)
    if label.dtype.kind not in "iu" or label.size != 1:
        raise DataError(f"{path} is {label.dtype} {list(label.shape)}, expected one integer; extract it again")
    value = int(label.item())
    if value < 0:
        raise DataError(f"{path} (sample {index}) says class {value}; mend the file: classes are counted from 0")
    if num_classes is not None and value >= num_classes:
        raise DataError(
            f"{path} (sample {index}) says class {value} of {num_classes}; raise --num-classes or mend the file"
        )
    return value


def not_finite(path: str, index: int) -> str:
    """Say that the latent of sample ``index`` cannot be used."""
    return f"{path} (sample {index}) holds NaN or infinity; extract it again or remove the pair"


def no_npy(path: Path) -> str:
    """Say that a file does not belong."""
    return f"{path} is not a .npy file; move it out of the folder"


def misnamed(features: Path, stem: str) -> str:
    """Say that a pair has no place in the order."""
    return f"{features / stem}.npy is misnamed: other files are numbers; rename or remove it and its label"


def find_pair(folder: Path) -> tuple[Path, Path]:
    """Return the one ``(X_features, X_labels)`` inside ``folder``."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; give one that holds *_features and *_labels")
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    folders = {name for name, is_dir in found if is_dir}
    features = [name for name in folders if name == "features" or name.endswith("_features")]
    pairs = [(name, partner) for name in features if (partner := name[: -len("features")] + "labels") in folders]
    if len(pairs) == 1:
        return folder / pairs[0][0], folder / pairs[0][1]
    if pairs:
        names = ", ".join(sorted(name for name, _ in pairs))
        raise DataError(f"{folder} holds several data sets ({names}); give each its own folder")
    held = ", ".join(name for name, _ in found[:5]) + (", ..." if len(found) > 5 else "") if found else "nothing"
    mend = "make the store again" if any(name.endswith("-00000.npy") for name, _ in found) else "give its folder"
    if holds_images(folder):
        mend = "scripts/extract_features.py makes latents of images"
    if folder.name.endswith(("features", "labels")):
        mend = f"give the folder above it, {folder.parent}"
    raise DataError(
        f"{folder} is no data set: expected index.json (packed store) or *_features/ with *_labels/, "
        f"found {held}; {mend}"
    )


def _paired_stems(features: Path, labels: Path) -> np.ndarray:
    """Return the stems that both folders hold, numbers sorted as numbers; refuse anything that has no partner."""
    stems, label_stems = _npy_stems(features), _npy_stems(labels)
    unpaired = stems ^ label_stems
    if unpaired:
        stem = sort_stems(unpaired)[0]
        lacks, has = (labels, features) if stem in stems else (features, labels)
        raise DataError(
            f"{len(unpaired)} files have no partner, the first is {has / stem}.npy: {lacks.name} lacks it; "
            "add the partner or remove the file"
        )
    if not stems:
        raise DataError(f"{features} is empty; extract the features first")
    odd = words_among_numbers(stems)
    if odd:
        raise DataError(misnamed(features, odd[0]))
    return np.array(sort_stems(stems))  # a fixed-width array: a fraction of a list's memory


def _npy_stems(folder: Path) -> set[str]:
    stems, others = list_stems(folder)
    if others:
        raise DataError(no_npy(folder / min(others)))
    return stems


def list_stems(folder: Path) -> tuple[set[str], set[str]]:
    """Return the stems of the ``.npy`` files in a folder and the names of whatever else is there but hidden."""
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if not entry.name.startswith(".")}
    others = {name for name in names if not name.endswith(".npy")}
    return {name[: -len(".npy")] for name in names - others}, others


def words_among_numbers(stems: set[str]) -> list[str]:
    """Return the stems that are no numbers where others are, sorted: they would have no place in the order."""
    words = {stem for stem in stems if not stem.isdecimal()}
    return sorted(words) if len(words) < len(stems) else []


def sort_stems(stems: set[str]) -> list[str]:
    """Return the stems in the order of the samples: numbers as numbers."""
    return sorted(stems, key=lambda stem: (0, int(stem), stem) if stem.isdecimal() else (1, 0, stem))
