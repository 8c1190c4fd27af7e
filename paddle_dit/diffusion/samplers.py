"""Samplers: short functions from noise to latents over a ``denoise`` callable.

``denoise(x, timesteps) -> (eps, variance or None)`` takes ``x [N, C, H, W]`` and one int64 timestep per sample; the
variance is the model's raw fraction in [-1, 1]. :mod:`paddle_dit.diffusion.guidance` makes such a callable of a model.
Coefficients are the float64 tables of :mod:`paddle_dit.diffusion.schedule`.
"""

from collections.abc import Callable, Iterable

import paddle

from paddle_dit.diffusion.schedule import SamplerSteps, Schedule, ddim_steps, ddpm_steps, dpm_solver_steps

Denoise = Callable[[paddle.Tensor, paddle.Tensor], tuple[paddle.Tensor, paddle.Tensor | None]]
Noise = Callable[[int], paddle.Tensor]
Progress = Callable[[Iterable[int]], Iterable[int]]


def ddpm(denoise: Denoise, x, schedule: Schedule, noise: Noise, progress: Progress = iter):
    """Draw by ancestral sampling (DDPM, algorithm 2) with the learned variance where the model has one.

    Args:
        denoise: see the module.
        x: the starting noise, float32 ``[N, C, H, W]``.
        schedule: the schedule, respaced to the number of steps wanted.
        noise: ``noise(i)`` returns standard normal noise like ``x`` for the i-th step in order of use.
        progress: wraps the iterator over the steps, for a progress bar.
    """
    return sample(denoise, x, ddpm_steps(schedule), noise, progress)


def ddim(denoise: Denoise, x, schedule: Schedule, noise: Noise, progress: Progress = iter, eta: float = 0.0):
    """Draw by DDIM (Song et al. 2021); deterministic for ``eta`` = 0. Arguments as for :func:`ddpm`."""
    return sample(denoise, x, ddim_steps(schedule, eta), noise, progress)


def dpm_solver(denoise: Denoise, x, schedule: Schedule, noise: Noise, progress: Progress = iter):
    """Draw by DPM-Solver++(2M) (Lu et al. 2022b); deterministic, no noise is drawn. Arguments as for :func:`ddpm`."""
    return sample(denoise, x, dpm_solver_steps(schedule), noise, progress)


@paddle.no_grad()
def sample(denoise: Denoise, x, steps: SamplerSteps, noise: Noise, progress: Progress = iter):
    """Draw with the coefficients of any sampler. The other arguments as for :func:`ddpm`."""
    x0 = None
    for i in progress(range(len(steps))):
        eps, variance = denoise(x, paddle.full([x.shape[0]], int(steps.timesteps[i]), dtype="int64"))
        previous_x0 = x0
        if steps.on_previous_x0 is not None:
            x0 = float(steps.x0_on_x[i]) * x + float(steps.x0_on_eps[i]) * eps
        x = float(steps.on_x[i]) * x + float(steps.on_eps[i]) * eps
        if previous_x0 is not None:
            x = x + float(steps.on_previous_x0[i]) * previous_x0
        if variance is not None and steps.takes_variance(i):
            low, high = float(steps.min_log_variance[i]), float(steps.max_log_variance[i])
            x = x + paddle.exp(0.5 * (low + 0.5 * (variance + 1.0) * (high - low))) * noise(i)
        elif steps.sigma[i] > 0:
            x = x + float(steps.sigma[i]) * noise(i)
    return x
