"""Images become latents and latents images by the paper's conventions, whatever the VAE, its scale and the size."""

import numpy as np
import paddle
import pytest

from paddle_dit.data.digits import enlarge, load_digits
from paddle_dit.errors import ConfigError
from paddle_dit.half_precision import GuardedPrecision
from paddle_dit.models.vae import (
    LARGEST_TILE,
    check_fits,
    decode,
    encode,
    find_vae,
    fit_vae,
    load_vae,
    moments,
    normalized,
)
from tests.half_precision import overflow_in, use_float16_weights
from tests.models.conftest import make_vae


def test_encode_scales_the_mean_or_a_draw(vae):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    noise = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(images)).latent_dist
    mean, std = posterior.mean.numpy(), posterior.std.numpy()
    assert encode(vae, images).dtype == np.float32
    assert np.allclose(encode(vae, images), 0.5 * mean, atol=1e-6)
    assert np.allclose(encode(vae, images, noise), 0.5 * (mean + std * noise), atol=1e-6)


def test_decode_rounds_as_the_papers_evaluation(vae):
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8), dtype=np.float32)
    with paddle.no_grad():
        pictures = vae.decode(paddle.to_tensor(latents / 0.5)).sample.numpy()
    expected = np.clip(127.5 * pictures + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    images = decode(vae, latents, batch_size=2)
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_channels_that_do_not_fit(vae):
    with pytest.raises(ConfigError, match="VAE's latents have 4 channels, the model's 3"):
        decode(vae, np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ConfigError, match="images of 3 channels, got 1"):
        encode(vae, np.zeros((1, 1, 16, 16), np.float32))


def test_another_scale_than_the_training_latents(vae):
    for trained in (None, {"name": "v"}, {"name": "v", "scaling_factor": 0.5}, {"scaling_factor": 0.50001}):
        check_fits(vae, 4, trained)
    with pytest.raises(ConfigError, match=r"scales latents by 0\.5, .*\(other\) by 0\.18215; give that one with --vae"):
        check_fits(vae, 4, {"name": "other", "scaling_factor": 0.18215})


def test_a_tensor_is_encoded_as_an_array_is(vae):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(encode(vae, paddle.to_tensor(images)), encode(vae, images))


@pytest.mark.parametrize(
    ("blocks", "channels", "options"), [(1, 3, {}), (3, 16, {}), (2, 16, {"use_quant_conv": False})]
)
def test_any_number_of_channels_and_blocks(tmp_path, blocks, channels, options):
    if options:  # as the VAEs of 16 channels that are around
        options |= {"use_post_quant_conv": False, "shift_factor": 0.0609}
    made = make_vae(blocks, latent_channels=channels, **options)
    made.save_pretrained(str(tmp_path))
    vae, found = load_vae(tmp_path), find_vae(tmp_path)
    assert (found.latent_channels, found.factor) == (channels, 2 ** (blocks - 1))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 24)).astype(np.float32)
    latents = encode(vae, images)
    assert latents.shape == (2, channels, 16 // found.factor, 24 // found.factor)
    assert decode(vae, latents).shape == decode(vae, latents, tile=4).shape == (2, 16, 24, 3)
    with pytest.raises(ConfigError, match=f"the VAE's latents have {channels} channels, the model's 4; give the VAE"):
        fit_vae(vae, 4)


def test_another_scaling_factor_than_the_configs_may_be_asked_for(vae, tmp_path):
    vae.save_pretrained(str(tmp_path))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    asked = load_vae(tmp_path, 0.25)
    np.testing.assert_array_equal(encode(asked, images), encode(vae, images) / 2)
    np.testing.assert_array_equal(decode(asked, encode(asked, images)), decode(vae, encode(vae, images)))
    plain, other = find_vae(tmp_path), find_vae(tmp_path, 0.25)
    assert (other.scaling_factor, other.config_scaling_factor) == (0.25, 0.5)
    assert plain.fingerprint != other.fingerprint
    assert plain == find_vae(tmp_path, 0.5)
    record = {"name": str(tmp_path), "scaling_factor": 0.5, "image_size": 64}
    assert plain.record(64) == record
    assert other.record(64) == record | {"scaling_factor": 0.25, "config_scaling_factor": 0.5}
    for factor in (0, -1, float("nan"), float("inf")):
        for look in (find_vae, load_vae):
            with pytest.raises(ConfigError, match=r"scaling factor must be above 0 and at most 1,000,000, got"):
                look(tmp_path, factor)


def test_latents_are_divided_by_what_they_were_multiplied_by(vae, tmp_path):
    vae.save_pretrained(str(tmp_path / "vae"))
    trained, latents = find_vae(tmp_path / "vae", 0.25).record(64), np.ones((1, 4, 8, 8), np.float32)
    fitted = load_vae(tmp_path / "vae")
    expected = decode(load_vae(tmp_path / "vae", 0.25), latents)
    assert np.abs(decode(fitted, latents).astype(int) - expected).max() > 1
    for _ in range(2):  # the second finds the factor that was used
        fit_vae(fitted, 4, trained)
        np.testing.assert_array_equal(decode(fitted, latents), expected)
    fitted.save_pretrained(str(tmp_path / "saved"))
    assert find_vae(tmp_path / "saved").scaling_factor == 0.25
    for known in (None, {"name": "v"}, {"scaling_factor": 0.50001}):
        plain = load_vae(tmp_path / "vae")
        fit_vae(plain, 4, known)
        assert plain.config.scaling_factor == 0.5
    with pytest.raises(ConfigError, match=r"scales latents by 0\.1, the one .*vae\) by 0\.5; give that one with --vae"):
        fit_vae(load_vae(tmp_path / "vae", 0.1), 4, trained)
    for damage in ({"scaling_factor": "much"}, {"config_scaling_factor": None}):
        with pytest.raises(ConfigError, match="is no scaling factor; restore it"):
            fit_vae(load_vae(tmp_path / "vae"), 4, trained | damage)


def test_pixels_become_what_a_division_of_them_is():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    expected = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    np.testing.assert_array_equal(normalized(pixels).numpy(), expected)


def test_log_variances_are_clamped_as_the_vaes_own(vae):
    wide = make_vae()
    wide.quant_conv.bias.set_value(np.float32([0, 0, 0, 0, 50, -50, 0, 0]))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    with paddle.no_grad():
        posterior = wide.encode(paddle.to_tensor(images)).latent_dist
    mean, log_variance = moments(wide, images)
    np.testing.assert_array_equal(mean, posterior.mean.numpy())
    np.testing.assert_array_equal(log_variance, posterior.logvar.numpy())
    assert (log_variance.min(), log_variance.max()) == (-30, 20)


@pytest.mark.parametrize("channel", [0, 4])  # of a mean; of a log-variance, which clamped would look finite
def test_what_float16_cannot_hold_is_encoded_and_decoded_in_float32(monkeypatch, channel):
    vae, said = make_vae(), []
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8), dtype=np.float32)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    use_float16_weights(monkeypatch, lambda: vae)
    precision = GuardedPrecision("fp16", "this VAE", said.append)
    narrow, wide = moments(vae, images, precision)[0], moments(vae, images)[0]
    assert 0 < np.abs(narrow - wide).max() < 0.01
    assert np.abs(decode(vae, latents, precision=precision).astype(int) - decode(vae, latents)).max() <= 2
    assert not said
    overflow_in(vae.decoder.conv_out.bias)
    bias = np.zeros(8, np.float32)
    bias[channel] = 1e5
    vae.quant_conv.bias.set_value(bias)
    np.testing.assert_array_equal(moments(vae, images, precision), moments(vae, images))
    for tile in (8, 4):
        whole = decode(vae, latents, 2, tile=tile)
        np.testing.assert_array_equal(decode(vae, latents, 2, precision=precision, tile=tile), whole)
    assert said == ["fp16 overflows in this VAE: such batches are computed in float32; bf16 has float32's range"]
    assert precision.overflows == 1 + 2 + 3 * 9


@pytest.fixture(scope="module")
def page():
    """Return the digits' VAE, and the latents of 6 x 6 of them as one image."""
    vae = load_vae("data/digits_vae")
    digits = enlarge(load_digits("train")[0][:36], 32).reshape(6, 6, 3, 32, 32)
    return vae, encode(vae, digits.transpose(2, 0, 3, 1, 4).reshape(1, 3, 192, 192))


@pytest.mark.parametrize(("height", "width"), [(48, 48), (37, 48), (48, 33)])
def test_tiles_are_nearly_the_whole_and_leave_no_seams(page, height, width):
    vae, latents = page[0], page[1][:, :, :height, :width]
    whole, tiled = (decode(vae, latents, tile=tile).astype(float) for tile in (64, 32))
    assert tiled.shape == whole.shape == (1, 4 * height, 4 * width, 3)
    difference = np.abs(tiled - whole)  # GroupNorm and attention see a tile, not the page
    assert 0 < difference.mean() < 6
    assert difference.max() < 40
    for axis in (1, 2):
        jumps = np.abs(np.diff(tiled - whole, axis=axis)).mean(axis=(0, 3 - axis, 3))
        assert jumps.max() < 4


def test_larger_latents_than_a_tile_are_decoded_in_tiles_one_by_one(vae, monkeypatch):
    latents = np.random.default_rng(0).standard_normal((2, 4, 2, LARGEST_TILE + 1), dtype=np.float32)
    seen, whole = [], vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda z: seen.append(z.shape) or whole(z))
    decode(vae, latents[..., 1:])
    assert seen == [[2, 4, 2, LARGEST_TILE]]
    seen.clear()
    assert decode(vae, latents).shape == (2, 4, 2 * LARGEST_TILE + 2, 3)
    assert seen == 4 * [[1, 4, 2, (LARGEST_TILE + 1 + LARGEST_TILE // 4 + 1) // 2]]
