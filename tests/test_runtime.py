import os

import numpy as np
import pytest

from paddle_dit.runtime import choose_device, environment, has_gpu, peak_rss


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_the_device_is_the_cpu():
    assert choose_device() == "cpu"


def test_the_environment_has_what_last_bits_depend_on():
    found = environment()
    assert found["threads"] == os.environ["OMP_NUM_THREADS"]
    assert found["numpy"] == np.__version__


def test_the_peak_counts_this_processs_memory_and_never_falls():
    before = peak_rss()
    block = np.ones((before >> 20) + 64 << 17)  # a MiB is 2**17 numbers
    grown = peak_rss()
    assert grown >= block.nbytes
    del block
    assert peak_rss() >= grown
