"""Samplers, steps and guidance on the digits: Fréchet distance, accuracy and time, in a table and a plot.

    python benchmarks/samplers_digits.py

Draws the same digits of the quickstart's model in every row, several times with other seeds. The distance (FID) is that
of scripts/evaluate.py --features digits to the 1,497 real training digits; the accuracy is the share that the
quickstart's judge labels as asked. Rows take turns, batch by batch; times are medians over the batches, without
decoding. Takes about 20 minutes of one core with OMP_NUM_THREADS=1, with which README's figures were made.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import ConfigError, entry_point
from paddle_dit.files import check_writable

CHANNELS = 4  # all are guided, as in the quickstart
GUIDANCE = 2.0
BASE, BEST, FEW = ("ddpm", 250), ("dpm-solver++", 10), 10
SAMPLERS = (BASE, ("ddpm", 50), ("ddim", 50), ("ddim", 25), ("ddim", FEW), ("dpm-solver++", 25), BEST)
UNGUIDED = (BASE, ("ddim", FEW), ("dpm-solver++", 25), BEST)
NOISY = ("ddim", FEW, 1.0)  # sampler, steps, eta
SCALES = (1.5, 4.0)  # drawn by the best of few steps, as are the intervals
# As in guidance_interval.py. By Kynkäänniemi et al. (2024), guidance at the noisiest timesteps costs variety, and at
# the least noisy ones it hardly matters.
INTERVALS = ((200, 800), (300, 700))
NEAR = 1.05  # of the base's distance


@dataclass
class Options:
    """What to draw."""

    model: Path = Path("outputs/quickstart/pipeline")
    """Run folder or DiTPipeline folder of a model of the digits."""
    samples: int = 1000
    """Digits drawn for each row and seed."""
    seeds: int = 3
    """How often each row is drawn, with seeds 0, 1, ...; deviations are over them."""
    batch_size: int = 100
    """Digits drawn together."""
    plot: Path = Path("outputs/samplers-digits.png")
    """Where the plot goes."""

    def check(self) -> None:
        """Raise ConfigError for numbers that cannot be, a missing model, or a plot that cannot be written."""
        for name, low in (("samples", 4), ("seeds", 1), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"--{name.replace('_', '-')} must be {low} or more, got {getattr(self, name)}")
        if not self.model.exists():
            raise ConfigError(f"there is no {self.model}; run bash scripts/quickstart.sh, or give --model FOLDER")
        check_writable(self.plot.parent, "--plot")


@dataclass
class Row:
    """One way to draw, and what came of it.

    Attributes:
        sampler, steps, scale, interval, eta: the way. Where ddim adds noise (eta) its few steps are "trailing", which
            begins at the noisiest timestep; other rows have their sampler's own spacing.
        fid, accuracy, recall: of each seed.
        seconds, cpu_seconds: of each batch, for one image, without decoding.
    """

    sampler: str
    steps: int
    scale: float = GUIDANCE
    interval: tuple[int, int] | None = None
    eta: float = 0.0
    fid: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What draws."""
        return f"{self.sampler}, eta {self.eta:g}" if self.eta else self.sampler

    @property
    def way(self) -> tuple:
        """All that tells it from other rows."""
        return self.sampler, self.steps, self.scale, self.interval, self.eta

    def options(self, seed: int = 0):
        """Return how the digits of a seed are drawn."""
        from paddle_dit.generation import SamplingOptions

        return SamplingOptions(
            self.sampler,
            self.steps,
            self.scale,
            CHANNELS,
            guidance_interval=self.interval,
            seed=seed,
            timestep_spacing="trailing" if self.eta else None,
            eta=self.eta,
        )

    def draw(self, source, labels: np.ndarray, first: int, seed: int) -> np.ndarray:
        """Draw latents of these classes, float32 ``[N, 4, 8, 8]``, and note the time."""
        from paddle_dit.generation import generate_latents

        indices = first + np.arange(len(labels))
        clocks = time.perf_counter(), time.process_time()
        latents = generate_latents(source.model, labels, self.options(seed), indices=indices, batch_size=len(labels))
        self.seconds.append((time.perf_counter() - clocks[0]) / len(labels))
        self.cpu_seconds.append((time.process_time() - clocks[1]) / len(labels))
        return latents

    def judge(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Note the figures of a seed's digits, uint8 ``[N, H, W, 3]``."""
        from paddle_dit.data.digits import as_digits
        from paddle_dit.evaluation.digit_features import digit_figures
        from paddle_dit.evaluation.digits import judge

        figures = digit_figures(images)
        self.fid.append(figures["fid"])
        self.recall.append(figures["recall"])
        self.accuracy.append(judge(as_digits(images), labels).generated_accuracy)


def rows() -> list[Row]:
    """Return the ways to compare."""
    unguided = [Row(*way, 1.0) for way in UNGUIDED]
    guided = [Row(*BEST, scale) for scale in SCALES]
    intervals = [Row(*BEST, scale, inside) for scale in (GUIDANCE, SCALES[-1]) for inside in INTERVALS]
    noisy = [Row(*NOISY[:2], scale, eta=NOISY[2]) for scale in (GUIDANCE, 1.0)]
    return [Row(*way) for way in SAMPLERS] + unguided + noisy + guided + intervals


def measure(found: list[Row], source, options: Options) -> None:
    """Draw and judge all rows; they take turns batch by batch, so that they meet the same load of the machine."""
    from paddle_dit.models.vae import decode

    labels, size = np.arange(options.samples) % source.info.config.num_classes, options.batch_size
    for row in (row for row in found if row.steps <= FEW):  # warms up
        Row(*row.way).draw(source, labels[:size], 0, 0)
    with tqdm(total=options.seeds * options.samples * len(found), desc="draw", unit="digit", disable=None) as bar:
        for seed in range(options.seeds):
            images: list[list[np.ndarray]] = [[] for _ in found]
            for first in range(0, options.samples, size):
                batch = labels[first : first + size]
                for row, drawn in zip(found, images, strict=True):
                    drawn.append(decode(source.vae, row.draw(source, batch, first, seed), batch_size=size))
                    bar.update(len(batch))
            for row, drawn in zip(found, images, strict=True):
                row.judge(np.concatenate(drawn), labels)


def real_distances(vae) -> dict[str, float]:
    """Return distances of real digits, by which those of drawn ones can be read."""
    from paddle_dit.data.digits import enlarge, load_digits
    from paddle_dit.evaluation.digit_features import DigitFeatures, digit_figures
    from paddle_dit.evaluation.suite import evaluate_arrays
    from paddle_dit.models.vae import decode, encode

    train = load_digits("train")[0]
    shuffled = train[np.random.default_rng(0).permutation(len(train))]
    halves = np.array_split(shuffled, 2)
    decoded = decode(vae, encode(vae, enlarge(train, 32)), batch_size=100)
    return {
        "300 held-out real digits": digit_figures(load_digits("heldout")[0])["fid"],
        "one half of the real training digits to the other": evaluate_arrays(*halves, DigitFeatures())["fid"],
        "the real training digits through the VAE and back": digit_figures(decoded)["fid"],
    }


def over_seeds(values: list[float], digits: int = 2, unit: float = 1.0) -> str:
    """Return the mean, and the deviation over seeds where there are several."""
    mean, deviation = statistics.fmean(values) / unit, statistics.stdev(values) / unit if len(values) > 1 else None
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def ratio_to(base: Row, row: Row) -> list[float]:
    """Return the ratio of the distances, seed by seed."""
    return [own / other for own, other in zip(row.fid, base.fid, strict=True)]


def base_of(found: list[Row], scale: float = GUIDANCE) -> Row:
    """Return the row that others of a guidance are compared with."""
    return next(row for row in found if row.way == (*BASE, scale, None, 0.0))


def table(found: list[Row]) -> str:
    """Return a line for each row; ratios are to ddpm's 250 steps."""
    base = base_of(found)
    base_seconds = statistics.median(base.seconds)
    head = ("sampler", "steps", "spacing", "guidance", "at timesteps", "FID", "ratio", "accuracy, %", "recall")
    head += ("ms a digit", "ratio", "CPU ms a digit")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in found:
        seconds = statistics.median(row.seconds)
        cells = [
            row.name,
            row.steps,
            row.options().spacing,
            f"{row.scale:g}",
            "-" if row.scale == 1 else _interval(row.interval),
        ]
        cells += [over_seeds(row.fid), over_seeds(ratio_to(base, row))]
        cells += [over_seeds(row.accuracy, 1, 0.01), over_seeds(row.recall)]
        cells += [f"{seconds * 1e3:.1f}", f"{seconds / base_seconds:.3f}"]
        cells += [f"{statistics.median(row.cpu_seconds) * 1e3:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _interval(interval: tuple[int, int] | None) -> str:
    return "all" if interval is None else f"{interval[0]} to {interval[1]}"


def verdict(found: list[Row], scale: float) -> str:
    """Say whether the best sampler of ten steps comes near ddpm's 250, both with this guidance everywhere."""
    base = base_of(found, scale)
    few = [row for row in found if row.steps == FEW and row.scale == scale and row.interval is None]
    best = min(few, key=lambda row: statistics.fmean(row.fid))
    ratios = ratio_to(base, best)
    says = "yes" if statistics.fmean(ratios) <= NEAR else "NO"
    return (
        f"guidance {scale:g}: within 5 % of {BASE[0]}'s {BASE[1]} steps ({over_seeds(base.fid)}) in {FEW}? {says}: "
        f"{best.name} has {over_seeds(ratios)} of it"
    )


def plot(found: list[Row], real: dict[str, float], path: Path) -> None:
    """Draw the distance over time for each sampler, and distance and accuracy over guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for place, name in enumerate(dict.fromkeys(row.name for row in found)):
        for scale, line in ((GUIDANCE, "-o"), (1.0, "--s")):
            shown = [row for row in found if (row.name, row.scale, row.interval) == (name, scale, None)]
            shown = sorted(shown, key=lambda row: row.steps)
            where = [statistics.median(row.cpu_seconds) * 1e3 for row in shown]
            _errors(left, where, shown, line, f"C{place}", f"{name}, guidance {scale:g}")
            for x, row in zip(where, shown, strict=True):
                at, above = (x, statistics.fmean(row.fid)), (4, -11 if row.sampler == BEST[0] else 4)
                left.annotate(str(row.steps), at, xytext=above, textcoords="offset points", fontsize=8)
    left.axhspan(min(real.values()), max(real.values()), color="0.6", label="real digits, three ways")
    left.set(xscale="log", xlabel="CPU ms a digit; each point has its number of steps", ylabel="FID, digits' features")
    left.set(title="Samplers", ylim=(0, None))
    _plot_guidance(middle, right, [row for row in found if (row.sampler, row.steps) == BEST])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower right", fontsize=8)
    figure.savefig(path, dpi=100)


def _plot_guidance(distance, accuracy, found: list[Row]) -> None:
    for line, color, inside in zip(("-o", "--s", ":^"), ("C0", "C1", "C2"), (None, *INTERVALS), strict=True):
        shown = sorted((row for row in found if row.interval == inside), key=lambda row: row.scale)
        where = [row.scale for row in shown]
        _errors(distance, where, shown, line, color, f"guided at timesteps: {_interval(inside)}")
        accuracy.plot(where, [100 * statistics.fmean(row.accuracy) for row in shown], line, color=color, markersize=4)
    name = f"{BEST[0]}, {BEST[1]} steps"
    distance.set(xlabel="guidance scale", ylabel="FID, digits' features", ylim=(0, None), title=name)
    accuracy.set(xlabel="guidance scale", ylabel="labelled as asked, %", title=name)


def _errors(axes, where: list[float], found: list[Row], line: str, color: str, label: str) -> None:
    means = [statistics.fmean(row.fid) for row in found]
    spread = [statistics.stdev(row.fid) if len(row.fid) > 1 else 0.0 for row in found]
    axes.errorbar(where, means, spread, fmt=line, color=color, markersize=4, capsize=2, label=label)


@entry_point
def main() -> None:
    """Draw, judge, print and plot."""
    options = parse(Options, description=__doc__)
    options.check()
    runtime.prepare()
    from paddle_dit.data.digits import DIGIT_NAMES
    from paddle_dit.generation import load_generator

    source = load_generator(options.model)
    if source.info.config.num_classes != len(DIGIT_NAMES):
        raise ConfigError(f"{options.model} is no model of the ten digits; run bash scripts/quickstart.sh")
    real = real_distances(source.vae)
    found = rows()
    measure(found, source, options)
    print(f"\n{options.model}: {options.samples:,} digits a row, {options.seeds} seed(s), {CHANNELS} channels guided\n")
    print(table(found))
    print("\nFID of real digits, to read these by\n")
    for name, distance in real.items():
        print(f"  {distance:6.2f}  {name}")
    print()
    for scale in (GUIDANCE, 1.0):
        print(verdict(found, scale))
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(found, real, options.plot)
    print(f"\n{options.plot}    look at it")


if __name__ == "__main__":
    main()
