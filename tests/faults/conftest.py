"""What tests of interrupted runs share."""

import pytest

from paddle_dit.evaluation.launch import write_random_latents


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Write 64 random latents of ten classes, once for a module, and return the packed store's folder."""
    return write_random_latents(tmp_path_factory.mktemp("store") / "latents")
