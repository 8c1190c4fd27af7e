import itertools

import numpy as np
import paddle
import pytest

from paddle_dit.errors import ConfigError
from paddle_dit.generation import SamplingOptions, generate_latents
from paddle_dit.models.dit import DiT


@pytest.fixture(scope="module")
def model():
    from paddle_dit.config import DiTConfig

    paddle.seed(0)
    model = DiT(DiTConfig(sample_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10))
    for parameter in model.parameters():
        parameter.set_value(0.05 * paddle.randn(parameter.shape))
    model.eval()
    return model


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
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


def test_guidance_changes_the_image(model):
    drawn = [
        generate_latents(model, [1], SamplingOptions("ddim", 10, scale, channels))
        for scale, channels in ((1.0, 3), (4.0, 3), (4.0, 4))
    ]
    assert all(np.abs(one - other).max() > 1e-4 for one, other in itertools.pairwise(drawn))


def test_progress_counts_images(model):
    told = []
    generate_latents(model, range(5), SamplingOptions("ddim", 2, 1.0), batch_size=2, report=told.append)
    assert told == [2, 2, 1]


@pytest.mark.parametrize("options", [{"sampler": "dpm"}, {"num_inference_steps": 0}, {"num_inference_steps": 1001}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        SamplingOptions(**options)


def test_labels_outside_the_model_are_refused(model):
    with pytest.raises(ConfigError, match="class labels must be 0 to 10"):
        generate_latents(model, [11], SamplingOptions("ddim", 2, 1.0))
