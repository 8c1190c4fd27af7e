"""Ranks that wait for one another for longer than gloo does, and a launcher that signals many of them in turn."""

import pytest

from tests.faults.runs import TRAIN, checkpoints, flags_of, losses, start, wrapped

# gloo gives up after 30 seconds without a word.
SLOW_SAVES = """
import time
from paddle_dit import checkpoint
write = checkpoint._write
def slowly(*arguments):
    time.sleep(33)
    write(*arguments)
checkpoint._write = slowly
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_may_take_longer_than_gloos_patience(store, tmp_path, async_save):
    folder = tmp_path / "run"
    flags = flags_of(TRAIN, store, folder, 2, max_steps=2, ckpt_every=2, async_save=async_save)
    with start(wrapped(tmp_path, TRAIN, SLOW_SAVES), 2, *flags, log=tmp_path / "log") as launch:
        assert launch.wait(120) == 0, launch.text
    assert checkpoints(folder) == [2]
    assert len(losses(folder)) == 2
