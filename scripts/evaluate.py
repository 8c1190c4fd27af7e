"""Measure drawn images against real ones: FID, sFID, Inception Score, precision and recall, as the ADM suite does.

    python scripts/evaluate.py samples.npz VIRTUAL_imagenet256_labeled.npz
    python scripts/evaluate.py samples/ data/imagenet/val --crop 256 --save-stats imagenet256-val.npz
    python scripts/evaluate.py outputs/samples digits-heldout --features digits

SAMPLES and REFERENCE are each a folder of PNGs, an .npz with arr_0 uint8 [N, H, W, 3], or an .npz with statistics (mu,
sigma, mu_s, sigma_s), which serve FID and sFID; one with both, as the ADM suite's references are, gives its statistics
to these two and its images to precision and recall. Published figures are of 50,000 samples. The Inception Score is
over ten splits of any number; that suite's have 5,000 images each, which at 50,000 is the same. Without REFERENCE there
is the Inception Score alone.
"""

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point
from paddle_dit.evaluation.options import Options


@entry_point
def main() -> None:
    """Measure, compare, tell."""
    options = parse(Options, description=__doc__)
    options.check()
    runtime.prepare()
    from paddle_dit.evaluation.job import evaluate

    evaluate(options)


if __name__ == "__main__":
    main()
