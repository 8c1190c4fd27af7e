"""Fine-tune a digits model that knows 0 to 4 to all ten digits in several ways, beside training from scratch.

    python benchmarks/finetune_digits.py

Every way takes the same number of steps on the same data, by configs/finetune-digits.yaml. Then the averaged weights
draw digits, and a classifier that saw only real digits says how many are what was asked for. The table does not depend
on the machine's speed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.data.digits import DIGITS_VAE_FOLDER
from paddle_dit.errors import entry_point

KNOWN = ("0", "1", "2", "3", "4")
WAYS = {  # name -> flags beside those of the recipe
    "all weights, matching labels kept": ["--init-from"],
    "all weights, --reset-labels": ["--reset-labels", "--init-from"],
    "labels, final layer, biases": ["--train-only", "y_embedder*", "final_layer*", "*bias*", "--init-from"],
    "labels and biases": ["--train-only", "y_embedder*", "*bias*", "--init-from"],
    "labels alone": ["--train-only", "y_embedder*", "--init-from"],
}


@dataclass
class Options:
    """What to compare."""

    output: Path = Path("outputs/finetune-digits")
    """Folder of the runs; earlier ones in it are put aside."""
    pretrain_steps: int = 2000
    """Updates of the model that knows 0 to 4."""
    steps: int = 400
    """Updates of each way."""
    samples: int = 500
    """Digits drawn for each row."""
    seed: int = 0
    """Of training and drawing."""


def train(*flags: object) -> None:
    """Run train.py, as a user would."""
    from paddle_dit.evaluation.quickstart import run_command

    run_command([sys.executable, "train.py", *map(str, flags), "--no-visualdl", "--no-progress-bar"], "training")


def shares(run: Path, options: Options, classes: int = 10) -> list[float]:
    """Return the share of drawn digits that are labelled as asked: of all, of 0 to 4, of 5 to 9."""
    from paddle_dit.data.digits import as_digits
    from paddle_dit.evaluation.digits import judge
    from paddle_dit.evaluation.quickstart import draw_digits

    images, labels = draw_digits(run, options.samples, options.seed, classes)
    digits = as_digits(images)
    parts = [labels >= 0, labels < len(KNOWN), labels >= len(KNOWN)]
    return [judge(digits[part], labels[part]).generated_accuracy if part.any() else np.nan for part in parts]


def compare(options: Options) -> dict[str, list[float]]:
    """Pre-train, fine-tune in every way, draw and judge; return the shares of each."""
    from paddle_dit.evaluation.quickstart import write_digits
    from paddle_dit.models.vae import load_vae

    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    write_digits(output / "latents", "train", load_vae(str(DIGITS_VAE_FOLDER)))
    common = ["--feature-path", output / "latents", "--global-seed", options.seed, "--no-resume"]
    quiet = ["--image-logging-steps", -1, "--eval-steps", -1, "--eval-path", None]
    first = ["-c", "configs/train-digits.yaml", *common, *quiet, "--max-steps", options.pretrain_steps]
    tuned = ["-c", "configs/finetune-digits.yaml", *common, "--max-steps", options.steps]
    pretrained, scratch = output / "pretrained", output / "scratch"
    train(*first, "--output-dir", pretrained, "--class-subset", *KNOWN)
    found = {"digits 0 to 4, as trained": shares(pretrained, options, len(KNOWN))}
    for number, (way, flags) in enumerate(WAYS.items()):
        run = output / f"way-{number}"
        train(*tuned, "--output-dir", run, *flags, pretrained)
        found[way] = shares(run, options)
    train(*tuned, "--output-dir", scratch, "--init-from", None, "--model", "DiT-Digits/2")
    return {**found, "from scratch": shares(scratch, options)}


@entry_point
def main() -> None:
    """Compare and print."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    rows = compare(options)
    print(f"\n{options.steps} steps, {options.samples} digits drawn\n")
    print("| way | drawn as asked | 0 to 4 | 5 to 9 |\n| --- | --- | --- | --- |")
    for way, row in rows.items():
        print(f"| {way} | " + " | ".join("" if np.isnan(share) else f"{share:.1%}" for share in row) + " |")


if __name__ == "__main__":
    main()
