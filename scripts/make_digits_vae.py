"""Train the embedded digits' tiny VAE on the 1,497 training digits and write data/digits_vae.

About seven minutes on one free CPU thread. ``scripts/measure_digits_vae.py`` prints the figures of its README.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.cli import parse
from paddle_dit.data.digits import enlarge, load_digits
from paddle_dit.errors import entry_point
from paddle_dit.runtime import prepare


@dataclass
class Flags:
    """How to train, where to write."""

    output: Path = Path("data/digits_vae")
    """Folder to write."""
    steps: int = 1000
    """Optimizer steps, 32 pictures each."""
    lr: float = 2e-3
    """Peak learning rate; 50 steps of warm-up, then cosine decay to zero."""
    kl_weight: float = 1e-3
    """Weight of the KL divergence per latent value against the mean squared error of pixels in [-1, 1]."""
    seed: int = 0
    """Seed of weights, batches and latent noise."""


def train(flags: Flags, pictures: np.ndarray):
    """Return an AutoencoderKL with 4x8x8 latents, trained on pictures float32 ``[N, 3, 32, 32]`` in [-1, 1]."""
    import paddle
    from ppdiffusers import AutoencoderKL

    paddle.seed(flags.seed)
    rng = np.random.default_rng(flags.seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 16, 32), norm_num_groups=4, sample_size=32)
    decay = paddle.optimizer.lr.CosineAnnealingDecay(flags.lr, T_max=max(flags.steps - 50, 1))
    rate = paddle.optimizer.lr.LinearWarmup(decay, warmup_steps=50, start_lr=flags.lr / 50, end_lr=flags.lr)
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.AdamW(rate, parameters=vae.parameters(), weight_decay=0.0, grad_clip=clip)
    started = time.time()
    for step in range(1, flags.steps + 1):
        x = paddle.to_tensor(pictures[rng.integers(len(pictures), size=32)])
        posterior = vae.encode(x).latent_dist
        # The decoder sees samples, not means: it learns to shrug off the small errors that a sampler leaves in latents.
        error = (vae.decode(posterior.sample()).sample - x).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].size
        (error + flags.kl_weight * kl).backward()
        optimizer.step()
        optimizer.clear_grad()
        rate.step()
        if step % 100 == 0:
            print(f"step {step}: squared error {float(error):.5f}, {time.time() - started:.0f} s", flush=True)
    vae.eval()
    return vae


def standardize(vae, pictures: np.ndarray) -> None:
    """Give all latent channels mean 0 and one common spread, in place, and set ``scaling_factor`` to 1 / spread.

    The change is folded into the 1x1 convolutions on both sides of the latents: decoded pictures stay as they were.
    """
    import paddle

    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(pictures)).latent_dist
        mean = posterior.mean.mean(axis=(0, 2, 3))
        variance = posterior.mean.var(axis=(0, 2, 3)) + posterior.var.mean(axis=(0, 2, 3))
        spread = variance.mean().sqrt()
        gain = spread / variance.sqrt()
        before, after = vae.quant_conv, vae.post_quant_conv
        after.bias.set_value(after.bias + (after.weight[:, :, 0, 0] * mean).sum(axis=1))
        after.weight.set_value(after.weight / gain.reshape([1, -1, 1, 1]))
        before.weight.set_value(before.weight * paddle.concat([gain, paddle.ones_like(gain)]).reshape([-1, 1, 1, 1]))
        before.bias.set_value(paddle.concat([(before.bias[:4] - mean) * gain, before.bias[4:] + 2 * gain.log()]))
    vae.register_to_config(scaling_factor=float(1 / spread))


@entry_point
def main() -> None:
    """Train, standardize, write."""
    flags = parse(Flags, description=__doc__)
    os.environ["OMP_NUM_THREADS"] = "1"  # another number of threads adds up in another order: other weights
    prepare()
    pictures = enlarge(load_digits("train")[0], 32)
    vae = train(flags, pictures)
    standardize(vae, pictures)
    vae.save_pretrained(str(flags.output), safe_serialization=True)


if __name__ == "__main__":
    main()
