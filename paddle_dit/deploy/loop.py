"""The loop from noise to latents over the programs of an engine; nothing here imports Paddle.

It draws what :func:`paddle_dit.generation.generate_latents` does for the same options: the coefficients, the noise and
the rules of guidance are the same code.
"""

from collections.abc import Callable, Mapping

import numpy as np

from paddle_dit.config import DiTConfig
from paddle_dit.deploy.backends import Program
from paddle_dit.deploy.specs import CACHED_STEP, COEFFICIENTS, CONDITIONING, STEP, table_steps
from paddle_dit.diffusion.options import SamplingOptions, check_guidance
from paddle_dit.diffusion.schedule import SamplerSteps
from paddle_dit.randomness import ImageNoise


def coefficient_rows(steps: SamplerSteps, learn_sigma: bool) -> np.ndarray:
    """Return what each step's input "coefficients" holds, float32 ``[n, 9]``."""
    rows = np.zeros((len(steps), len(COEFFICIENTS)), np.float32)
    for column, name in enumerate(COEFFICIENTS):
        values = getattr(steps, name, None)
        if values is not None:
            rows[:, column] = values
    learned = np.array([learn_sigma and steps.takes_variance(step) for step in range(len(steps))])
    rows[:, COEFFICIENTS.index("learned")] = learned
    rows[learned, COEFFICIENTS.index("sigma")] = 0
    return rows


def combinations(channels: int, guided: int, scale: float) -> np.ndarray:
    """Return the weights of the predictions with and without the class, float32 ``[2, C]``.

    Args:
        channels: of the latents.
        guided: how many of them are guided, from the first.
        scale: of the guidance.
    """
    weights = np.zeros((2, channels), np.float32)
    weights[0], weights[0, :guided], weights[1, :guided] = 1, scale, 1 - scale
    return weights


class Conditions:
    """The inputs of each step that say for which timestep and classes it is.

    Args:
        programs: by name; with a cached step, tables are made by the conditioning program for many steps at once.
        config: of the model.
        labels: int64 ``[N]``.
        timesteps: int64, in the order of use.
        guided: whether any of the steps is.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        config: DiTConfig,
        labels: np.ndarray,
        timesteps: np.ndarray,
        guided: bool,
    ):
        self._conditioning = programs[CONDITIONING] if CACHED_STEP in programs else None
        self._timesteps = timesteps
        self._pairs = np.stack([labels, np.full_like(labels, config.null_class)])
        self._labels, rows = np.unique(self._pairs if guided else labels, return_inverse=True)
        self._rows = np.resize(rows, self._pairs.shape).astype(np.int64)
        self._window = table_steps(config, len(self._labels))
        self._start, self._table = -1, None

    def of(self, step: int, copies: int) -> dict:
        """Return the inputs of a step; ``copies`` is 2 where it is guided, else 1."""
        if self._conditioning is None:
            timesteps = np.full((copies, self._pairs.shape[1]), self._timesteps[step], np.int64)
            return {"timesteps": timesteps, "class_labels": self._pairs[:copies]}
        start = step // self._window * self._window
        if start != self._start:
            timesteps = np.ascontiguousarray(self._timesteps[start : start + self._window], dtype=np.int64)
            inputs = {"timesteps": timesteps, "class_labels": self._labels}
            self._table = None  # freed before the next is made
            self._start, self._table = start, self._conditioning.run(inputs, keep=True)["modulation"]
        return {"modulation": self._table, "rows": self._rows[:copies] + (step - start) * len(self._labels)}


def draw_latents(
    programs: Mapping[str, Program],
    config: DiTConfig,
    labels: np.ndarray,
    indices: np.ndarray,
    options: SamplingOptions,
    report: Callable[[float], object] = lambda amount: None,
) -> np.ndarray:
    """Draw one batch.

    Args:
        programs: ``cached_step`` and ``conditioning``, or ``step``.
        config: of the model.
        labels: int64 ``[N]``.
        indices: numbers of the images among those of the seed, ``[N]``.
        options: with a guidance scale.
        report: is told after each step what part of the images it was; N in all.

    Returns:
        float32 ``[N, C, H, W]``, scaled as the model was trained.

    Raises:
        ConfigError: guidance that the model cannot have.
    """
    check_guidance(config, options.guidance_scale, options.guidance_channels, options.guidance_interval)
    steps = options.steps()
    rows = coefficient_rows(steps, config.learn_sigma)
    guides = [options.guides_at(timestep) for timestep in steps.timesteps]
    conditions = Conditions(programs, config, labels, steps.timesteps, any(guides))
    guided = combinations(config.in_channels, options.guidance_channels, options.guidance_scale)
    alone = np.ones((1, config.in_channels), np.float32)
    noise, nothing = (
        ImageNoise(options.seed, indices, config.sample_shape),
        np.zeros((len(labels), *config.sample_shape), np.float32),
    )
    program = programs[CACHED_STEP if CACHED_STEP in programs else STEP]
    x, x0, last = noise(), nothing, len(steps) - 1
    for step in range(len(steps)):
        combination = guided if guides[step] else alone
        learned, sigma = (rows[step, COEFFICIENTS.index(name)] for name in ("learned", "sigma"))
        inputs = {
            "x": x,
            "combination": combination,
            "coefficients": rows[step],
            "previous_x0": x0,
            "noise": noise() if learned or sigma else nothing,
            **conditions.of(step, len(combination)),
        }
        outputs = program.run(inputs, keep=step < last)
        x, x0 = outputs["next_x"], outputs["x0"]
        report(len(labels) / len(steps))
    return x
