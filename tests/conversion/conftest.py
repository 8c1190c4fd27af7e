"""Tiny random models, saved the ways a user may hold them."""

import numpy as np
import pytest

from paddle_dit.config import DiTConfig, ModelInfo


@pytest.fixture(scope="session")
def tiny():
    """Return a function: fields that differ -> (tensors, info) of a random model in which no layer is zero."""

    def build(seed=0, label_names=None, vae=None, **fields):
        from paddle_dit.models.dit import DiT

        small = {"sample_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
        config = DiTConfig(**{**small, **fields})
        rng = np.random.default_rng(seed)
        shapes = {name: tensor.shape for name, tensor in DiT(config).state_dict().items()}
        tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
        return tensors, ModelInfo(config, label_names, vae)

    return build


@pytest.fixture(scope="session")
def tiny_vae():
    """Return an untrained AutoencoderKL: 3x16x16 images, 4x8x8 latents, scaling factor 0.5."""
    import paddle
    from ppdiffusers import AutoencoderKL

    paddle.seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, scaling_factor=0.5)
    vae.eval()
    return vae
