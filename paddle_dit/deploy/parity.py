"""Whether an engine computes what the model does: measured before its folder appears, and again whenever it is asked.

What the model gives for fixed inputs lies in the engine's folder, so that comparing again needs no Paddle.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from paddle_dit.config import DiTConfig
from paddle_dit.deploy.engine import REFERENCE
from paddle_dit.deploy.loop import Conditions, combinations
from paddle_dit.deploy.pipeline import InferencePipeline
from paddle_dit.deploy.specs import CACHED_STEP, COEFFICIENTS, DECODER, STEP
from paddle_dit.diffusion.options import SamplingOptions, can_guide
from paddle_dit.diffusion.schedule import NUM_TRAIN_TIMESTEPS
from paddle_dit.errors import DeployError, GenerationError

TIMESTEPS = (NUM_TRAIN_TIMESTEPS - 1, NUM_TRAIN_TIMESTEPS // 2, 0)
SCALE, CHANNELS = 4.0, 3
STEPS = 10
LARGEST_ERROR = 1e-4  # of fp32, as a share of the largest value
LARGEST_DISTANCE, LEAST_PSNR = 0.01, 30.0  # of half precision: relative L2 of a step, and of the image in decibels


@dataclass(frozen=True)
class Figure:
    """One comparison.

    Attributes:
        part: what was compared.
        measure: "max error", "relative L2" or "PSNR".
        value: what was measured.
        limit: what it may be at most, or at least for a PSNR.
    """

    part: str
    measure: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it is within its limit; no number is not."""
        return self.value >= self.limit if self.measure == "PSNR" else self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.part}: {self.measure} {self.value:.3g} ({'ok' if self.passed else 'FAILED'}, {self.limit:g})"


def probe_coefficients(config: DiTConfig) -> np.ndarray:
    """Return coefficients under which no part of a step can hide: the noise is most of x_0, and every term counts."""
    values = {"on_x": 0.7, "on_eps": -0.6, "on_previous_x0": 0.3, "sigma": 0.2, "x0_on_x": -0.25, "x0_on_eps": 1.0}
    values |= {"learned": float(config.learn_sigma), "min_log_variance": -3.0, "max_log_variance": -1.0}
    return np.array([values[name] for name in COEFFICIENTS], np.float32)


def sample_options(config: DiTConfig) -> SamplingOptions:
    """Return how the whole sample is drawn."""
    return SamplingOptions("ddim", STEPS, guidance_channels=min(CHANNELS, config.in_channels), seed=0).for_model(config)


def modes(config: DiTConfig) -> tuple[str, ...]:
    """Return the kinds of step that a model has."""
    return ("guided", "unguided") if can_guide(config) else ("unguided",)


def compare(pipeline: InferencePipeline, reference: Mapping[str, np.ndarray]) -> Iterator[Figure]:
    """Yield the figures of the step program, the decoder, and a whole sample.

    Args:
        pipeline: with the programs to be judged.
        reference: see :func:`paddle_dit.deploy.reference.make_reference`.
    """
    half = pipeline.settings.precision != "fp32"
    largest = len(reference["x"])
    for batch in sorted({min(size, largest) for size in (1, 2, largest)}):
        yield from _steps(pipeline, reference, batch, half)
    for batch in sorted({1, len(reference["latents"])}):
        pixels = pipeline.programs[DECODER].run({"latents": reference["latents"][:batch]})["pixels"]
        yield _figure(f"decoder, batch {batch}", pixels, reference["pixels"][:batch], half)
    drawn = pipeline.draw_latents(reference["labels"][:1], sample_options(pipeline.info.config))
    if not half:  # whose steps may add up to more
        yield _figure(f"sample of {STEPS} steps, latents", drawn, reference["sample_latents"], half)
    try:
        similarity = psnr(pipeline.decode(drawn), reference["sample_image"])
    except GenerationError:  # NaN or infinite; its advice is for who draws
        similarity = float("nan")
    yield Figure(f"sample of {STEPS} steps, image", "PSNR", similarity, LEAST_PSNR)


def _steps(pipeline, reference, batch: int, half: bool) -> Iterator[Figure]:
    programs, config = pipeline.programs, pipeline.info.config
    labels = reference["labels"][:batch]
    program = programs[CACHED_STEP if CACHED_STEP in programs else STEP]
    guided = combinations(config.in_channels, min(CHANNELS, config.in_channels), SCALE)
    for mode in modes(config):
        conditions = Conditions(programs, config, labels, np.array(TIMESTEPS), mode == "guided")
        combination = guided if mode == "guided" else np.ones((1, config.in_channels), np.float32)
        for step, timestep in enumerate(TIMESTEPS):
            outputs = program.run(
                {
                    **{name: reference[name][:batch] for name in ("x", "previous_x0", "noise")},
                    "combination": combination,
                    "coefficients": probe_coefficients(config),
                    **conditions.of(step, len(combination)),
                }
            )
            for name, what in (("x0", "x_0"), ("next_x", "update")):
                part = f"step ({what}), {mode}, batch {batch}, timestep {timestep}"
                yield _figure(part, outputs[name], reference[f"{mode}/{timestep}/{name}"][:batch], half)


def _figure(part: str, found: np.ndarray, wanted: np.ndarray, half: bool) -> Figure:
    if found.shape != wanted.shape:
        raise DeployError(f"{part}: the engine gives {found.shape}, the model {wanted.shape}; export it again")
    difference, wanted = found.astype(np.float64) - wanted, wanted.astype(np.float64)
    if half:
        share = float(np.linalg.norm(difference) / (np.linalg.norm(wanted) or 1))
        return Figure(part, "relative L2", share, LARGEST_DISTANCE)
    return Figure(part, "max error", float(np.abs(difference).max() / (np.abs(wanted).max() or 1)), LARGEST_ERROR)


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in decibels; 100 for equal ones."""
    error = np.square(found.astype(np.float64) - wanted).mean()
    return float(10 * np.log10(255**2 / error)) if error else 100.0


def load_reference(folder: Path) -> dict[str, np.ndarray]:
    """Read what :func:`paddle_dit.deploy.reference.make_reference` made, from an engine's folder.

    Raises:
        DeployError: the file is missing, cut short, damaged, or of another kind.
    """
    try:
        with np.load(folder / REFERENCE, allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, BadZipFile, zlib.error) as error:
        raise DeployError(f"{folder / REFERENCE} cannot be read ({error}); export the engine again") from None


def check(
    pipeline: InferencePipeline,
    reference: Mapping[str, np.ndarray],
    report: Callable[[str], object] = lambda line: None,
) -> dict:
    """Compare everything, and return the figures for ``deploy.json``.

    Args:
        pipeline: see :func:`compare`.
        reference: likewise.
        report: is told each figure in a line.

    Raises:
        DeployError: some are out of their limits; the worst is named.
    """
    figures = []
    for figure in compare(pipeline, reference):
        report(str(figure))
        figures.append(figure)
    failed = [figure for figure in figures if not figure.passed]
    if failed:
        worst = max(failed, key=lambda figure: figure.value / figure.limit if np.isfinite(figure.value) else np.inf)
        raise DeployError(
            f"the engine does not compute what the model does: {len(failed)} of {len(figures)} comparisons failed, "
            f"worst {worst}; choose another --backend or --precision, or export again"
        )
    return {figure.part: {figure.measure: figure.value, "limit": figure.limit} for figure in figures}
