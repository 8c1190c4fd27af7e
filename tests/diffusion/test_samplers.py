import numpy as np
import paddle
import pytest
from ppdiffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from paddle_dit.diffusion.samplers import ddim, ddpm, dpm_solver
from paddle_dit.diffusion.schedule import Schedule, ddim_steps, dpm_solver_steps, spaced_timesteps

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
CUMPROD = Schedule.linear().alphas_cumprod


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


def toy(x, timesteps):
    """A denoiser that depends on everything it is given, with a raw variance between -1 and 1.

    It is close to what standard normal data ask for, so that ``x`` keeps its size and 1e-4 is a strict tolerance.
    """
    t = timesteps.reshape([-1, 1, 1, 1])
    noise = (1 - CUMPROD[t.numpy()]) ** 0.5
    eps = paddle.to_tensor(noise.astype(np.float32)) * (0.9 * x + 0.2 * paddle.tanh(3 * x))
    return eps, paddle.sin(x + 0.003 * t.astype("float32"))


def start():
    return paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 4, 6, 6), dtype=np.float32))


def noise_of(count):
    draws = np.random.default_rng(1).standard_normal((count, 2, 4, 6, 6), dtype=np.float32)
    return lambda i: paddle.to_tensor(draws[i])


def spaced(count, spacing, skip_zero=False):
    return Schedule.linear().keeping(spaced_timesteps(1000, count, spacing, skip_zero))


def drawn_by(scheduler, steps, denoise=toy, **options):
    """Draw with a scheduler of ppdiffusers."""
    scheduler.set_timesteps(steps)
    x = start()
    for timestep in scheduler.timesteps:
        eps, variance = denoise(x, paddle.full([2], int(timestep), dtype="int64"))
        out = paddle.concat([eps, variance], axis=1) if variance is not None else eps
        x = scheduler.step(out, timestep, x, **options).prev_sample
    return x.numpy()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_equals_ppdiffusers(steps, spacing):
    scheduler = DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing)
    expected = drawn_by(scheduler, steps, lambda x, t: (toy(x, t)[0], None))
    drawn = ddim(toy, start(), spaced(steps, spacing), None)
    np.testing.assert_allclose(drawn.numpy(), expected, atol=1e-4)


def test_ddim_with_eta_equals_ppdiffusers(monkeypatch):
    noise = noise_of(20)
    scheduler = DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    x = start()
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(toy(x, timestep.expand([2]))[0], timestep, x, eta=0.7, variance_noise=noise(i)).prev_sample
    drawn = ddim(toy, start(), spaced(20, "leading"), noise, eta=0.7)
    np.testing.assert_allclose(drawn.numpy(), x.numpy(), atol=1e-4)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
def test_ddpm_equals_ppdiffusers(variance, monkeypatch):
    """Its noise is drawn inside; here it is given the noise that ours takes."""
    draws = iter(map(noise_of(50), range(50)))
    monkeypatch.setattr("ppdiffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(draws))
    learned = variance == "learned_range"

    def denoise(x, timesteps):
        eps, raw = toy(x, timesteps)
        return eps, raw if learned else None

    scheduler = DDPMScheduler(**LINEAR, variance_type=variance, clip_sample=False, timestep_spacing="leading")
    expected = drawn_by(scheduler, 50, denoise)
    drawn = ddpm(denoise, start(), spaced(50, "leading"), noise_of(50))
    np.testing.assert_allclose(drawn.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [5, 10, 25])
def test_dpm_solver_equals_ppdiffusers(steps, spacing):
    """Theirs stops at the noise of timestep 0; ours, which goes on to no noise, is stopped there too."""
    scheduler = DPMSolverMultistepScheduler(
        **LINEAR, algorithm_type="dpmsolver++", timestep_spacing=spacing, lower_order_final=False
    )
    expected = drawn_by(scheduler, steps, lambda x, t: (toy(x, t)[0], None))
    kept = np.append(0, spaced_timesteps(1000, steps, spacing, skip_zero=True))
    drawn = dpm_solver(toy, start(), Schedule.linear().keeping(kept), None, progress=lambda steps: list(steps)[:-1])
    np.testing.assert_allclose(drawn.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize("steps", [10, 25])
def test_deterministic_samplers_equal_diffusers(sampler, steps):
    """The schedulers of PyTorch's diffusers, whose multistep solver goes on to no noise as ours does."""
    torch = pytest.importorskip("torch", reason="PyTorch and diffusers are optional (requirements/peers.txt)")
    diffusers = pytest.importorskip("diffusers", reason="PyTorch and diffusers are optional (requirements/peers.txt)")
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing="leading")
        drawn = ddim(toy, start(), spaced(steps, "leading"), None)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR, final_sigmas_type="zero")
        drawn = dpm_solver(toy, start(), spaced(steps, "linspace", skip_zero=True), None)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(start().numpy())
    for timestep in scheduler.timesteps:
        eps, _ = toy(paddle.to_tensor(x.numpy()), paddle.full([2], int(timestep), dtype="int64"))
        x = scheduler.step(torch.from_numpy(eps.numpy()), timestep, x).prev_sample
    np.testing.assert_allclose(drawn.numpy(), x.numpy(), atol=1e-4)


def error_on_a_gaussian(steps_of, stride):
    """Return the error at timestep 199 of a solver that starts at 999, in float64.

    For data N(0.5, 0.3^2) the exact noise is known, and the probability-flow ODE keeps the standardized ``x_t``.
    """
    mean, deviation = 0.5, 0.3
    schedule = Schedule.linear().keeping(np.arange(199, 1000, stride))
    steps, cumprod = steps_of(schedule), schedule.alphas_cumprod[::-1]
    spread = np.sqrt(cumprod * deviation**2 + 1 - cumprod)
    x, previous_x0 = 1.3, 0.0
    for i in range(len(steps) - 1):
        eps = np.sqrt(1 - cumprod[i]) * (x - np.sqrt(cumprod[i]) * mean) / spread[i] ** 2
        x0 = (x - np.sqrt(1 - cumprod[i]) * eps) / np.sqrt(cumprod[i])
        x = steps.on_x[i] * x + steps.on_eps[i] * eps
        if steps.on_previous_x0 is not None:
            x, previous_x0 = x + steps.on_previous_x0[i] * previous_x0, x0
    exact = np.sqrt(cumprod[-1]) * mean + spread[-1] / spread[0] * (1.3 - np.sqrt(cumprod[0]) * mean)
    return abs(x - exact)


@pytest.mark.parametrize(("steps_of", "order"), [(ddim_steps, 1), (dpm_solver_steps, 2)])
def test_the_error_falls_with_the_solvers_order(steps_of, order):
    errors = [error_on_a_gaussian(steps_of, stride) for stride in (40, 20, 10, 5)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, order, atol=0.05)
    assert orders[-1] == pytest.approx(order, abs=0.01)
