"""Measure the embedded digits' VAE on the 300 held-out digits: the figures of data/digits_vae/README.md.

The judge is an SVM trained on the 1,497 real training digits (needs scikit-learn).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.cli import parse
from paddle_dit.data.digits import DIGITS_VAE_FOLDER, enlarge, load_digits, shrink
from paddle_dit.errors import ConfigError, DataError, entry_point
from paddle_dit.runtime import prepare


@dataclass
class Flags:
    """Which VAE to measure."""

    vae: Path = DIGITS_VAE_FOLDER
    """Folder with config.json and safetensors weights."""


def reconstruct(vae, pictures: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """Encode to the mean, add Gaussian ``noise`` (in units of the latents' spread), decode; ``[N, 3, 32, 32]``."""
    import paddle

    paddle.seed(0)
    with paddle.no_grad():
        latents = vae.encode(paddle.to_tensor(pictures)).latent_dist.mode()
        latents = latents + paddle.randn(latents.shape) * (noise / vae.config.scaling_factor)
        return vae.decode(latents).sample.clip(-1, 1).numpy()


def print_errors(vae) -> None:
    """Print reconstruction errors and how often the judge changes its mind, without and with latent noise."""
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise ConfigError("the judge needs scikit-learn: pip install scikit-learn==1.5.2") from None
    train_digits, train_labels = load_digits("train")
    judge = SVC(gamma=0.001).fit(train_digits.reshape(-1, 64), train_labels)
    for split in ("train", "heldout"):
        digits, _ = load_digits(split)
        pictures, verdict = enlarge(digits, 32), judge.predict(digits.reshape(-1, 64))
        for noise in (0.0, 0.1, 0.2):
            rebuilt = reconstruct(vae, pictures, noise)
            error = np.abs(rebuilt - pictures).mean() * 127.5
            same = (judge.predict(shrink(rebuilt).reshape(-1, 64)) == verdict).mean()
            print(f"{split}, latent noise {noise}: mean error {error:.2f} of 255, judged as the original {same:.1%}")


def print_latents(vae) -> None:
    """Print what a diffusion model will see: per channel mean, spread of samples, spread of the posterior."""
    import paddle

    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(enlarge(load_digits("train")[0], 32))).latent_dist
        means, noise = (value.numpy() * vae.config.scaling_factor for value in (posterior.mean, posterior.std))
        started = time.time()
        vae.decode(posterior.mean[:600])
        seconds = time.time() - started
    for channel in range(means.shape[1]):
        mean, inner = means[:, channel], noise[:, channel]
        spread = np.sqrt(mean.var() + np.square(inner).mean())
        print(f"channel {channel}: mean {mean.mean():+.3f}, spread {spread:.3f}, of it noise {inner.mean():.3f}")
    print(f"scaling factor {vae.config.scaling_factor:.4f}; 600 pictures decoded in {seconds:.1f} s")


@entry_point
def main() -> None:
    """Load, measure, print."""
    flags = parse(Flags, description=__doc__)
    if not (flags.vae / "config.json").is_file():
        raise DataError(f"{flags.vae} holds no VAE; make one with scripts/make_digits_vae.py")
    prepare()
    from paddle_dit.models.vae import load_vae

    vae = load_vae(flags.vae)
    print_errors(vae)
    print_latents(vae)


if __name__ == "__main__":
    main()
