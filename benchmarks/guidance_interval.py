"""What an interval saves: outside of it only the conditional half of guidance is computed.

    python benchmarks/guidance_interval.py
    python benchmarks/guidance_interval.py --model DiT-B/4 --batch-size 8 --steps 50

Draws the same latents with guidance everywhere, in intervals of timesteps, and not at all. The rows take turns; each
time is the median over the rounds.
"""

import statistics
import time
from dataclasses import dataclass

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point

INTERVALS = {  # name -> (guidance scale, interval of timesteps)
    "everywhere": (4.0, None),
    "200 to 800": (4.0, (200, 800)),
    "300 to 700": (4.0, (300, 700)),
    "400 to 600": (4.0, (400, 600)),
    "none": (1.0, None),
}


@dataclass
class Options:
    """What to time."""

    model: str = "DiT-S/4"
    """Preset; its weights are random."""
    batch_size: int = 4
    """Latents drawn together."""
    steps: int = 20
    """Steps of DDIM."""
    rounds: int = 3
    """Turns that each row takes."""


@entry_point
def main() -> None:
    """Print the table."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    from paddle_dit.config import DiTConfig
    from paddle_dit.generation import SamplingOptions, generate_latents
    from paddle_dit.models.dit import DiT

    model, labels = DiT(DiTConfig.from_preset(options.model)), list(range(options.batch_size))
    model.eval()
    seconds: dict[str, list[float]] = {name: [] for name in INTERVALS}
    halves = {}
    for turn in range(options.rounds + 1):
        for name, (scale, interval) in INTERVALS.items():
            sampling = SamplingOptions("ddim", options.steps, scale, guidance_interval=interval)
            started = time.perf_counter()
            generate_latents(model, labels, sampling)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
            low, high = interval or (0, 1000)
            timesteps = sampling.schedule().timesteps
            halves[name] = len(timesteps) + (scale > 1) * int(((low <= timesteps) & (timesteps < high)).sum())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{'guidance at timesteps':<22} {'half batches':>12} {'seconds':>8} {'ratio':>6}")
    for name, median in medians.items():
        print(f"{name:<22} {halves[name]:>12} {median:>8.2f} {median / medians['everywhere']:>6.2f}")
    print(f"{options.model}, batch {options.batch_size}, {options.steps} DDIM steps, {options.rounds} rounds")


if __name__ == "__main__":
    main()
