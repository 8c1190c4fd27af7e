"""A small VAE that nobody trained."""

import paddle
import pytest


def make_vae(blocks=2, **changes):
    """Return an AutoencoderKL of as many blocks: RGB images, scaling factor 0.5 unless changed."""
    from ppdiffusers import AutoencoderKL

    paddle.seed(0)
    types = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    sizes = {"block_out_channels": (8,) * blocks, "norm_num_groups": 4, "sample_size": 16, "scaling_factor": 0.5}
    vae = AutoencoderKL(**types, **sizes | changes)
    vae.eval()
    return vae


@pytest.fixture(scope="module")
def vae():
    return make_vae()
