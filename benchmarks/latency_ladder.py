"""Seconds per image, rung by rung: others' pipelines, ours, and what each step of deployment brings.

    python benchmarks/latency_ladder.py --plot docs/latency-ladder.png
    python benchmarks/latency_ladder.py --model DiT-B/4 --rounds 4 3
    python benchmarks/latency_ladder.py --pipeline outputs/quickstart/pipeline

Every row draws the same latents: same weights (of --pipeline, or random ones), noise, labels, DDIM steps, and guidance
of all channels, as ppdiffusers has it. Each has a process of its own, and they take turns. "loop" is from noise to
latents; the decoder is timed apart. Ratios are medians over the turns, above 1 this row is faster: than the row of
ppdiffusers, than that of PyTorch, than the row that it is a step away from. "error" is the largest difference of the
latents from those of our model in dygraph, fp32, as a share of the largest value, and "levels" that of the images, of
255. "peak" is the main memory that the row's process has had at most. Rows that cannot run say why.

ppdiffusers runs twice: as users run it, with Paddle's own defaults (one thread; OMP_NUM_THREADS is taken out), and with
the settings that our commands give their process.
"""

import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from ladder_plot import draw_bars
from ladder_rows import ROWS, Job
from ladder_weights import DIGITS_VAE, Weights, write_random_model
from turns import FOLDER, Worker

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.deploy.backends import Settings
from paddle_dit.diffusion.options import SamplingOptions
from paddle_dit.errors import ConfigError, PaddleDiTError, entry_point, nearest
from paddle_dit.files import check_writable

EQUAL = 1e-3  # largest error of rows that must draw the same latents: of all steps together, in float32
REFERENCE, PPDIFFUSERS, PYTORCH = "dygraph", "ppdiffusers", "diffusers"
COLUMNS = (
    "loop",
    "p95",
    "images/s",
    "× ppdiffusers",
    "× PyTorch",
    "× before",
    "decoder",
    "peak MiB",
    "error",
    "levels",
)
OURS = ("OMP_NUM_THREADS", "FLAGS_use_stride_kernel", "GLOG_minloglevel", "MKL_DEBUG_CPU_TYPE")  # runtime.prepare's


@dataclass
class Options:
    """What to draw, in which rows."""

    model: str = "DiT-S/4"
    """Preset, with random weights, for 256-pixel images."""
    pipeline: Path | None = None
    """DiTPipeline folder, run or checkpoint to take instead."""
    vae: str | None = None
    """VAE folder or hub name. Default: the pipeline's own; for a preset the digits' small one, as a stand-in."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Images drawn together, ascending."""
    rounds: tuple[int, ...] = (10, 4)
    """Turns timed of each row, after one that is not: for each batch size, or for all alike."""
    num_inference_steps: int = 10
    """DDIM steps."""
    guidance_scale: float | None = None
    """1 is none. Default: 4, or 1 for a model that cannot be guided."""
    guidance_interval: tuple[int, int] = (300, 700)
    """Timesteps between which the row of that name guides."""
    seed: int = 0
    """Of the noise."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Which rows; "dygraph" is measured in any case."""
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Threads of each process. Default: all."""
    device: str = field(default_factory=lambda: "gpu:0" if runtime.sees_gpu() else "cpu")
    """cpu or gpu:0. Default: the GPU where there is one."""
    peer_python: str = field(default_factory=lambda: os.environ.get("PADDLE_DIT_PEERS_PYTHON") or sys.executable)
    """Interpreter that has torch and diffusers (requirements/peers.txt)."""
    plot: Path | None = None
    """PNG to draw."""

    def check(self) -> None:
        """Raise ConfigError for what cannot be measured."""
        for name in self.rows:
            if name not in ROWS:
                raise ConfigError(f"unknown row '{name}'.{nearest(name, ROWS)} Known: {', '.join(ROWS)}")
        if list(self.batch_sizes) != sorted(set(self.batch_sizes)) or not self.batch_sizes or self.batch_sizes[0] < 1:
            raise ConfigError("--batch-sizes must be ascending, from 1: the peak memory of a larger one is the higher")
        if len(self.rounds) not in (1, len(self.batch_sizes)) or min(self.rounds) < 1:
            raise ConfigError("--rounds must be 1 or more for each batch size, or once for all")
        low, high = self.guidance_interval
        if not 0 <= low < high:
            raise ConfigError(f"--guidance-interval {low} {high} is empty; give LOW HIGH with 0 <= LOW < HIGH <= 1000")
        Settings(devices=(self.device,), threads=self.threads)
        if self.plot is not None:
            if self.plot.suffix != ".png" or self.plot.is_dir():
                raise ConfigError(f"--plot {self.plot} is no name of a PNG; let it end in .png")
            check_writable(self.plot.parent, "--plot")


@dataclass
class Times:
    """What was measured of a row at one batch size, in seconds per image and turn."""

    loop: list[float] = field(default_factory=list)
    decoder: list[float] = field(default_factory=list)
    mebibytes: float = 0.0
    error: float = 0.0
    levels: int = 0

    def faster_than(self, other: "Times | None") -> str:
        """Return the median over the turns of the other's seconds by this row's, as text."""
        if other is None:
            return "-"
        return f"{statistics.median(theirs / own for theirs, own in zip(other.loop, self.loop, strict=True)):.2f}"


class Ladder:
    """The rows that run, and the reasons of the others.

    Args:
        options: what was asked for.
        weights: what every row runs.
        job: what every process is told.
    """

    def __init__(self, options: Options, weights: Weights, job: Job):
        self.reasons: dict[str, str] = {}
        self._options, self._job, self.workers = options, job, {}
        path = Path(job.folder) / "job.json"
        path.write_text(json.dumps(asdict(job)), encoding="utf-8")
        for name in [name for name in ROWS if name in (*options.rows, REFERENCE)]:
            print(f"preparing: {ROWS[name].title}", file=sys.stderr, flush=True)
            try:
                weights.prepare(name, ROWS[name], len(job.labels), job.device)
                log = path.with_name(f"{name}.log")
                self.workers[name] = Worker(ROWS[name].title, self._command(name, path), self._environment(name), log)
            except PaddleDiTError as error:
                self._drop(name, error)
        for name, worker in list(self.workers.items()):
            try:
                worker.hello()
            except PaddleDiTError as error:
                self._drop(name, error)

    def _command(self, name: str, path: Path) -> list[str]:
        python = self._options.peer_python if name == PYTORCH else sys.executable
        return [python, str(FOLDER / ("ladder_peers.py" if ROWS[name].peer else "ladder_rows.py")), name, str(path)]

    def _environment(self, name: str) -> dict[str, str | None]:
        threads = {} if name == PPDIFFUSERS else {"OMP_NUM_THREADS": str(self._job.threads)}
        return {**dict.fromkeys(OURS), **threads}

    def _drop(self, name: str, error: PaddleDiTError) -> None:
        if name == REFERENCE:
            raise error
        self.reasons[name] = " ".join(str(error).split())
        if name in self.workers:
            self.workers.pop(name).close()

    def measure(self, batch_size: int, rounds: int) -> dict[str, Times]:
        """Let the rows take turns at one batch size; the first turn warms up and gives the latents to be compared."""
        times: dict[str, Times] = {name: Times() for name in self.workers}
        for turn in range(rounds + 1):
            print(f"batch {batch_size}: turn {turn} of {rounds}", file=sys.stderr, flush=True)
            for name, worker in list(self.workers.items()):
                save = {"save": str(self._drawn(name))} if turn == 0 else {}
                try:
                    answer = worker.ask(batch_size=batch_size, **save)
                except PaddleDiTError as error:
                    self._drop(name, error)
                    times.pop(name)
                    continue
                times[name].mebibytes = answer["mebibytes"]
                if turn:
                    times[name].loop.append(answer["loop"] / batch_size)
                    times[name].decoder.append(answer["decoder"] / batch_size)
        latents, pixels = self._arrays(REFERENCE)
        for name, row in times.items():
            own, image = self._arrays(name)
            row.error = float(np.abs(own - latents).max() / np.abs(latents).max())
            row.levels = int(np.abs(image.astype(int) - pixels).max())
        return times

    def _drawn(self, name: str) -> Path:
        return Path(self._job.folder) / f"drawn-{name}.npz"

    def _arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self._drawn(name), allow_pickle=False) as file:
            return file["latents"], file["pixels"]

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()


def print_table(batch_size: int, times: dict[str, Times]) -> None:
    """Print a line per row, as Markdown has tables."""
    lines = [[f"batch {batch_size}, s/image", *COLUMNS]]
    lines.append(["---"] * len(lines[0]))
    for name, row in times.items():
        median = statistics.median(row.loop)
        cells = (
            ROWS[name].title,
            f"{median:.4f}",
            f"{np.quantile(row.loop, 0.95):.4f}",
            f"{1 / median:.3f}",
            row.faster_than(times.get(PPDIFFUSERS)),
            row.faster_than(times.get(PYTORCH)),
            row.faster_than(times.get(ROWS[name].after)),
            f"{statistics.median(row.decoder):.4f}",
            f"{row.mebibytes:.0f}",
            f"{row.error:.1e}",
            str(row.levels),
        )
        lines.append(list(cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for cells in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")


def describe(options: Options, job: Job, weights: Weights) -> str:
    """Return the line that says under which conditions everything was measured."""
    what = options.pipeline or f"{options.model}, random weights"
    sampling, shape = job.sampling, "x".join(map(str, weights.info.config.sample_shape))
    return (
        f"{what}; latents {shape}; {sampling['num_inference_steps']} DDIM steps, "
        f"guidance {sampling['guidance_scale']:g} of {sampling['guidance_channels']} channels (interval "
        f"{job.interval[0]} to {job.interval[1]}), seed {sampling['seed']}; "
        f"decoder of {weights.vae or 'its own VAE'}; {job.device}, {job.threads} threads of {os.cpu_count()} cores; "
        f"{'/'.join(map(str, options.rounds))} turns; load average {os.getloadavg()[0]:.1f}"
    )


def unequal(batch_size: int, times: dict[str, Times]) -> list[str]:
    """Return the rows that must draw the same latents and do not."""
    wrong = [name for name, row in times.items() if ROWS[name].exact and not row.error <= EQUAL]
    return [f"{ROWS[name].title}, batch {batch_size}: {times[name].error:.1e}" for name in wrong]


@entry_point
def main() -> None:
    """Prepare, measure, print and draw."""
    options = parse(Options, description=__doc__)
    options.check()
    runtime.prepare()
    with tempfile.TemporaryDirectory(prefix="latency-ladder-") as scratch:
        folder = Path(scratch)
        source = options.pipeline or write_random_model(options.model, folder)
        weights = Weights(
            source, options.vae or (None if options.pipeline else DIGITS_VAE), folder, options.peer_python
        )
        config = weights.info.config
        asked = SamplingOptions(
            "ddim",
            options.num_inference_steps,
            options.guidance_scale,
            guidance_channels=config.in_channels,
            seed=options.seed,
            timestep_spacing="leading",
        ).for_model(config)
        sampling = {key: value for key, value in asked.to_dict().items() if key != "guidance_interval"}
        labels = [index % max(1, config.num_classes) for index in range(options.batch_sizes[-1])]
        place = (str(folder), str(source), weights.vae, sampling, options.guidance_interval, labels)
        job = Job(*place, options.device, options.threads)
        ladder, measured, wrong = Ladder(options, weights, job), {}, []
        try:
            for batch_size, rounds in zip(
                options.batch_sizes, np.resize(options.rounds, len(options.batch_sizes)), strict=True
            ):
                measured[batch_size] = ladder.measure(batch_size, int(rounds))
                print_table(batch_size, measured[batch_size])
                wrong += unequal(batch_size, measured[batch_size])
        finally:
            ladder.close()
    print()
    for name, reason in ladder.reasons.items():
        print(f"{ROWS[name].title}: cannot run here: {reason}")
    print(describe(options, job, weights))
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw_bars(measured, options.plot, str(options.pipeline or options.model))
        print(f"wrote {options.plot}")
    if wrong:
        raise PaddleDiTError(f"rows that must draw the same latents differ by more than {EQUAL:g}: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
