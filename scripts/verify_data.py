"""Read a whole data set once and name all that is bad in it; nothing is changed.

    python scripts/verify_data.py data/store
    python scripts/verify_data.py data/fastdit_imagenet256 --num-classes 1000

A packed store: size and sha256 of every file, shapes, every value finite, every label a class. npy pairs: every file
has its partner, can be read, has the first one's shape and dtype, is finite, and has a label that is a class.
Ends with code 0 when all is well and with 2 when something is bad: one line each, then how many and the mend.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from tyro.conf import Positional

from paddle_dit.cli import parse
from paddle_dit.errors import ConfigError, DataError, entry_point


@dataclass
class Options:
    """What to check."""

    path: Positional[Path]
    """Folder of a packed store, or the one that holds *_features and *_labels: what --feature-path takes."""
    num_classes: int | None = None
    """How many classes there are. Default: a store's own number; for npy pairs any label from 0 is taken."""
    max_lines: int = 20
    """Faults that are named; further ones are only counted."""


@entry_point
def main() -> None:
    """Read, name, judge."""
    options = parse(Options, description=__doc__)
    if options.max_lines < 1:
        raise ConfigError(f"--max-lines must be 1 or more, got {options.max_lines}")
    from paddle_dit.data.verify import open_check

    check, found = open_check(options.path, options.num_classes), 0
    quiet = not sys.stderr.isatty()
    with tqdm(
        total=check.total,
        unit=check.unit,
        unit_scale=True,
        desc="verify",
        dynamic_ncols=not quiet,
        mininterval=10.0 if quiet else 0.2,
    ) as bar:
        say = print if quiet else bar.write  # which draws the bar again below each line
        for problem in check.problems(bar.update):
            found += 1
            if found <= options.max_lines:
                say(" ".join(problem.split()))
    if found > options.max_lines:
        print(f"and {found - options.max_lines:,} more (--max-lines {found} names them all)")
    if found:
        problems = "1 fault" if found == 1 else f"{found:,} faults"
        raise DataError(f"{options.path} is damaged, {problems}; {check.mend}")
    print(f"all is well: {check.summary()}")


if __name__ == "__main__":
    main()
