import numpy as np
import pytest

from paddle_dit.data.order import SampleOrder
from paddle_dit.data.source import open_source
from paddle_dit.data.subset import Subset, hold_out, spread
from paddle_dit.errors import DataError


@pytest.fixture
def source(latent_store):
    return open_source(latent_store)


def test_a_subset_gathers_the_samples_of_the_whole(source):
    subset = Subset(source, np.array([3, 40, 7]), "three")
    assert len(subset) == 3
    for found, expected in zip(subset.gather(np.array([2, 0])), source.gather(np.array([7, 3])), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(subset.labels, source.labels[[3, 40, 7]])
    for name in ("kind", "sample_shape", "vae", "num_classes", "label_names"):
        assert getattr(subset, name) == getattr(source, name)


@pytest.mark.parametrize("count", [1, 17, 63])
def test_the_held_out_and_the_rest_are_disjoint_and_complete(source, count):
    rest, held_out = hold_out(source, count)
    assert len(held_out) == count
    np.testing.assert_array_equal(np.sort(np.concatenate([rest.indices, held_out.indices])), np.arange(64))


def test_the_choice_is_the_same_every_time_and_no_mere_head_or_tail(source):
    first, second = hold_out(source, 16)[1].indices, hold_out(source, 16)[1].indices
    np.testing.assert_array_equal(first, second)
    assert 0 < first.min() + 63 - first.max() < 32
    assert not np.array_equal(first, np.arange(first[0], first[0] + 16))


def test_held_out_samples_never_reach_training(source):
    rest, held_out = hold_out(source, 17)
    hidden = {sample.tobytes() for sample in held_out.gather(np.arange(17))[0]}
    order = SampleOrder(len(rest), 16, seed=0)
    seen = {
        sample.tobytes()
        for step in range(20 * order.steps_per_epoch)
        for sample in rest.gather(order.global_batch(step))[0]
    }
    assert len(seen) == 47
    assert not seen & hidden


def test_fingerprints_tell_splits_apart(source):
    rest, held_out = hold_out(source, 16)
    other = hold_out(source, 17)[0]
    assert len({source.fingerprint, rest.fingerprint, held_out.fingerprint, other.fingerprint}) == 4
    assert hold_out(source, 16)[0].fingerprint == rest.fingerprint


@pytest.mark.parametrize("count", [64, 65])
def test_something_must_be_left_to_train_on(source, count):
    with pytest.raises(DataError, match=f"64 samples, too few to hold out {count}; use a smaller --held-out-samples"):
        hold_out(source, count)


def test_a_spread_is_even_and_at_most_everything(source):
    np.testing.assert_array_equal(spread(source, 4).indices, [0, 16, 32, 48])
    np.testing.assert_array_equal(spread(source, 1000).indices, np.arange(64))
