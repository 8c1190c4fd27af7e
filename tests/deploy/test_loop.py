import numpy as np
import pytest

from paddle_dit.deploy import specs
from paddle_dit.deploy.export import build_pipeline
from paddle_dit.deploy.loop import coefficient_rows, combinations
from paddle_dit.deploy.specs import CACHED_STEP, COEFFICIENTS, CONDITIONING, DECODER, STEP
from paddle_dit.diffusion.options import SamplingOptions
from paddle_dit.errors import ConfigError
from paddle_dit.generation import generate_latents

from .conftest import make_source

FORMS = {"plain": (STEP, DECODER), "cached": (CONDITIONING, CACHED_STEP, DECODER)}


def assert_equal(drawn, wanted):
    np.testing.assert_allclose(drawn, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddpm"},
        {"sampler": "ddim", "guidance_channels": 4},
        {"sampler": "ddim", "eta": 0.7, "guidance_scale": 1.0},
        {"sampler": "ddim", "guidance_interval": (200, 800)},
        {"sampler": "dpm-solver++", "timestep_spacing": "trailing"},
    ],
)
def test_every_sampler_draws_what_generation_draws(source, options, form):
    options = SamplingOptions(**{"num_inference_steps": 6, "guidance_scale": 3.0, "seed": 5, **options})
    wanted = generate_latents(source.model, [3, 1, 4, 1], options, indices=range(2, 6))
    pipe = build_pipeline(source, "dygraph", FORMS[form])
    assert_equal(pipe.draw_latents([3, 1, 4, 1], options, first_index=2), wanted)


@pytest.mark.parametrize(
    "fields",
    [
        {"learn_sigma": False},
        {"frequency_shift": 0, "sample_size": (4, 8)},
        {"num_classes": 0},
        {"class_dropout_prob": 0.0},
        {"num_classes": 1},
    ],
)
def test_every_kind_of_model_draws_what_generation_draws(fields):
    source = make_source(**fields)
    options = SamplingOptions("ddpm", 4, seed=1)
    pipe = build_pipeline(source, "dygraph")
    assert_equal(pipe.draw_latents([0, 0], options), generate_latents(source.model, [0, 0], options))


def test_a_table_of_some_steps_at_a_time_changes_nothing(source, monkeypatch):
    options, labels = SamplingOptions("ddpm", 7, 2.0), [3, 9, 3]
    pipe = build_pipeline(source, "dygraph")
    whole = pipe.draw_latents(labels, options)
    rows = []
    conditioning = pipe.programs[CONDITIONING]
    run = conditioning.run

    def counted(inputs, keep):
        rows.append((len(inputs["timesteps"]), list(inputs["class_labels"])))
        return run(inputs, keep=keep)

    monkeypatch.setattr(conditioning, "run", counted)
    monkeypatch.setattr(specs, "TABLE_BYTES", 3 * 3 * 4 * specs.modulation_width(source.info.config))
    assert_equal(pipe.draw_latents(labels, options), whole)
    assert rows == [(3, [3, 9, 10]), (3, [3, 9, 10]), (1, [3, 9, 10])]  # each class once, and the null class
    rows.clear()
    pipe.draw_latents(labels, SamplingOptions("ddpm", 3, 1.0))
    assert rows == [(3, [3, 9])]


def test_unguided_steps_compute_one_copy(source):
    pipe = build_pipeline(source, "dygraph", FORMS["plain"])
    copies, run = [], pipe.programs[STEP].run
    pipe.programs[STEP].run = lambda inputs, keep: copies.append(len(inputs["class_labels"])) or run(inputs, keep=keep)
    pipe.draw_latents([1], SamplingOptions("ddim", 5, 2.0, guidance_interval=(300, 700)))
    assert copies == [1, 2, 2, 1, 1]


def test_coefficients_are_the_tables_of_the_samplers():
    steps = SamplingOptions("ddpm", 5).steps()
    learned, fixed = (coefficient_rows(steps, learn_sigma) for learn_sigma in (True, False))
    column = {name: index for index, name in enumerate(COEFFICIENTS)}
    np.testing.assert_array_equal(learned[:, column["on_eps"]], steps.on_eps.astype(np.float32))
    np.testing.assert_array_equal(learned[:, column["learned"]], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(learned[:, column["sigma"]], np.zeros(5))
    np.testing.assert_array_equal(fixed[:, column["sigma"]], steps.sigma.astype(np.float32))
    np.testing.assert_array_equal(fixed[:, column["learned"]], np.zeros(5))
    np.testing.assert_array_equal(combinations(4, 3, 4.0), [[4, 4, 4, 1], [-3, -3, -3, 0]])


def test_progress_counts_images_step_by_step(source):
    told = []
    build_pipeline(source, "dygraph").draw_latents([1, 2], SamplingOptions("ddim", 2), batch_size=1, report=told.append)
    assert told == [0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([11], {}),
        ([1], {"guidance_scale": 0.5}),
        ([1], {"guidance_channels": 5}),
        ([1], {"guidance_interval": (500, 500)}),
    ],
)
def test_what_cannot_be_drawn_is_refused(source, labels, options):
    with pytest.raises(ConfigError):
        build_pipeline(source, "dygraph").draw_latents(labels, SamplingOptions("ddim", 2, **options))
