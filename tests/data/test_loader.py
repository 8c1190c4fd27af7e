"""Prefetching changes speed, never what is yielded."""

import itertools
import threading
import time

import numpy as np
import pytest

from paddle_dit.data.loader import BatchLoader
from paddle_dit.data.order import SampleOrder
from paddle_dit.errors import DataError


class Numbers:
    """Sample ``n`` is the number ``n`` (mirrored, ``-n``) with label ``n % 3``; sample ``broken`` cannot be read."""

    kind = "latents"

    def __init__(self, count=40, broken=None, has_flip=False):
        self.count, self.broken, self.has_flip = count, broken, has_flip
        self.gathered = 0
        self.threads = set()

    def __len__(self):
        return self.count

    def gather(self, indices, flipped=None):
        self.threads.add(threading.current_thread().name)
        self.gathered += 1
        if self.broken in indices:
            raise DataError(f"sample {self.broken} is broken")
        values = np.float32(indices) if flipped is None else np.where(flipped, -np.float32(indices), indices)
        return values.reshape(-1, 1, 1, 1), indices % 3


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batch-loader")]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_the_order_of_their_steps(num_workers):
    source, order = Numbers(), SampleOrder(40, 8, seed=1)
    with BatchLoader(source, order, rank=1, world_size=2, start_step=3, num_workers=num_workers) as loader:
        batches = list(itertools.islice(loader, 20))
    assert [batch.step for batch in batches] == list(range(3, 23))
    for step, latents, labels, positions in batches:
        indices, expected_positions = order.local_batch(step, 1, 2)
        np.testing.assert_array_equal(latents.reshape(-1), indices)
        np.testing.assert_array_equal(labels, indices % 3)
        np.testing.assert_array_equal(positions, expected_positions)
    assert (threading.current_thread().name in source.threads) == (num_workers == 0)


def test_a_resumed_loader_yields_what_the_first_would_have():
    source, order = Numbers(), SampleOrder(40, 8, seed=1)
    with BatchLoader(source, order, num_workers=2) as first, BatchLoader(source, order, start_step=7) as resumed:
        whole = list(itertools.islice(first, 12))
        rest = list(itertools.islice(resumed, 5))
    for batch, expected in zip(rest, whole[7:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_is_raised_at_the_step_it_belongs_to(num_workers):
    order = SampleOrder(40, 4, seed=0)
    broken = int(order.global_batch(6)[2])
    seen = []

    def consume(loader):
        for batch in loader:
            seen.append(batch.step)

    with (
        BatchLoader(Numbers(broken=broken), order, num_workers=num_workers) as loader,
        pytest.raises(DataError, match=f"sample {broken} is broken"),
    ):
        consume(loader)
    assert seen == list(range(6))


def test_reading_ahead_is_bounded_and_closing_stops_it():
    source = Numbers()
    loader = BatchLoader(source, SampleOrder(40, 4, seed=0), num_workers=2)
    next(loader)
    assert loader_threads()
    time.sleep(0.3)  # far longer than an unbounded reader would need to go further
    assert source.gathered == 4  # two batches per worker
    loader.close()
    loader.close()
    assert not loader_threads()
    assert list(loader) == []


def test_mirrored_samples_are_chosen_by_seed_step_and_position():
    def signs(seed, ranks=1, start_step=0):
        order, parts = SampleOrder(40, 8, seed=1), []
        for rank in range(ranks):
            flags = {"rank": rank, "world_size": ranks, "start_step": start_step, "seed": seed}
            with BatchLoader(Numbers(has_flip=True), order, num_workers=1, **flags) as loader:
                parts.append([np.signbit(batch.latents).reshape(-1) for batch in itertools.islice(loader, 50)])
        return np.concatenate(parts, axis=1)

    whole = signs(0)
    assert whole.mean() == pytest.approx(0.5, abs=0.1)
    for changes in (whole[1:] != whole[:-1], whole[:, 1:] != whole[:, :-1]):  # of a position, and within a batch
        assert changes.mean() == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(signs(0, ranks=2), whole)
    np.testing.assert_array_equal(signs(0, start_step=10)[:40], whole[10:])
    assert (signs(1) != whole).any()


def test_a_source_without_mirrored_samples_is_read_as_it_is():
    with BatchLoader(Numbers(), SampleOrder(40, 8, seed=1), seed=0) as loader:
        assert all((batch.latents >= 0).all() for batch in itertools.islice(loader, 10))
