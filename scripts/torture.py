"""Kill a training run again and again, and show that it loses nothing but steps.

    python scripts/torture.py --kills 10

Trains a small model twice on random latents. The second run is killed with SIGKILL while it starts, trains, saves and
deletes old checkpoints, all its processes or one rank alone, and continued by the same command each time. In the end
both runs must be equal bit for bit: every weight, average and optimizer state, every logged loss. The exit code says
whether they are. A kill takes about 8 seconds on two cores.
"""

import signal
import sys

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point
from paddle_dit.evaluation.torture import Torture


@entry_point
def main() -> None:
    """Run both, compare, and exit with 1 where they differ."""
    torture = parse(Torture, description=__doc__)
    runtime.prepare()  # the runs inherit its settings
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either signal ends what was started
    try:
        equal = torture.run()
    except KeyboardInterrupt:
        print("stopped, and with it all that it had started", file=sys.stderr)
        sys.exit(130)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
