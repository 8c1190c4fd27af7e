import dataclasses

import numpy as np
import paddle
import pytest

from paddle_dit.diffusion.guidance import guided
from paddle_dit.diffusion.options import can_guide
from paddle_dit.errors import ConfigError


class Recorder:
    """A model whose output is its label, and which counts the samples it was given."""

    def __init__(self, config):
        self.config, self.batches = config, []

    def __call__(self, x, timesteps, class_labels):
        self.batches.append(x.shape[0])
        value = class_labels.astype("float32").reshape([-1, 1, 1, 1])
        return value.expand([x.shape[0], self.config.out_channels, 8, 8])


def denoise_once(config, timestep=500, **options):
    model = Recorder(config)
    denoise = guided(model, paddle.to_tensor([3, 4]), **options)
    eps, variance = denoise(paddle.zeros([2, 4, 8, 8]), paddle.full([2], timestep, dtype="int64"))
    return eps.numpy(), variance, model.batches


def test_guidance_extrapolates_the_guided_channels_alone(tiny_config):
    eps, variance, batches = denoise_once(tiny_config, guidance_scale=2.0, guidance_channels=3)
    expected = 10 + 2.0 * (np.array([3.0, 4.0]) - 10)  # the null class is 10
    np.testing.assert_allclose(eps[:, :3], np.broadcast_to(expected[:, None, None, None], (2, 3, 8, 8)))
    np.testing.assert_allclose(eps[:, 3, 0, 0], [3, 4])
    np.testing.assert_allclose(variance.numpy()[:, 0, 0, 0], [3, 4])
    assert batches == [4]


def test_all_channels_can_be_guided(tiny_config):
    eps, _, _ = denoise_once(tiny_config, guidance_scale=2.0, guidance_channels=4)
    np.testing.assert_allclose(eps[0], -4.0)


def test_without_guidance_only_the_conditional_half_runs(tiny_config):
    assert denoise_once(tiny_config, guidance_scale=1.0)[2] == [2]
    inside = denoise_once(tiny_config, guidance_scale=2.0, guidance_interval=(500, 501))
    outside = denoise_once(tiny_config, guidance_scale=2.0, guidance_interval=(501, 900))
    assert (inside[2], outside[2]) == ([4], [2])
    np.testing.assert_allclose(outside[0][:, 0, 0, 0], [3, 4])


def test_a_fixed_variance_model_returns_none(tiny_config):
    assert denoise_once(dataclasses.replace(tiny_config, learn_sigma=False), guidance_scale=2.0)[1] is None


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 0.5},
        {"guidance_scale": float("nan")},
        {"guidance_scale": float("inf")},
        {"guidance_channels": 0},
        {"guidance_channels": 5},
        {"guidance_interval": (5, 5)},
        {"guidance_interval": (-1, 5)},
    ],
)
def test_impossible_guidance_is_refused(tiny_config, options):
    with pytest.raises(ConfigError):
        denoise_once(tiny_config, **options)


def test_a_model_without_null_class_cannot_be_guided(tiny_config):
    with pytest.raises(ConfigError, match="label dropout"):
        denoise_once(dataclasses.replace(tiny_config, class_dropout_prob=0.0), guidance_scale=2.0)


def test_an_unconditional_model_is_told_so(tiny_config):
    unconditional = dataclasses.replace(tiny_config, num_classes=0)
    with pytest.raises(ConfigError, match="unconditional model has nothing to guide towards; use --guidance-scale 1"):
        denoise_once(unconditional, guidance_scale=2.0)
    assert can_guide(tiny_config)
    assert not can_guide(unconditional)
