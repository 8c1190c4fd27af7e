import numpy as np
import pytest

from paddle_dit.diffusion.schedule import (
    SPACINGS,
    Schedule,
    ddim_steps,
    ddpm_steps,
    dpm_solver_steps,
    respaced_timesteps,
    spaced_timesteps,
)
from paddle_dit.errors import ConfigError


def test_respacing_keeps_alphas_cumprod():
    whole = Schedule.linear()
    for spacing in (250, "ddim50", "10,20,30", 1):
        part = whole.respaced(spacing)
        np.testing.assert_allclose(part.alphas_cumprod, whole.alphas_cumprod[part.timesteps], rtol=1e-12)


def test_sections_divide_the_schedule():
    kept = respaced_timesteps(300, "10,15,20")
    assert [((kept >= low) & (kept < low + 100)).sum() for low in (0, 100, 200)] == [10, 15, 20]
    assert kept[0] == 0
    assert kept[-1] == 299


def sums_of_strides(num_timesteps, count):
    """The paper's code: the stride is added up, and each sum is rounded."""
    stride, position, kept = (num_timesteps - 1) / (count - 1), 0.0, []
    for _ in range(count):
        kept.append(round(position))
        position += stride
    return kept


@pytest.mark.parametrize("count", [21, 23, 31, 35, 183, 250, 999])
def test_timesteps_are_rounded_sums_of_strides(count):
    assert respaced_timesteps(1000, count).tolist() == sums_of_strides(1000, count)


def test_rounded_sums_differ_from_rounded_products():
    """21 steps lie 49.95 apart; the tenth step is 499.5, which the sum misses by its rounding errors."""
    assert respaced_timesteps(1000, 21)[10] == 499
    assert round(49.95 * 10) == 500


@pytest.mark.parametrize("spacing", ["0", "1001", "ddim7000", "ddim300", "many", "", "10,-1", "ddim"])
def test_impossible_spacings_are_refused(spacing):
    with pytest.raises(ConfigError):
        Schedule.linear().respaced(spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("skip_zero", [False, True])
def test_every_spacing_keeps_as_many_timesteps_as_asked(spacing, skip_zero):
    for count in range(1, 1000):
        kept = spaced_timesteps(1000, count, spacing, skip_zero)
        assert len(kept) == count
        assert 0 <= kept[0] <= kept[-1] <= 999
        assert (np.diff(kept) > 0).all()


def test_spacings_begin_and_end_where_they_say():
    kept = {spacing: spaced_timesteps(1000, 10, spacing) for spacing in SPACINGS}
    assert {spacing: (steps[0], steps[-1]) for spacing, steps in kept.items()} == {
        "linspace": (0, 999),
        "leading": (0, 900),
        "trailing": (99, 999),
    }
    assert spaced_timesteps(1000, 10, "linspace", skip_zero=True)[[0, -1]].tolist() == [100, 999]
    np.testing.assert_array_equal(kept["linspace"], respaced_timesteps(1000, "10"))
    np.testing.assert_array_equal(kept["leading"], respaced_timesteps(1000, "ddim10"))


@pytest.mark.parametrize(
    ("count", "spacing", "told"),
    [(10, "trailling", "Did you mean 'trailing'"), (1000, "linspace", "at most 999 steps, got 1000")],
)
def test_a_spacing_that_cannot_be_is_refused(count, spacing, told):
    with pytest.raises(ConfigError, match=told):
        spaced_timesteps(1000, count, spacing, skip_zero=True)


@pytest.mark.parametrize("steps_of", [ddpm_steps, ddim_steps, dpm_solver_steps])
@pytest.mark.parametrize("spacing", [1000, 250, 10, 1])
def test_samplers_recover_the_only_point(steps_of, spacing):
    """If the data is one point, exact noise prediction leads to it, whatever the start."""
    schedule = Schedule.linear().respaced(spacing)
    steps, point, x = steps_of(schedule), 0.7, -1.3
    cumprod = schedule.alphas_cumprod[::-1]
    for i in range(len(steps)):
        eps = (x - np.sqrt(cumprod[i]) * point) / np.sqrt(1 - cumprod[i])
        x = steps.on_x[i] * x + steps.on_eps[i] * eps
        if steps.on_previous_x0 is not None and i > 0:
            x += steps.on_previous_x0[i] * point  # which every step before has predicted
    assert x == pytest.approx(point, abs=1e-9)


def test_ddpm_keeps_the_variance_of_standard_normal_data():
    """For data N(0, 1), x_t stays N(0, 1), and the exact noise prediction is sqrt(1 - alphas_cumprod) x_t."""
    schedule = Schedule.linear()
    steps, variance = ddpm_steps(schedule), 1.0
    for i, cumprod in enumerate(schedule.alphas_cumprod[::-1][:-1]):
        factor = steps.on_x[i] + steps.on_eps[i] * np.sqrt(1 - cumprod)
        variance = factor**2 * variance + np.exp(steps.max_log_variance[i])
        assert variance == pytest.approx(1.0, abs=2e-3)


def test_ddim_with_eta_one_has_the_posterior_deviation():
    schedule = Schedule.linear().respaced(100)
    np.testing.assert_allclose(ddim_steps(schedule, eta=1.0).sigma[::-1] ** 2, schedule.posterior_variance, atol=1e-12)


def test_the_fixed_deviation_is_the_larger_one_without_noise_at_the_last_step():
    """The paper's code for a model without learned variance (FIXED_LARGE)."""
    schedule = Schedule.linear().respaced(50)
    variance = np.append(schedule.posterior_variance[1], schedule.betas[1:])
    variance[0] = 0.0
    np.testing.assert_allclose(ddpm_steps(schedule).sigma[::-1] ** 2, variance, rtol=1e-12)
    assert ddpm_steps(Schedule.linear().respaced(1)).sigma.tolist() == [0.0]
