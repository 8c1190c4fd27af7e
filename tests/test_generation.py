import itertools

import numpy as np
import paddle
import pytest

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.data.classes import PAPER_CLASSES
from paddle_dit.data.digits import DIGITS_VAE_FOLDER
from paddle_dit.errors import ConfigError
from paddle_dit.generation import (
    Generator,
    SamplingOptions,
    draw_batches,
    draw_images,
    generate_latents,
    load_generator,
)
from paddle_dit.models.dit import DiT
from paddle_dit.models.vae import decode, find_vae, load_vae

# What a rank of test_two_processes_draw_what_one_draws does: every second image, three at a time.
RANK = """
import os, sys
import numpy as np
from paddle_dit import runtime
runtime.prepare()
from paddle_dit.generation import SamplingOptions, generate_latents
from tests.test_generation import build_model
rank = int(os.environ["PADDLE_TRAINER_ID"])
options = SamplingOptions("ddpm", num_inference_steps=10, guidance_scale=2.0, seed=3)
own = np.arange(rank, 8, 2)
np.save(f"{sys.argv[1]}/{rank}.npy", generate_latents(build_model(), own, options, indices=own, batch_size=3))
"""


def build_model():
    random = np.random.default_rng(0)
    model = DiT(DiTConfig(sample_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10))
    for parameter in model.parameters():
        parameter.set_value(random.normal(0, 0.05, parameter.shape).astype(np.float32))
    model.eval()
    return model


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_an_image_depends_on_its_seed_and_index_alone(model, sampler):
    options = SamplingOptions(sampler, num_inference_steps=10, guidance_scale=2.0, seed=3)
    labels = np.arange(8)
    together = generate_latents(model, labels, options, batch_size=8)
    rounding = 1e-5 * np.abs(together).max()
    for size in (1, 3):
        np.testing.assert_allclose(generate_latents(model, labels, options, batch_size=size), together, atol=rounding)
    alone = generate_latents(model, labels[5:6], options, indices=[5])
    np.testing.assert_allclose(alone[0], together[5], atol=rounding)
    other = generate_latents(model, labels, SamplingOptions(sampler, 10, 2.0, seed=4))
    assert np.abs(other - together).max() > 0.1


@pytest.mark.distributed
def test_two_processes_draw_what_one_draws(model, run_command, tmp_path):
    (tmp_path / "rank.py").write_text(f"import sys; sys.path.insert(0, '.')\n{RANK}")
    result = run_command(tmp_path / "rank.py", tmp_path, processes=2, log_dir=tmp_path / "log")
    assert result.returncode == 0, result.stderr
    options = SamplingOptions("ddpm", num_inference_steps=10, guidance_scale=2.0, seed=3)
    together = generate_latents(model, np.arange(8), options)
    for rank in range(2):
        shared = np.load(tmp_path / f"{rank}.npy")
        np.testing.assert_allclose(shared, together[rank::2], atol=1e-5 * np.abs(together).max())


def test_batches_are_the_images_of_the_latents(model):
    vae = load_vae(DIGITS_VAE_FOLDER)
    options, labels = SamplingOptions("ddim", 4, 2.0), [3, 1, 4, 1, 5]
    source = Generator(model, vae, ModelInfo(model.config))
    batches = list(draw_batches(source, labels, options, first_index=7, batch_size=2))
    assert [batch.shape for batch in batches] == [(2, 32, 32, 3), (2, 32, 32, 3), (1, 32, 32, 3)]
    latents = generate_latents(model, labels, options, indices=range(7, 12), batch_size=2)
    for start, batch in zip(range(0, 5, 2), batches, strict=True):
        np.testing.assert_array_equal(batch, decode(vae, latents[start : start + 2]))
    drawn = draw_images(source, labels, options, batch_size=2, first_index=7)
    np.testing.assert_array_equal(drawn, np.concatenate(batches))


def test_eta_adds_noise_to_ddim(model):
    drawn = [generate_latents(model, [1], SamplingOptions("ddim", 10, 1.0, eta=eta)) for eta in (0.0, 0.5, 0.5)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-2
    np.testing.assert_array_equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    ("options", "name", "first", "last"),
    [
        ({"sampler": "ddpm"}, "linspace", 999, 0),
        ({"sampler": "ddim"}, "leading", 980, 0),
        ({"sampler": "ddim", "num_inference_steps": 30}, "linspace", 999, 0),
        ({"sampler": "dpm-solver++"}, "linspace", 999, 20),
        ({"sampler": "ddim", "timestep_spacing": "trailing"}, "trailing", 999, 19),
    ],
)
def test_timesteps_are_spaced_as_published_unless_it_is_said(options, name, first, last):
    options = SamplingOptions(**{"num_inference_steps": 50, **options})
    steps = options.schedule().timesteps[::-1]
    assert (options.spacing, steps[0], steps[-1]) == (name, first, last)
    assert options.to_dict()["timestep_spacing"] == name


def test_guidance_changes_the_image(model):
    drawn = [
        generate_latents(model, [1], SamplingOptions("ddim", 10, scale, channels))
        for scale, channels in ((1.0, 3), (4.0, 3), (4.0, 4))
    ]
    assert all(np.abs(one - other).max() > 1e-4 for one, other in itertools.pairwise(drawn))


def test_progress_counts_images_step_by_step(model):
    told = []
    generate_latents(model, range(5), SamplingOptions("ddim", 2, 1.0), batch_size=2, report=told.append)
    assert told == [1, 1, 1, 1, 0.5, 0.5]


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "dpm"},
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"sampler": "dpm-solver++", "num_inference_steps": 1000},
        {"seed": -1},
        {"seed": 2**56},
        {"timestep_spacing": "even"},
        {"sampler": "ddim", "eta": 1.5},
        {"sampler": "ddim", "eta": float("nan")},
        {"eta": 0.5},
        {"precision": "fp8"},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        SamplingOptions(**options)


def test_labels_outside_the_model_are_refused(model):
    with pytest.raises(ConfigError, match="class labels must be 0 to 10"):
        generate_latents(model, [11], SamplingOptions("ddim", 2, 1.0))


def test_a_label_without_a_row_is_refused():
    model = DiT(DiTConfig(sample_size=8, hidden_size=48, depth=1, num_heads=4, num_classes=3, class_dropout_prob=0.0))
    with pytest.raises(ConfigError, match="class labels must be 0 to 2"):
        generate_latents(model, [3], SamplingOptions("ddim", 2, 1.0))


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_none_is_refused(model, size):
    with pytest.raises(ConfigError, match="batch_size must be 1 or more"):
        generate_latents(model, [1], SamplingOptions("ddim", 2, 1.0), batch_size=size)


def test_the_largest_seed_draws(model):
    drawn = [generate_latents(model, [1], SamplingOptions("ddim", 2, 1.0, seed=seed)) for seed in (0, 2**56 - 1)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1


@pytest.mark.parametrize(
    ("fields", "scale"), [({}, 4.0), ({"num_classes": 0}, 1.0), ({"class_dropout_prob": 0.0}, 1.0)]
)
def test_the_default_guidance_is_one_that_the_model_can_have(fields, scale):
    config = DiTConfig(sample_size=8, hidden_size=48, depth=1, num_heads=4, **fields)
    assert SamplingOptions().for_model(config).guidance_scale == scale
    assert SamplingOptions(guidance_scale=2.0).for_model(config).guidance_scale == 2.0
    drawn = generate_latents(DiT(config), [0], SamplingOptions("ddim", 2))
    np.testing.assert_array_equal(drawn, generate_latents(DiT(config), [0], SamplingOptions("ddim", 2, scale)))


@pytest.mark.parametrize(
    ("classes", "names", "default", "captions"),
    [
        (1000, None, list(PAPER_CLASSES), ["golden retriever", "Siberian husky"]),
        (1000, {207: "a, b"}, list(PAPER_CLASSES), ["a", "class 360"]),
        (10, None, list(range(8)), ["0", "1"]),
        (2, {0: "cat", 1: "dog", 2: "of another model"}, [0, 1], ["cat", "dog"]),
        (0, None, [0] * 8, ["no class"] * 2),
        (0, {0: "of the data"}, [0] * 8, ["no class"] * 2),
    ],
)
def test_default_labels_are_classes_of_the_model(classes, names, default, captions):
    source = Generator(None, None, ModelInfo(DiTConfig(depth=1, num_classes=classes), names)).classes
    assert source.default_labels() == default
    assert source.resolve(["0"]) == [0]
    assert source.resolve(default) == default
    if classes == 1000 and names is None:
        assert source.name_of(207) == captions[0]
    else:
        assert [source.name_of(label) for label in default[:2]] == captions


def test_the_vae_decodes_with_the_factor_that_the_training_latents_had(model, tmp_path):
    paddle.save(model.state_dict(), str(tmp_path / "model.pdparams"))
    for factor in (None, 0.5):
        info = ModelInfo(model.config, None, find_vae("data/digits_vae", factor, fingerprint=False).record(32))
        info.save(tmp_path / "config.json")
        vae = load_generator(tmp_path / "model.pdparams").vae
        assert vae.config.scaling_factor == (factor or 0.9859727621078491)
