import numpy as np
import paddle
import pytest

from paddle_dit.diffusion.samplers import ddpm
from paddle_dit.diffusion.schedule import Schedule


def ancestral(x, schedule, eps_of, noise, log_variance_of):
    """The paper's sampling loop, transcribed: predict x_0, then draw from the posterior with the model's variance."""
    cumprod = schedule.alphas_cumprod
    for i, index in enumerate(reversed(range(len(schedule)))):
        x0 = np.sqrt(1 / cumprod[index]) * x - np.sqrt(1 / cumprod[index] - 1) * eps_of(x)
        mean = schedule.posterior_mean_coef1[index] * x0 + schedule.posterior_mean_coef2[index] * x
        x = mean + (index != 0) * np.exp(0.5 * log_variance_of(index)) * noise[i]
    return x


@pytest.mark.parametrize("learned", [False, True])
def test_ddpm_draws_as_the_papers_loop(learned):
    schedule, random = Schedule.linear().respaced(10), np.random.default_rng(0)
    x, noise = random.standard_normal((2, 3, 4, 4)), random.standard_normal((10, 2, 3, 4, 4))
    low = schedule.posterior_log_variance_clipped
    fixed = np.log(np.append(schedule.posterior_variance[1], schedule.betas[1:]))

    def log_variance_of(index):
        return 0.75 * np.log(schedule.betas[index]) + 0.25 * low[index] if learned else fixed[index]

    def denoise(x, timesteps):
        return paddle.tanh(x), paddle.full_like(x, 0.5) if learned else None

    expected = ancestral(x, schedule, np.tanh, noise, log_variance_of)
    drawn = ddpm(denoise, paddle.to_tensor(x), schedule, lambda i: paddle.to_tensor(noise[i]))
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=1e-9)
