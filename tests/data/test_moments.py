"""Latents drawn from moments: of the right distribution, new at each step, and the same on any number of ranks."""

import itertools

import numpy as np
import pytest

from paddle_dit.data.loader import BatchLoader
from paddle_dit.data.mixture import open_sources
from paddle_dit.data.moments import DrawnLatents, MomentSampler, check_moments
from paddle_dit.data.order import SampleOrder
from paddle_dit.data.source import open_source
from paddle_dit.data.store import StoreWriter
from paddle_dit.data.subset import Subset, hold_out
from paddle_dit.errors import DataError
from paddle_dit.models.vae import draw
from paddle_dit.randomness import Stream, generator

SCALE = 0.25
VAE = {"name": "some/vae", "scaling_factor": SCALE}


def random_moments(count, seed=0, shape=(4, 2, 2)):
    """Return moments whose standard deviations are between a fifth and a half."""
    random = np.random.default_rng(seed)
    mean = random.standard_normal((count, *shape), np.float32)
    return np.concatenate([mean, 2 * np.log(random.uniform(0.2, 0.5, mean.shape))], axis=1).astype(np.float32)


def write_moments(folder, moments=None, flip=None, vae=VAE):
    moments = random_moments(40) if moments is None else moments
    options = {"sample_shape": moments.shape[1:], "num_classes": 4, "dtype": "float32", "kind": "moments"}
    with StoreWriter(folder, vae=vae, flip=flip is not None, shard_size=9, **options) as writer:
        writer.append(moments, np.arange(len(moments)) % 4, flip)
    return folder


@pytest.fixture
def source(tmp_path):
    return open_source(write_moments(tmp_path / "moments"))


def batches(source, count, seed=5, **options):
    with BatchLoader(source, SampleOrder(len(source), 8, seed=1), seed=seed, **options) as loader:
        return list(itertools.islice(loader, count))


def test_a_draw_is_the_mean_and_noise_as_wide_as_the_variance_says_times_the_scale():
    mean, noise = np.float32([[[[3.0]]]]), np.float32([[[[-2.0]]]])
    assert draw(mean, np.float32(2 * np.log(0.5)), noise, 10.0).item() == pytest.approx(10 * (3 - 2 * 0.5))
    assert draw(mean, np.float32([[[[-30.0]]]]), noise, 0.5).dtype == np.float32


def test_over_many_steps_the_draws_have_the_stored_mean_and_variance(source):
    moments, _ = source.gather(np.arange(8))
    mean, log_variance = np.split(moments, 2, axis=1)
    sampler, indices, positions = MomentSampler(source, seed=0), np.arange(8), np.arange(8)
    draws = np.stack([sampler(moments, indices, step, positions) for step in range(4000)])
    deviation = np.exp(log_variance / 2) * SCALE
    # Of 128 values, means within 4.5 standard errors and variances within 4.5 of theirs
    assert (np.abs(draws.mean(axis=0) - mean * SCALE) < 4.5 * deviation / np.sqrt(4000)).all()
    np.testing.assert_allclose(draws.var(axis=0), deviation**2, rtol=4.5 * np.sqrt(2 / 4000))
    correlation = np.corrcoef(((draws - mean * SCALE) / deviation).reshape(4000, -1), rowvar=False)
    assert np.abs(correlation - np.eye(128)).max() < 0.1


def test_the_noise_is_what_a_vae_in_the_training_loop_would_be_given(source):
    batch = batches(source, 4)[3]
    indices, positions = SampleOrder(40, 8, seed=1).local_batch(3)
    mean, log_variance = np.split(source.gather(indices)[0], 2, axis=1)
    noise = [generator(5, Stream.POSTERIOR, 3, place).standard_normal((4, 2, 2), np.float32) for place in positions]
    np.testing.assert_array_equal(batch.latents, draw(mean, log_variance, np.stack(noise), SCALE))
    assert batch.latents.dtype == np.float32


@pytest.mark.parametrize("num_workers", [0, 2])
def test_draws_depend_on_seed_step_and_position_alone(source, num_workers):
    whole = [batch.latents for batch in batches(source, 9)]
    ranks = [batches(source, 9, rank=rank, world_size=2, num_workers=num_workers) for rank in range(2)]
    for expected, *parts in zip(whole, *ranks, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.latents for part in parts]), expected)
    resumed = [batch.latents for batch in batches(source, 3, start_step=6, num_workers=num_workers)]
    np.testing.assert_array_equal(resumed, whole[6:])
    assert not np.isclose(batches(source, 1, seed=6)[0].latents, whole[0]).any()


def test_each_epoch_draws_another_latent_of_a_sample(source):
    latents = np.concatenate([batch.latents for batch in batches(source, 15)])  # three epochs
    assert len({latent.tobytes() for latent in latents}) == 120
    order = SampleOrder(40, 8, seed=1)
    indices = np.concatenate([order.global_batch(step) for step in range(15)])
    three = latents[indices == 7]
    mean, log_variance = np.split(source.gather(np.array([7]))[0], 2, axis=1)
    assert (np.abs(three - mean * SCALE) < 4.5 * SCALE * np.exp(log_variance / 2)).all()


def test_without_a_seed_the_loader_yields_the_moments(source):
    (batch,) = batches(source, 1, seed=None)
    np.testing.assert_array_equal(batch.latents, source.gather(SampleOrder(40, 8, seed=1).global_batch(0))[0])


def test_mirrored_latents_are_drawn_from_the_mirrored_images_moments(tmp_path):
    plain, mirrored = random_moments(40), random_moments(40)
    plain[:, :4], mirrored[:, :4] = 100, -100
    found = batches(open_source(write_moments(tmp_path / "both", plain, mirrored)), 20)
    signs = np.sign(np.concatenate([batch.latents for batch in found]))
    assert (np.ptp(signs, axis=(1, 2, 3)) == 0).all()
    assert 0.3 < (signs[:, 0, 0, 0] > 0).mean() < 0.7


def test_joined_and_chosen_samples_are_drawn_from_alike(tmp_path):
    parts = [write_moments(tmp_path / name, random_moments(20, seed)) for seed, name in enumerate("ab")]
    together = open_source(
        write_moments(tmp_path / "ab", np.concatenate([random_moments(20, seed) for seed in (0, 1)]))
    )
    expected = batches(together, 6)
    for ours, theirs in zip(batches(open_sources(parts), 6), expected, strict=True):
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    chosen, several = open_sources([tmp_path / "ab"], class_subset=["1"]), open_sources(parts, class_subset=["1"])
    for source in (hold_out(several, 2)[0], hold_out(chosen, 2)[0]):
        order = SampleOrder(8, 8, seed=0)
        with BatchLoader(source, order, seed=2) as loader:
            latents, labels = next(loader)[1:3]
        mean = together.gather(chosen.indices[hold_out(chosen, 2)[0].indices[order.global_batch(0)]])[0][:, :4]
        assert np.abs(latents / SCALE - mean).max() < 4.5 * 0.5
        assert (latents.shape, set(labels)) == ((8, 4, 2, 2), {0})


def test_fixed_draws_are_the_same_whenever_and_with_whomever_they_are_gathered(source):
    drawn = DrawnLatents(source, seed=3)
    assert (drawn.kind, drawn.sample_shape, len(drawn), drawn.vae) == ("latents", (4, 2, 2), 40, VAE)
    latents, labels = drawn.gather(np.arange(40))
    np.testing.assert_array_equal(labels, np.arange(40) % 4)
    some = np.array([31, 2, 7])
    np.testing.assert_array_equal(drawn.gather(some)[0], latents[some])
    np.testing.assert_array_equal(DrawnLatents(source, seed=3).gather(some)[0], latents[some])
    assert not np.isclose(DrawnLatents(source, seed=4).gather(some)[0], latents[some]).any()
    for step in (0, 2):  # training sees others
        assert not np.isclose(MomentSampler(source, 3)(source.gather(some)[0], some, step, some), latents[some]).any()
    mean, log_variance = np.split(source.gather(np.arange(40))[0], 2, axis=1)
    noise = (latents / SCALE - mean) / np.exp(log_variance / 2)
    assert noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1000, 177])  # the deviation overflows, or what it and the noise give
def test_moments_that_give_no_finite_latent_name_their_sample(tmp_path, value):
    moments = random_moments(20)
    moments[13, 5] = value
    folder = write_moments(tmp_path / "b", moments, vae={"scaling_factor": 3.0})
    other = write_moments(tmp_path / "a", random_moments(20, 1), vae={"scaling_factor": 3.0})
    alone, both = open_source(folder), open_sources([other, folder])
    for source in (alone, both, Subset(both, np.arange(30, 38), "eight")):
        told = f"sample 13 of {folder} has moments up to {value}, from which no finite latent can be drawn; extract"
        with pytest.raises(DataError, match=told):
            batches(source, 5, num_workers=1)
        with pytest.raises(DataError, match=told):
            DrawnLatents(source, seed=0).gather(np.arange(len(source)))


@pytest.mark.parametrize(
    ("channels", "vae", "told"),
    [
        (4, None, "F holds moments and does not say their VAE's scaling factor, .*pack_features.py .*--scaling-factor"),
        (4, {"name": "some/vae"}, "does not say their VAE's scaling factor"),
        (4, {"scaling_factor": float("nan")}, "F says the VAE's scaling factor is nan, not above 0"),
        (4, {"scaling_factor": 0}, "the VAE's scaling factor is 0, not above 0"),
        (4, {"scaling_factor": float("inf")}, "the VAE's scaling factor is inf, not above 0"),
        (5, VAE, r"moments in F are \[5, 2, 2\], an odd number of channels"),
    ],
)
def test_moments_that_nothing_can_be_drawn_from_are_refused(tmp_path, channels, vae, told):
    source = open_source(write_moments(tmp_path / "moments", np.zeros((8, channels, 2, 2), np.float32), vae=vae))
    with pytest.raises(DataError, match=told) as caught:
        check_moments(source, "F")
    assert "\n" not in str(caught.value)
