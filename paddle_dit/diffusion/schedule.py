"""Noise schedules and sampler coefficients as NumPy float64 tables; no Paddle, so that deployment can use them alone.

Notation as in DDPM (Ho et al. 2020): ``q(x_t | x_0) = N(sqrt(alphas_cumprod) x_0, 1 - alphas_cumprod)``.
"""

from dataclasses import dataclass

import numpy as np

from paddle_dit.errors import ConfigError, nearest

NUM_TRAIN_TIMESTEPS = 1000
SPACINGS = ("linspace", "leading", "trailing")


@dataclass(frozen=True)
class Schedule:
    """A noise schedule, whole or respaced. Index 0 is the least noisy step.

    Attributes:
        betas: float64 ``[n]``, noise variance added by each step.
        timesteps: int64 ``[n]``, the original timestep that the model is given at each step.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    @classmethod
    def linear(cls, num_timesteps: int = NUM_TRAIN_TIMESTEPS) -> "Schedule":
        """Return the paper's schedule: betas linear from 1e-4 to 0.02 over 1000 steps."""
        scale = 1000 / num_timesteps
        betas = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
        return cls(betas, np.arange(num_timesteps))

    def respaced(self, spacing: str | int) -> "Schedule":
        """Keep some of the timesteps, with betas that preserve ``alphas_cumprod`` there.

        Args:
            spacing: see :func:`respaced_timesteps`.
        """
        return self.keeping(respaced_timesteps(len(self.betas), spacing))

    def keeping(self, indices: np.ndarray) -> "Schedule":
        """Keep the steps of these indices, int64 ascending, with betas that preserve ``alphas_cumprod`` there."""
        cumprod = self.alphas_cumprod[indices]
        previous = np.append(1.0, cumprod[:-1])
        return Schedule(1.0 - cumprod / previous, self.timesteps[indices])

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the signal's variance left after each step."""
        return np.cumprod(1.0 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """``alphas_cumprod`` one step earlier; 1 before the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of ``q(x_{t-1} | x_t, x_0)`` (DDPM, equation 7)."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """Log of the posterior variance; its zero at the first step is replaced by the second step's value."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1] if len(variance) > 1 else self.betas[0], variance[1:]))

    @property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Weight of ``x_0`` in the mean of ``q(x_{t-1} | x_t, x_0)``."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Weight of ``x_t`` in the mean of ``q(x_{t-1} | x_t, x_0)``."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)


def respaced_timesteps(num_timesteps: int, spacing: str | int) -> np.ndarray:
    """Return the timesteps to keep, int64, ascending.

    Args:
        num_timesteps: length of the whole schedule.
        spacing: "250" keeps 250 steps evenly from the first to the last; "10,15,20" divides the schedule into equal
            sections and keeps that many of each; "ddim50" keeps every 20th step from 0 (DDIM's striding).

    Raises:
        ConfigError: no such spacing of that many steps.
    """
    text = str(spacing)
    try:
        if text.startswith("ddim"):
            return _strided(num_timesteps, int(text[4:]))
        return _sections(num_timesteps, [int(count) for count in text.split(",")])
    except ValueError:
        raise ConfigError(
            f"'{text}' is no timestep spacing; write a number such as 250, '10,15,20' or 'ddim50'"
        ) from None


def spaced_timesteps(num_timesteps: int, count: int, spacing: str, skip_zero: bool = False) -> np.ndarray:
    """Return ``count`` timesteps, int64, ascending, by one of the spacings of Lin et al. 2023 (table 2).

    Args:
        num_timesteps: length of the whole schedule.
        count: 1 to ``num_timesteps``; one less with ``skip_zero``.
        spacing: "linspace" has the first and the last timestep, rounded as the paper's code does it; "leading" strides
            from 0 by whole numbers and so may miss the noisiest timesteps; "trailing" strides down from the last one.
        skip_zero: space one more and leave timestep 0 out, as ppdiffusers does for multistep solvers: the step to the
            image begins at the timestep before. "trailing" has no timestep 0 anyway.

    Raises:
        ConfigError: no such spacing, or more timesteps than there are.
    """
    if spacing not in SPACINGS:
        raise ConfigError(
            f"unknown timestep spacing '{spacing}'.{nearest(spacing, SPACINGS)} Known: {', '.join(SPACINGS)}"
        )
    if spacing == "trailing":
        stride = num_timesteps / count
        return np.round(np.arange(num_timesteps, 0, -stride)).astype(np.int64)[count - 1 :: -1] - 1
    points = count + skip_zero
    if points > num_timesteps:
        raise ConfigError(f"this sampler can take at most {num_timesteps - skip_zero} steps, got {count}")
    if spacing == "leading":
        return np.arange(points)[skip_zero:] * (num_timesteps // points)
    return _sections(num_timesteps, [points])[skip_zero:]


def _strided(num_timesteps: int, count: int) -> np.ndarray:
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return np.arange(0, num_timesteps, stride)
    raise ConfigError(
        f"no whole stride keeps {count} of {num_timesteps} timesteps; use '{count}' or a count that divides"
    )


def _sections(num_timesteps: int, counts: list[int]) -> np.ndarray:
    kept, start = [], 0
    size, rest = divmod(num_timesteps, len(counts))
    for index, count in enumerate(counts):
        length = size + (index < rest)
        if not 1 <= count <= length:
            raise ConfigError(f"cannot keep {count} of {length} timesteps; ask for 1 to {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # summed, not multiplied: the paper's code rounds these sums, and halves depend on it
        start += length
    return np.array(kept)


@dataclass(frozen=True)
class SamplerSteps:
    """A sampler as one linear combination per step, in the order of use (from noise to image).

    ``x <- on_x * x + on_eps * eps + on_previous_x0 * previous_x0 + deviation * noise``, where the deviation is given
    (``sigma``), or comes from the model's variance fraction ``v``:
    ``exp(0.5 * (f * max_log_variance + (1 - f) * min_log_variance))`` with ``f = (v + 1) / 2``.

    Attributes:
        timesteps: int64 ``[n]``, what the model is given.
        on_x, on_eps: float64 ``[n]``.
        sigma: float64 ``[n]``, the fixed deviation of the noise; 0 where there is none.
        min_log_variance, max_log_variance: float64 ``[n]``, or None where the variance cannot be learned.
        on_previous_x0: float64 ``[n]``, the weight of the ``x_0`` that the step before predicted, 0 at the first step;
            None for a sampler that looks at one step alone.
        x0_on_x, x0_on_eps: float64 ``[n]``: what a step predicts is ``x0_on_x * x + x0_on_eps * eps``; None likewise.
    """

    timesteps: np.ndarray
    on_x: np.ndarray
    on_eps: np.ndarray
    sigma: np.ndarray
    min_log_variance: np.ndarray | None = None
    max_log_variance: np.ndarray | None = None
    on_previous_x0: np.ndarray | None = None
    x0_on_x: np.ndarray | None = None
    x0_on_eps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def takes_variance(self, step: int) -> bool:
        """Whether a step's noise has the deviation that the model learned, if it did; the last one draws no noise."""
        return self.min_log_variance is not None and step < len(self) - 1


def ddpm_steps(schedule: Schedule) -> SamplerSteps:
    """Return ancestral sampling (DDPM, algorithm 2; learned variance: Nichol and Dhariwal 2021, equation 15).

    The fixed deviation is the larger of DDPM's two (section 3.2: variance ``betas``), which the paper's code takes for
    a model without learned variance.
    """
    cumprod = schedule.alphas_cumprod
    coef1, coef2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    smallest = schedule.posterior_log_variance_clipped
    largest = np.log(schedule.betas)
    sigma = np.sqrt(schedule.betas)
    sigma[0] = 0.0  # the last step draws no noise
    return SamplerSteps(
        timesteps=schedule.timesteps[::-1],
        on_x=(coef1 / np.sqrt(cumprod) + coef2)[::-1],
        on_eps=(-coef1 * np.sqrt(1.0 / cumprod - 1.0))[::-1],
        sigma=sigma[::-1],
        min_log_variance=smallest[::-1],
        max_log_variance=largest[::-1],
    )


def ddim_steps(schedule: Schedule, eta: float = 0.0) -> SamplerSteps:
    """Return DDIM (Song et al. 2021, equation 12); ``eta`` = 0 is deterministic."""
    cumprod, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    sigma = eta * np.sqrt((1 - previous) / (1 - cumprod) * (1 - cumprod / previous))
    on_x = np.sqrt(previous / cumprod)
    on_eps = np.sqrt(np.maximum(1 - previous - sigma**2, 0.0)) - np.sqrt(previous * (1 / cumprod - 1))
    return SamplerSteps(schedule.timesteps[::-1], on_x[::-1], on_eps[::-1], sigma[::-1])


def dpm_solver_steps(schedule: Schedule) -> SamplerSteps:
    """Return DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order, from the last two predictions of ``x_0``.

    The first step knows only one prediction, and the last one ends without noise, at an infinite signal-to-noise
    ratio; both are of first order, as in ppdiffusers and diffusers.
    """
    cumprod = schedule.alphas_cumprod[::-1]
    signal, noise = np.sqrt(cumprod), np.sqrt(1 - cumprod)
    next_signal, next_noise = np.append(signal[1:], 1.0), np.append(noise[1:], 0.0)
    sizes = np.diff(np.log(signal / noise))  # of the steps but the last, in half the log signal-to-noise ratio
    on_x0 = np.append(-next_signal[:-1] * np.expm1(-sizes), 1.0)
    extrapolated = np.zeros(len(schedule))
    extrapolated[1:-1] = sizes[1:] / (2 * sizes[:-1])
    present = on_x0 * (1 + extrapolated)
    return SamplerSteps(
        timesteps=schedule.timesteps[::-1],
        on_x=next_noise / noise + present / signal,
        on_eps=-present * noise / signal,
        sigma=np.zeros(len(schedule)),
        on_previous_x0=-on_x0 * extrapolated,
        x0_on_x=1 / signal,
        x0_on_eps=-noise / signal,
    )


SAMPLER_STEPS = {"ddpm": ddpm_steps, "ddim": ddim_steps, "dpm-solver++": dpm_solver_steps}
