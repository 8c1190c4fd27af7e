"""Train the classifier of the embedded digits whose features evaluate digits; write data/digits_features.safetensors.

    python scripts/make_digit_features.py

Takes less than a minute. It sees the 1,497 training digits alone, each moved by up to a pixel and with noise, so that
it knows strokes and not places; the 300 held-out ones tell how good it is.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.cli import parse
from paddle_dit.data.digits import INK, load_digits
from paddle_dit.errors import ConfigError, entry_point
from paddle_dit.runtime import prepare


@dataclass
class Options:
    """How to train, where to write."""

    output: Path = Path("data/digits_features.safetensors")
    """File to write."""
    epochs: int = 40
    """Passes over the training digits, in batches of 64."""
    seed: int = 0
    """Seed of weights, order and noise."""


def moved(digits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return uint8 ``[N, 8, 8]`` as float32, each moved by up to a pixel both ways, with noise of up to two of ink."""
    padded = np.pad(digits.astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    places = random.integers(0, 3, (len(digits), 2))
    cut = np.stack([image[y : y + 8, x : x + 8] for image, (y, x) in zip(padded, places, strict=True)])
    return (cut + random.uniform(-2, 2, cut.shape).astype(np.float32)).clip(0, INK)


def train(options: Options):
    """Return a trained DigitClassifier."""
    import paddle

    from paddle_dit.evaluation.digit_features import DigitClassifier

    paddle.seed(options.seed)
    random = np.random.default_rng(options.seed)
    images, labels = load_digits("train")
    network = DigitClassifier()
    steps = options.epochs * -(-len(images) // 64)
    rate = paddle.optimizer.lr.CosineAnnealingDecay(2e-3, T_max=steps)
    optimizer = paddle.optimizer.AdamW(rate, parameters=network.parameters(), weight_decay=0.01)
    for _ in range(options.epochs):
        order = random.permutation(len(images))
        for rows in np.split(order, range(64, len(order), 64)):
            logits = network(paddle.to_tensor(moved(images[rows], random)))
            paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(labels[rows])).backward()
            optimizer.step()
            optimizer.clear_grad()
            rate.step()
    network.eval()
    return network


@entry_point
def main() -> None:
    """Train, measure, write."""
    options = parse(Options, description=__doc__)
    if options.epochs < 1:
        raise ConfigError(f"--epochs must be 1 or more, got {options.epochs}")
    prepare()
    import paddle
    from safetensors.numpy import save_file

    network = train(options)
    images, labels = load_digits("heldout")
    with paddle.no_grad():
        found = network(paddle.to_tensor(images.astype(np.float32))).argmax(1).numpy()
    about = {"made by": "scripts/make_digit_features.py", "held-out digits": f"{(found == labels).mean():.1%} right"}
    save_file({name: value.numpy() for name, value in network.state_dict().items()}, options.output, about)
    print(f"wrote {options.output}; {about['held-out digits']} of {len(labels)} held-out digits")


if __name__ == "__main__":
    main()
