"""Compare this implementation with arrays made by the paper's code, and print a table.

    python scripts/check_parity.py tests/golden/dit_tiny.npz

The file holds a configuration, weights, and inputs and outputs of the reference; tests/golden/README.md describes it.
Exit code 1 if any array differs by more than its tolerance.
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
    failed = total = 0
    for row in compare(options.arrays):
        total += 1
        failed += not row.passes
        verdict = "ok" if row.passes else "FAILED"
        print(f"{row.name:<52} {row.error:9.1e} {row.tolerance:9.0e}  {row.measure:<8}  {verdict}")
    print(f"{total - failed} of {total} within tolerance")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
