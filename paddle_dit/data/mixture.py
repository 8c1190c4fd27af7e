"""Several sources joined as one, and some classes of one: what ``--feature-path a b --class-subset 1 7`` asks for."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from paddle_dit.data.image_source import ImageSource
from paddle_dit.data.labels import resolve_labels
from paddle_dit.data.source import LatentSource, image_size_of, open_source
from paddle_dit.data.subset import Subset, origin
from paddle_dit.errors import DataError


class Mixture:
    """The samples of several sources one after the other; a :class:`paddle_dit.data.source.LatentSource`.

    What one part does not know (npy pairs know neither classes nor names nor VAE) it takes from the others. Mirrored
    samples are there only if every part has them.

    Attributes:
        parts: the sources.
        folders: where each is, for messages.

    Args:
        parts: two or more sources, of the same kind, shape, classes, names and VAE's scale.
        folders: one per part.

    Raises:
        DataError: two do not fit each other; both folders are named.
    """

    def __init__(self, parts: Sequence[LatentSource], folders: Sequence[Path]):
        self.parts, self.folders = tuple(parts), tuple(folders)
        for name, what in _MUST_AGREE.items():
            _check_agree([_known(part, name) for part in self.parts], what, self.folders)
        self.kind, self.sample_shape = parts[0].kind, parts[0].sample_shape
        self.label_names, self.vae = (_first_known(parts, name) for name in ("label_names", "vae"))
        self.num_classes = _first_known(parts, "num_classes")
        self.has_flip = all(part.has_flip for part in parts)
        known = [part.labels for part in parts]
        self.labels = None if any(labels is None for labels in known) else np.concatenate(known)
        self.fingerprint = hashlib.sha256("+".join(part.fingerprint for part in parts).encode()).hexdigest()
        self._ends = np.cumsum([len(part) for part in parts])
        self._starts = np.concatenate([[0], self._ends[:-1]])

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._ends[-1])

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None until one part knows or it is set, which all parts are told."""
        return self._num_classes

    @num_classes.setter
    def num_classes(self, count: int | None) -> None:
        self._num_classes = count
        for part in self.parts:
            if part.num_classes is None:
                part.num_classes = count

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 samples ``[B,C,h,w]`` and int64 labels ``[B]``, each part's in one piece; errors as theirs.

        Raises:
            IndexError: an index out of range.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"sample indices must be in [0, {len(self)})")
        part = np.searchsorted(self._ends, indices, side="right")
        samples = np.empty((len(indices), *self.sample_shape), np.float32)
        labels = np.empty(len(indices), np.int64)
        for number in np.unique(part):
            here = part == number
            own = None if flipped is None else np.asarray(flipped)[here]
            samples[here], labels[here] = self.parts[number].gather(indices[here] - self._starts[number], own)
        return samples, labels

    def name(self, index: int) -> str:
        """Return a sample's number in its part, with the part's folder."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return f"{index - self._starts[part]} of {self.folders[part]}"


class ClassSubset(Subset):
    """The samples of some classes, renumbered from 0 in the order of their ids; names and mirrored samples stay.

    Attributes:
        classes: the ids that the classes have in ``whole``, ascending: the place of each is its new id.

    Args:
        whole: must know its labels.
        classes: ids, ascending.
        folder: where ``whole`` is, for messages.

    Raises:
        DataError: a class has no samples.
    """

    def __init__(self, whole: LatentSource, classes: Sequence[int], folder: str):
        self.classes = tuple(classes)
        new_id = np.full(whole.num_classes, -1)
        new_id[list(classes)] = np.arange(len(classes))
        renumbered = new_id[whole.labels]
        counts = np.bincount(renumbered[renumbered >= 0], minlength=len(classes))
        if not counts.all():
            empty = classes[int(np.argmin(counts))]
            raise DataError(f"--class-subset: {folder} holds no samples of class {empty}; leave that class out")
        chosen = ", ".join(map(str, classes))
        super().__init__(whole, np.flatnonzero(renumbered >= 0), f"classes {chosen} of {whole.num_classes}")
        self.num_classes, self._new_id = len(classes), new_id
        self.labels = renumbered[self.indices]
        names = whole.label_names
        self.label_names = names and {new: names[old] for new, old in enumerate(classes) if old in names}

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return samples as the whole source does, with the new labels."""
        samples, labels = super().gather(indices, flipped)
        return samples, self._new_id[labels]


def open_sources(
    paths: Sequence[Path],
    *,
    num_classes: int | None = None,
    sample_shape: tuple[int, ...] | None = None,
    class_subset: Sequence[str | int] = (),
    open_one: Callable[..., LatentSource] = open_source,
) -> LatentSource:
    """Open one folder of latents, or several as one, and choose some classes.

    Args:
        paths: folders that ``open_one`` knows.
        num_classes: what the model was asked for, or None to take the data's.
        sample_shape: the model's input ``(C, h, w)``, or None for any.
        class_subset: ids or names of the classes to keep; none keeps all. They are renumbered from 0.
        open_one: opens a folder, as :func:`paddle_dit.data.source.open_source` does. Only latents can be joined.

    Raises:
        DataError: a folder is damaged, or does not fit the others, the classes or the model.
        ConfigError: there is no such class.
    """
    asked = None if class_subset else num_classes
    parts = [open_one(path, num_classes=asked, sample_shape=sample_shape) for path in paths]
    source = parts[0] if len(parts) == 1 else Mixture(parts, paths)
    if not class_subset:
        return source
    folder = ", ".join(map(str, paths))
    if source.labels is None:
        unknown = next(path for part, path in zip(parts, paths, strict=True) if part.labels is None)
        raise DataError(
            f"--class-subset needs to know all labels, and {unknown} holds npy pairs, whose labels are in as many "
            "files; pack them first with scripts/pack_features.py"
        )
    names = source.label_names or {}
    classes = sorted(
        set(resolve_labels(class_subset, {label: names.get(label, str(label)) for label in range(source.num_classes)}))
    )
    if num_classes not in (None, len(classes)):
        raise DataError(
            f"--class-subset leaves {len(classes)} classes, --num-classes says {num_classes}; leave --num-classes out"
        )
    return ClassSubset(source, classes, folder)


def name_samples(source: LatentSource, indices: np.ndarray) -> str:
    """Return where the first few samples ``indices`` of a source are: numbers in the folder, or names of images."""
    source, indices = origin(source, indices)
    return ", ".join(
        source.name(index) if isinstance(source, Mixture | ImageSource) else str(index) for index in indices[:8]
    )


_MUST_AGREE = {  # attribute, or entry of the VAE's -> what to call it
    "kind": "kind",
    "sample_shape": "shape",
    "num_classes": "number of classes",
    "label_names": "class names",
    "scaling_factor": "VAE's scaling factor",
    "image_size": "image size",
}


def _known(part: LatentSource, name: str) -> object:
    """Return what a source says under a name of :data:`_MUST_AGREE`, or None."""
    if name == "image_size":
        return image_size_of(part) if part.vae else None
    return (part.vae or {}).get(name) if name == "scaling_factor" else getattr(part, name)


def _check_agree(values: Sequence[object], what: str, folders: Sequence[Path]) -> None:
    known = [(value, folder) for value, folder in zip(values, folders, strict=True) if value is not None]
    for (first, place), (other, elsewhere) in itertools.pairwise(known):
        if first != other:
            told = _in_words(first, other)
            raise DataError(
                f"{elsewhere} cannot be joined with {place}: another {what} ({told[1]}, not {told[0]}); train on one "
                "of them, or make one anew"
            )


def _in_words(first: object, other: object) -> tuple[object, object]:
    """Return two values that differ, of tables only the first entry that does."""
    if not isinstance(first, dict) or not isinstance(other, dict):
        return first, other
    label = min(label for label in {**first, **other} if first.get(label) != other.get(label))
    return tuple(f"{label}: {table.get(label, 'without a name')}" for table in (first, other))


def _first_known(parts: Sequence[LatentSource], name: str):
    return next((value for part in parts if (value := getattr(part, name)) is not None), None)
