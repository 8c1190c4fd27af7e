"""The order of samples is a pure function; its values are frozen, because resumed runs depend on them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_dit.data.order import SampleOrder
from paddle_dit.errors import ConfigError, DataError


def epoch_of(order: SampleOrder, epoch: int) -> np.ndarray:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.concatenate([order.global_batch(step) for step in steps])


@given(num_samples=st.integers(1, 300), data=st.data(), seed=st.integers(0, 2**32))
def test_an_epoch_takes_each_sample_at_most_once_and_drops_only_the_rest(num_samples, data, seed):
    batch = data.draw(st.integers(1, num_samples))
    order = SampleOrder(num_samples, batch, seed)
    seen = epoch_of(order, epoch=data.draw(st.integers(0, 50)))
    assert seen.dtype == np.int64
    assert len(seen) == num_samples - num_samples % batch
    assert len(np.unique(seen)) == len(seen)
    assert seen.min() >= 0
    assert seen.max() < num_samples


def test_a_divisible_epoch_takes_every_sample():
    np.testing.assert_array_equal(np.sort(epoch_of(SampleOrder(96, 8, seed=3), epoch=2)), np.arange(96))


@given(per_rank=st.integers(1, 6), step=st.integers(0, 1000), seed=st.integers(0, 1000))
def test_the_number_of_ranks_does_not_change_the_global_batch(per_rank, step, seed):
    order = SampleOrder(100, 4 * per_rank, seed)
    for world_size in (1, 2, 4):
        parts = [order.local_batch(step, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate([indices for indices, _ in parts]), order.global_batch(step))
        np.testing.assert_array_equal(np.concatenate([positions for _, positions in parts]), np.arange(4 * per_rank))


def test_epochs_and_seeds_differ_and_are_shuffled():
    first, second = (epoch_of(SampleOrder(64, 8, seed=0), epoch) for epoch in (0, 1))
    other = epoch_of(SampleOrder(64, 8, seed=1), 0)
    assert not np.array_equal(first, np.arange(64))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert not np.array_equal(second, other)  # (seed, epoch) = (0, 1) and (1, 0) must not share a stream


def test_a_step_does_not_depend_on_what_was_asked_before():
    order = SampleOrder(50, 7, seed=5)
    jumped = order.global_batch(40)
    for step in range(60):
        order.global_batch(step)
    np.testing.assert_array_equal(order.global_batch(40), jumped)
    np.testing.assert_array_equal(SampleOrder(50, 7, seed=5).global_batch(40), jumped)


def test_the_order_is_frozen():
    order = SampleOrder(10, 5, seed=42)
    assert [order.global_batch(step).tolist() for step in (0, 1, 2)] == [
        [4, 8, 1, 9, 3],
        [6, 0, 7, 2, 5],
        [1, 2, 8, 5, 3],
    ]


def test_mistakes_are_refused():
    with pytest.raises(DataError, match="has 5 samples, fewer than one global batch of 8; use --global-batch-size 5"):
        SampleOrder(5, 8, seed=0)
    with pytest.raises(ConfigError, match="at least 1"):
        SampleOrder(5, 0, seed=0)
    with pytest.raises(ConfigError, match="negative"):
        SampleOrder(5, 1, seed=-1)
    with pytest.raises(ConfigError, match="8 cannot be split over 3 ranks; use a multiple of 3"):
        SampleOrder(80, 8, seed=0).local_batch(0, rank=0, world_size=3)
