"""The layout of fast-DiT: one ``.npy`` file per latent and one per label.

``<dir>/imagenet256_features/{i}.npy [1,4,32,32]`` and ``<dir>/imagenet256_labels/{i}.npy [1]``, paired by file stem.
Any one pair ``X_features``/``X_labels`` or ``features``/``labels`` will do. fast-DiT writes its features already
multiplied by 0.18215, the VAE's scaling factor, so they are read as they are.

Millions of small files are slow to list and to read: pack them once for training (``data/store.py``).
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paddle_dit.data.npy import first_non_finite, read_npy
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
        features, labels = _find_pair(Path(folder))
        self._stems = _paired_stems(features, labels)
        # Strings, not Paths: joining Paths would take longer than reading the file.
        self._features, self._labels = f"{features}{os.sep}", f"{labels}{os.sep}"
        first = read_npy(self._file(self._features, 0))
        self.sample_shape = first.shape[1:] if first.ndim == 4 and first.shape[0] == 1 else first.shape
        if len(self.sample_shape) != 3:
            raise DataError(
                f"{self._file(self._features, 0)} is {list(first.shape)}, expected [1,C,h,w] or [C,h,w]; "
                "extract the features again, one latent per file"
            )
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
            latents[row] = self._read_latent(index)
            labels[row] = self._read_label(index)
        bad = first_non_finite(latents)
        if bad is not None:
            path = self._file(self._features, indices[bad])
            raise DataError(
                f"{path} (sample {indices[bad]}) holds NaN or infinity; extract it again or remove the pair"
            )
        return latents, labels

    def _read_latent(self, index: int) -> np.ndarray:
        path = self._file(self._features, index)
        latent = read_npy(path)
        if latent.dtype.kind != "f" or latent.shape not in (self.sample_shape, (1, *self.sample_shape)):
            raise DataError(
                f"{path} is {latent.dtype} {list(latent.shape)}, expected floats of {list(self.sample_shape)} "
                "as in the first file; extract it again"
            )
        return latent.reshape(self.sample_shape)

    def _read_label(self, index: int) -> int:
        path = self._file(self._labels, index)
        label = read_npy(path)
        if label.dtype.kind not in "iu" or label.size != 1:
            raise DataError(f"{path} is {label.dtype} {list(label.shape)}, expected one integer; extract it again")
        value = int(label.item())
        if value < 0:
            raise DataError(f"{path} says class {value}; mend the file: classes are counted from 0")
        if self.num_classes is not None and value >= self.num_classes:
            raise DataError(f"{path} says class {value} of {self.num_classes}; raise --num-classes or mend the file")
        return value

    def _file(self, folder: str, index: int) -> str:
        return f"{folder}{self._stems[index]}.npy"


def _find_pair(folder: Path) -> tuple[Path, Path]:
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
    if folder.name.endswith(("features", "labels")):
        mend = f"give the folder above it, {folder.parent}"
    raise DataError(
        f"{folder} is no data set: expected index.json (packed store) or *_features/ with *_labels/, "
        f"found {held}; {mend}"
    )


def _paired_stems(features: Path, labels: Path) -> np.ndarray:
    """Return the stems that both folders hold, numbers sorted as numbers; refuse anything that has no partner."""
    stems, label_stems = _stems(features), _stems(labels)
    unpaired = stems ^ label_stems
    if unpaired:
        stem = _sorted(unpaired)[0]
        lacks, has = (labels, features) if stem in stems else (features, labels)
        raise DataError(
            f"{len(unpaired)} files have no partner, the first is {has / stem}.npy: {lacks.name} lacks it; "
            "add the partner or remove the file"
        )
    if not stems:
        raise DataError(f"{features} is empty; extract the features first")
    numeric = sum(stem.isdecimal() for stem in stems)
    if 0 < numeric < len(stems):
        odd = min(stem for stem in stems if not stem.isdecimal())
        raise DataError(f"{features / odd}.npy is misnamed: other files are numbers; rename or remove it and its label")
    return np.array(_sorted(stems))  # a fixed-width array: a fraction of a list's memory


def _stems(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    odd = [name for name in names if not name.endswith(".npy")]
    if odd:
        raise DataError(f"{folder / min(odd)} is not a .npy file; move it out of the folder")
    return {name[: -len(".npy")] for name in names}


def _sorted(stems: Sequence[str] | set[str]) -> list[str]:
    return sorted(stems, key=lambda stem: (0, int(stem), stem) if stem.isdecimal() else (1, 0, stem))
