"""Write data/digits.npz: scikit-learn's 1,797 real 8x8 digits with a fixed stratified split.

Needs scikit-learn (as the file's maker only; reading the file needs NumPy alone).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.cli import parse
from paddle_dit.errors import ConfigError, entry_point

SPLIT_SEED = 0


@dataclass
class Flags:
    """Where the digits go."""

    output: Path = Path("data/digits.npz")
    """File to write."""
    heldout_per_class: int = 30
    """Images of each digit kept away from training."""


def split(labels: np.ndarray, heldout_per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted (train, held-out) indices, int64, with ``heldout_per_class`` of every label held out."""
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:heldout_per_class] for label in np.unique(labels)]
    heldout = np.sort(np.concatenate(chosen)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), heldout), heldout


@entry_point
def main() -> None:
    """Write the file and say what is in it."""
    flags = parse(Flags, description=__doc__)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("making the digits file needs scikit-learn: pip install scikit-learn==1.5.2") from None
    source = load_digits()
    images, labels = source.images.astype(np.uint8), source.target.astype(np.int64)
    if not 0 < flags.heldout_per_class < np.bincount(labels).min():
        raise ConfigError(f"--heldout-per-class must lie in 1..{np.bincount(labels).min() - 1}")
    train, heldout = split(labels, flags.heldout_per_class)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(flags.output, images=images, labels=labels, train_indices=train, heldout_indices=heldout)
    print(f"{flags.output}: {len(images)} images, {len(train)} to train, {len(heldout)} held out")


if __name__ == "__main__":
    main()
