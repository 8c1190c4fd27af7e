"""Write data/imagenet_labels.json: the 1,000 ImageNet classes in their usual order, each with all its names.

The order and the WordNet names are facts, taken from two text files inside the PyPI package timm (Apache-2.0):
    pip download --no-deps -d outputs timm==1.0.31
    python scripts/make_imagenet_labels.py --wheel outputs/timm-1.0.31-py3-none-any.whl
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from paddle_dit.cli import parse
from paddle_dit.errors import DataError, entry_point

ORDER = "timm/data/_info/imagenet_synsets.txt"
NAMES = "timm/data/_info/imagenet_synset_to_lemma.txt"
CLASSES = 1000


@dataclass
class Flags:
    """Where the names come from and where they go."""

    wheel: Path
    """The downloaded timm-*.whl; it is read as a zip file, not installed."""
    output: Path = Path("data/imagenet_labels.json")
    """File to write."""


def read_table(wheel: Path) -> list[tuple[str, str]]:
    """Return (WordNet id, comma-separated names) of every class, in the order of the class ids."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            order = archive.read(ORDER).decode().split()
            names = dict(line.split("\t", 1) for line in archive.read(NAMES).decode().splitlines())
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel} does not hold timm's class names ({error}); download the wheel named above") from None
    missing = [wnid for wnid in order if wnid not in names]
    if len(order) != CLASSES or missing:
        raise DataError(f"{wheel}: {len(order)} classes, {len(missing)} without a name, where {CLASSES} are expected")
    return [(wnid, names[wnid]) for wnid in order]


def as_json(table: list[tuple[str, str]]) -> str:
    """Return a JSON object from class id to its names, one line a class."""
    lines = [f'"{label}": {json.dumps({"wnid": wnid, "names": names})}' for label, (wnid, names) in enumerate(table)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


@entry_point
def main() -> None:
    """Write the file and say what is in it."""
    flags = parse(Flags, description=__doc__)
    table = read_table(flags.wheel)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(as_json(table), encoding="utf-8")
    print(f"{flags.output}: {len(table)} classes, {sum(len(names.split(', ')) for _, names in table)} names")


if __name__ == "__main__":
    main()
