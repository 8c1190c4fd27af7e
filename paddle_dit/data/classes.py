"""The classes that a model draws: which are drawn where none are asked for, and their names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paddle_dit.data.labels import resolve_labels

PAPER_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # of ImageNet; the samples that the paper's code draws


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        num_classes: 0 for an unconditional model, which has its null class alone, label 0.
        names: class id -> names with commas between, as far as there are any, or None.
    """

    num_classes: int
    names: Mapping[int, str] | None = None

    @property
    def id2label(self) -> dict[int, str]:
        """Class id -> name, or the number where no class has one."""
        if self.num_classes == 0:
            return {0: "no class"}
        if not self.names:
            return {label: str(label) for label in range(self.num_classes)}
        return {label: self.names.get(label, f"class {label}") for label in range(self.num_classes)}

    def default_labels(self) -> list[int]:
        """Return the classes drawn where none are asked for: the paper's of ImageNet's 1000, else the first eight."""
        if self.num_classes == 0:
            return [0] * len(PAPER_CLASSES)
        return list(PAPER_CLASSES if self.num_classes == 1000 else range(min(len(PAPER_CLASSES), self.num_classes)))

    def resolve(self, requested: Sequence[str | int]) -> list[int]:
        """Return the ids of classes given by id or name; ConfigError offers the nearest names."""
        return resolve_labels(list(requested), self.id2label)

    def name_of(self, label: int) -> str:
        """Return the first name of a class."""
        return self.id2label.get(label, "").split(",")[0]
