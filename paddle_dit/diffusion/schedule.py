"""Noise schedules and sampler coefficients as NumPy float64 tables; no Paddle, so that deployment can use them alone.

Notation as in DDPM (Ho et al. 2020): ``q(x_t | x_0) = N(sqrt(alphas_cumprod) x_0, 1 - alphas_cumprod)``.
"""

from dataclasses import dataclass

import numpy as np

from paddle_dit.errors import ConfigError

NUM_TRAIN_TIMESTEPS = 1000


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
        kept = respaced_timesteps(len(self.betas), spacing)
        cumprod = self.alphas_cumprod[kept]
        previous = np.append(1.0, cumprod[:-1])
        return Schedule(1.0 - cumprod / previous, self.timesteps[kept])

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

    ``x <- on_x * x + on_eps * eps + deviation * noise``, where the deviation is given (``sigma``), or comes from the
    model's variance fraction ``v``: ``exp(0.5 * (f * max_log_variance + (1 - f) * min_log_variance))`` with
    ``f = (v + 1) / 2``.

    Attributes:
        timesteps: int64 ``[n]``, what the model is given.
        on_x, on_eps: float64 ``[n]``.
        sigma: float64 ``[n]``, the fixed deviation of the noise; 0 where there is none.
        min_log_variance, max_log_variance: float64 ``[n]``, or None where the variance cannot be learned.
    """

    timesteps: np.ndarray
    on_x: np.ndarray
    on_eps: np.ndarray
    sigma: np.ndarray
    min_log_variance: np.ndarray | None = None
    max_log_variance: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.timesteps)


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
