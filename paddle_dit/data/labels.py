"""Class names: the ImageNet table that ships in ``data/``, and finding a class by id or by any of its names."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from paddle_dit.errors import ConfigError, DataError, nearest
from paddle_dit.files import read_json

IMAGENET_FILE = Path(__file__).resolve().parents[2] / "data" / "imagenet_labels.json"


def imagenet_labels() -> dict[int, str]:
    """Return class id -> ``"name, synonym, …"`` of the 1,000 ImageNet classes; the caller may write to it."""
    return {label: names for label, (_, names) in _read_table(IMAGENET_FILE).items()}


def imagenet_names_by_wnid() -> dict[str, str]:
    """Return WordNet id (``"n01440764"``, a folder's name) -> names, in the order of the class ids."""
    return dict(_read_table(IMAGENET_FILE).values())


def read_label_names(path: Path, num_classes: int) -> dict[int, str]:
    """Read a JSON file of class ids and names.

    Raises:
        ConfigError: it cannot be read, or holds ids that are no classes of so many, or names that are no text.
    """
    names = read_json(path, ConfigError)
    for label, name in names.items():
        if not label.isdecimal() or len(label) > 19 or int(label) >= num_classes or not isinstance(name, str):
            raise ConfigError(
                f'{path}: "{label}": {json.dumps(name)} must be a class id below {num_classes} and its name'
            )
    return {int(label): name for label, name in names.items()}


@functools.cache
def _read_table(path: Path) -> dict[int, tuple[str, str]]:
    """Return class id -> (WordNet id, names)."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {int(label): (entry["wnid"], entry["names"]) for label, entry in table.items()}
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run from a checkout or run scripts/make_imagenet_labels.py") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); make it anew with scripts/make_imagenet_labels.py") from None


def resolve_labels(requested: Iterable[str | int], id2label: Mapping[int, str]) -> list[int]:
    """Return the class ids that were asked for, in order.

    Args:
        requested: ids (``2`` or ``"2"``) or names (``"white shark"``). A name comes before an id; its case matters only
            where it tells two classes apart (a Cardigan is a dog, a cardigan is knitted).
        id2label: class id -> names with commas between.

    Raises:
        ConfigError: no such class, or a name that several classes share.

    Example:
        >>> resolve_labels([2, "Tench"], {0: "tench, Tinca tinca", 1: "goldfish", 2: "white shark"})
        [2, 0]
    """
    written, folded = _ids_by_name(id2label, str), _ids_by_name(id2label, str.casefold)
    return [_resolve(label, id2label, written, folded) for label in requested]


def _ids_by_name(id2label: Mapping[int, str], form: Callable[[str], str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for label, names in id2label.items():
        for name in {form(_plain(name)) for name in [names, *names.split(",")]}:
            found.setdefault(name, []).append(label)
    return found


def _plain(name: str) -> str:
    return " ".join(name.split())


def _resolve(label: str | int, id2label: Mapping[int, str], written: Mapping, folded: Mapping) -> int:
    if isinstance(label, str):
        name = _plain(label)
        matches = written.get(name) or folded.get(name.casefold(), [])
        if len(matches) == 1:
            return matches[0]
        if matches:
            choices = ", ".join(f"{match} ({id2label[match].split(',')[0]})" for match in matches)
            raise ConfigError(f"'{name}' names several classes: {choices}; give one of these ids")
        if not name.isdecimal() or len(name) > 18:
            raise ConfigError(f"no class is called '{name}'.{nearest(name, written)} A class id works too")
    if int(label) not in id2label:
        raise ConfigError(f"there is no class {label}; the ids are {min(id2label)} to {max(id2label)}")
    return int(label)
