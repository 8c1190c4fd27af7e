"""Kill a training run again and again, and show that it loses nothing but steps.

    python scripts/torture.py --kills 10

Trains a small model twice on random latents. The second run is killed with SIGKILL while it starts, trains, saves and
deletes old checkpoints, all its processes or one rank alone, and continued by the same command each time. In the end
both runs must be equal bit for bit: every weight, average and optimizer state, every logged loss. The exit code says
whether they are. A kill takes about 8 seconds on two cores.
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point


@dataclass
class Options:
    """What to kill, and how often."""

    output: Path = Path("outputs/torture")
    """Folder of both runs. An unbroken run of the same settings is taken again; the killed one is always new."""
    kills: int = 10
    """Times to kill the run; 0 only compares two runs."""
    seed: int = 0
    """Of the moments of the kills."""
    processes: int = 2
    """Ranks of each run."""
    steps: int | None = None
    """Steps of each run. Default: enough for all kills."""
    ckpt_every: int = 5
    """Steps between two checkpoints."""
    async_save: bool = True
    """Save in the background."""
    trainer: bool = False
    """Run train_image_generation_dit_trainer.py instead of train.py."""
    feature_path: Path | None = None
    """Latents to train on. Default: 64 random ones."""
    model: str = "DiT-Digits/2"
    """Preset or JSON file."""


@entry_point
def main() -> None:
    """Run both, compare, and exit with 1 where they differ."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    from paddle_dit.evaluation.torture import Torture

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either signal ends what was started
    try:
        equal = Torture(**vars(options)).run()
    except KeyboardInterrupt:
        print("stopped, and with it all that it had started", file=sys.stderr)
        sys.exit(130)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
