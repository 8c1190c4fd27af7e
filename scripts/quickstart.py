"""From handwritten digits to a DiTPipeline folder: encode, train, convert, draw, judge.

    bash scripts/quickstart.sh

Takes about six minutes on two cores and writes a picture, a loss curve and a report into outputs/quickstart.
"""

from dataclasses import dataclass
from pathlib import Path

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point


@dataclass
class Options:
    """How to run."""

    output: Path = Path("outputs/quickstart")
    """Folder to write into; an earlier training run in it is put aside, not overwritten."""
    processes: int | None = None
    """Data-parallel training processes. Default: 2 on the CPU, one per GPU (2 at most) where there are GPUs."""
    max_steps: int | None = None
    """Updates; default: as configs/train-digits.yaml says."""
    num_samples: int = 500
    """Digits drawn for the verdict."""
    seed: int = 0
    """Seed of training and drawing."""


@entry_point
def main() -> None:
    """Run the five stages and print the verdict."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    from paddle_dit.evaluation.quickstart import Quickstart

    Quickstart(options.output, options.processes, options.max_steps, options.num_samples, options.seed).run()


if __name__ == "__main__":
    main()
