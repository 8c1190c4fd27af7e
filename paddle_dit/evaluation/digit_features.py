"""A small classifier of the embedded digits, whose features stand in for Inception's: nothing is downloaded.

Figures of them compare digits with digits, and only with figures of the same file of weights.
"""

from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from paddle_dit.data.digits import DIGITS_FILE, INK, SIDE, as_digits, load_digits
from paddle_dit.errors import DataError
from paddle_dit.evaluation.features import FeatureBatch
from paddle_dit.evaluation.images import ArrayImages
from paddle_dit.evaluation.suite import evaluate_arrays
from paddle_dit.files import sha256
from paddle_dit.readers import read_tensors

WEIGHTS = DIGITS_FILE.with_name("digits_features.safetensors")
DIGIT_SETS = {"digits-train": "train", "digits-heldout": "heldout"}
POOL_FEATURES, SPATIAL_CHANNELS = 64, 7


class DigitClassifier(nn.Layer):
    """Three convolutions and two linear layers, 47,530 parameters; takes float32 ``[N, 8, 8]``, ink 0..16."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2D(1, 16, 3, padding=1), nn.Conv2D(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2D(32, 32, 3, padding=1)
        self.hidden, self.head = nn.Linear(32 * 4 * 4, POOL_FEATURES), nn.Linear(POOL_FEATURES, 10)
        self.dropout = nn.Dropout(0.3)

    def features(self, digits: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Return pool ``[N, 64]`` and spatial ``[N, 7, 4, 4]``."""
        x = F.relu(self.conv1(digits.unsqueeze(1) / INK))
        x = F.relu(self.conv3(F.max_pool2d(F.relu(self.conv2(x)), 2)))
        return F.relu(self.hidden(self.dropout(x.flatten(1)))), x[:, :SPATIAL_CHANNELS]

    def forward(self, digits: paddle.Tensor) -> paddle.Tensor:
        """Return logits ``[N, 10]``."""
        return self.head(self.dropout(self.features(digits)[0]))


class DigitFeatures:
    """The classifier as the figures are computed with it, a :class:`~paddle_dit.evaluation.features.Features`.

    Args:
        weights: of a :class:`DigitClassifier`; those that ship by default.
    """

    sizes = (POOL_FEATURES, SPATIAL_CHANNELS * (SIDE // 2) ** 2)
    few = 300
    any_size = True
    batch_size = 500

    def __init__(self, weights: Path = WEIGHTS):
        self._network = DigitClassifier()
        self._network.set_state_dict({name: paddle.to_tensor(array) for name, array in read_tensors(weights).items()})
        self._network.eval()
        self.about = {
            "name": "a classifier of the embedded digits",
            "weights": sha256(weights),
            "resize": f"the mean of equal boxes, to {SIDE} x {SIDE} digits",
        }

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raise DataError unless the images are 8 x 8 digits, or RGB pictures that shrink to such."""
        digits, picture = shape == (SIDE, SIDE), len(shape) == 3 and shape[2] == 3
        if not digits and not (picture and shape[0] == shape[1] and shape[0] % SIDE == 0):
            raise DataError(
                f"{name} holds images of shape {list(shape)}; digits are [8, 8] with ink 0..16, or RGB [S, S, 3] with "
                "S a multiple of 8"
            )

    @paddle.no_grad()
    def __call__(self, images: np.ndarray) -> FeatureBatch:
        """Return the features of uint8 ``[N, 8, 8]`` or ``[N, S, S, 3]``, or of digits float32 ``[N, 8, 8]``."""
        if images.ndim == 4:
            images = as_digits(images)
        if images.max() > INK:
            raise DataError(f"ink of 8 x 8 digits goes from 0 to {INK:.0f}, not to {images.max()}; scale it")
        pool, spatial = self._network.features(paddle.to_tensor(images.astype(np.float32)))
        spatial = spatial.transpose([0, 2, 3, 1]).flatten(1)
        return FeatureBatch(pool.numpy(), spatial.numpy(), (pool @ self._network.head.weight).numpy())


def digit_figures(images: np.ndarray) -> dict[str, float]:
    """Return FID, sFID, Inception Score, precision and recall of digits against the 1,497 real training ones.

    Args:
        images: uint8 ``[N, S, S, 3]``, drawn; or ``[N, 8, 8]``, ink 0..16.
    """
    return evaluate_arrays(images, load_digits("train")[0], DigitFeatures())


def digit_images(name: str) -> ArrayImages:
    """Return the real digits of ``digits-train`` or ``digits-heldout``, uint8 ``[N, 8, 8]``."""
    return ArrayImages(load_digits(DIGIT_SETS[name])[0], name)
