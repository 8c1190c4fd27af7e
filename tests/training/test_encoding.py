"""Latents of images are made within training as nothing else in it notices, in any precision."""

import numpy as np
import paddle
import pytest

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.models.vae import encode, load_vae
from paddle_dit.randomness import Stream, generator
from paddle_dit.training.encoding import Encoder
from paddle_dit.training.precision import Precision
from tests.digit_images import SIZE, VAE
from tests.half_precision import overflow_in, use_float16_weights

INFO = ModelInfo(DiTConfig(sample_size=8, hidden_size=48, depth=1, num_heads=4), None, {"name": VAE})


@pytest.fixture(scope="module")
def encoder():
    return Encoder(INFO, 7, Precision())


def pixels(count):
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def test_latents_are_drawn_from_the_vaes_distribution_by_seed_step_and_position(encoder):
    images, positions = pixels(20), np.arange(100, 120)
    noise = [
        generator(7, Stream.POSTERIOR, 3, place).standard_normal((4, 8, 8), dtype=np.float32) for place in positions
    ]
    inputs = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    expected = encode(load_vae(VAE), inputs, np.stack(noise))
    latents = encoder(images, 3, positions)
    assert (latents.dtype, latents.shape) == (np.float32, (20, 4, 8, 8))
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    np.testing.assert_allclose(encoder(images[5:9], 3, positions[5:9]), expected[5:9], atol=1e-5)
    assert np.abs(encoder(images, 4, positions) - expected).max() > 0.01
    assert np.abs(encoder(images, 3, positions + 1) - expected).max() > 0.01


def test_encoding_leaves_no_trace_in_training(encoder):
    paddle.seed(3)
    expected = paddle.randn([4]).numpy()
    paddle.seed(3)
    encoder(pixels(2), 0, np.arange(2))
    np.testing.assert_array_equal(paddle.randn([4]).numpy(), expected)
    assert paddle.is_grad_enabled()
    assert not encoder.vae.training
    assert all(weight.grad is None for weight in encoder.vae.parameters())


def test_what_half_precision_cannot_hold_is_encoded_in_float32(encoder, monkeypatch):
    told, images, positions = [], pixels(20), np.arange(20)
    use_float16_weights(monkeypatch, lambda: narrow.vae)
    narrow = Encoder(INFO, 7, Precision("fp16"), told.append)
    assert 0 < np.abs(narrow(images, 0, positions) - encoder(images, 0, positions)).max() < 0.1
    assert told == []
    wide = Encoder(INFO, 7, Precision())
    for one in (narrow, wide):
        overflow_in(one.vae.quant_conv.bias)
    for step in (0, 1):
        np.testing.assert_array_equal(narrow(images, step, positions), wide(images, step, positions))
    assert told == ["fp16 overflows in this VAE: such batches are computed in float32; bf16 has float32's range"]


def test_latents_are_multiplied_by_what_the_model_was_told(encoder):
    own = encoder.vae.config.scaling_factor
    told = {"name": VAE, "scaling_factor": own / 2, "config_scaling_factor": own}
    other = Encoder(ModelInfo(INFO.config, None, told), 7, Precision())
    images, positions = pixels(2), np.arange(2)
    np.testing.assert_allclose(other(images, 0, positions), encoder(images, 0, positions) / 2, rtol=1e-6)
