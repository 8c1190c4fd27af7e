"""Compare this implementation with arrays made by the paper's code, and print a table.

    python scripts/check_parity.py tests/golden/dit_tiny.npz

The file holds a configuration, weights, and inputs and outputs of the reference; tests/golden/README.md describes it.
An array that this program does not know is listed as not compared and has no part in the verdict. Exit code 1 if any
array differs by more than its tolerance, or if nothing was compared.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point


@dataclass
class Options:
    """What to compare with."""

    arrays: Positional[Path]
    """An .npz of reference arrays."""


@entry_point
def main() -> None:
    """Print a row per array and a verdict."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    from paddle_dit.evaluation.parity import compare

    print(f"{'array':<52} {'error':>9} {'tolerance':>9}  measure   verdict")
    rows = []
    for row in compare(options.arrays):
        rows.append(row)
        print(_line(row))
    compared = [row for row in rows if row.compared]
    passed = sum(row.passes for row in compared)
    others = f"; {len(rows) - len(compared)} not compared" if len(rows) > len(compared) else ""
    print(f"{passed} of {len(compared)} within tolerance{others}")
    if not compared:
        print(f"FAILED: nothing was compared; {options.arrays} holds no array that this program can compute")
    sys.exit(0 if compared and passed == len(compared) else 1)


def _line(row) -> str:
    if not row.compared:
        return f"{row.name:<52} {'-':>9} {'-':>9}  {'-':<8}  not compared"
    verdict = "ok" if row.passes else "FAILED"
    return f"{row.name:<52} {row.error:9.1e} {row.tolerance:9.0e}  {row.measure:<8}  {verdict}"


if __name__ == "__main__":
    main()
