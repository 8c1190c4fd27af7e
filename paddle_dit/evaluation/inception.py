"""Inception v3 as FID takes it: the network of 2015-12-05, in Paddle.

It differs from the Inception v3 that classifies: average pools leave the padding out of the count, the last block pools
by maximum, it has 1008 outputs, and images are resized as the original TensorFlow graph does it. Names and weights are
those of its public port to PyTorch; batch normalisation is folded into the convolutions when they are loaded.
"""

from collections.abc import Mapping

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from paddle_dit.errors import ConversionError

INPUT_SIZE = 299
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7  # of Mixed_6d's 17 x 17 places: sFID's 2023 features, about as many as FID's
_OUTPUTS = 1008
_EPSILON = 1e-3  # of the batch normalisation


class _Conv(nn.Layer):
    """A convolution, its folded batch normalisation, and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.weight = self.create_parameter([outputs, inputs, *kernel], default_initializer=nn.initializer.Constant(0))
        self.bias = self.create_parameter([outputs], is_bias=True)
        self._stride, self._padding = stride, padding

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, self._stride, self._padding))


def _average(x: paddle.Tensor) -> paddle.Tensor:
    return F.avg_pool2d(x, 3, 1, 1, exclusive=True)


def _halve(x: paddle.Tensor) -> paddle.Tensor:
    return F.max_pool2d(x, 3, 2)


class _BlockA(nn.Layer):
    """35 x 35 places: Mixed_5b, 5c, 5d."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Conv(inputs, 48, 1), _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 64, 1), _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return paddle.concat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _BlockB(nn.Layer):
    """From 35 x 35 places to 17 x 17: Mixed_6a."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = _Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(288, 64, 1), _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return paddle.concat([self.branch3x3(x), three, _halve(x)], 1)


def _row(inputs: int, outputs: int) -> _Conv:
    return _Conv(inputs, outputs, (1, 7), padding=(0, 3))


def _column(inputs: int, outputs: int) -> _Conv:
    return _Conv(inputs, outputs, (7, 1), padding=(3, 0))


class _BlockC(nn.Layer):
    """17 x 17 places: Mixed_6b to 6e."""

    def __init__(self, width: int):
        super().__init__()
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = _Conv(768, width, 1), _row(width, width)
        self.branch7x7_3 = _column(width, 192)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(768, width, 1), _column(width, width)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _row(width, width), _column(width, width)
        self.branch7x7dbl_5 = _row(width, 192)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return paddle.concat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class _BlockD(nn.Layer):
    """From 17 x 17 places to 8 x 8: Mixed_7a."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(768, 192, 1), _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(768, 192, 1), _row(192, 192)
        self.branch7x7x3_3, self.branch7x7x3_4 = _column(192, 192), _Conv(192, 192, 3, stride=2)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return paddle.concat([three, seven, _halve(x)], 1)


class _BlockE(nn.Layer):
    """8 x 8 places: Mixed_7b, and 7c, which pools by maximum."""

    def __init__(self, inputs: int, pool):
        super().__init__()
        self._pool = pool
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = self._pair()
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 448, 1), _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = self._pair()
        self.branch_pool = _Conv(inputs, 192, 1)

    @staticmethod
    def _pair() -> tuple[_Conv, _Conv]:
        return _Conv(384, 384, (1, 3), padding=(0, 1)), _Conv(384, 384, (3, 1), padding=(1, 0))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pairs = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        pairs += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return paddle.concat([self.branch1x1(x), *pairs, self.branch_pool(self._pool(x))], 1)


class Inception(nn.Layer):
    """The network; :meth:`load` gives it its weights.

    Sublayers have the public port's names.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, stride=2), _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80, 1), _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _BlockA(192, 32), _BlockA(256, 64), _BlockA(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = _BlockB(), _BlockC(128), _BlockC(160)
        self.Mixed_6d, self.Mixed_6e, self.Mixed_7a = _BlockC(160), _BlockC(192), _BlockD()
        self.Mixed_7b = _BlockE(1280, _average)
        self.Mixed_7c = _BlockE(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = nn.Linear(POOL_FEATURES, _OUTPUTS)
        self.eval()

    def forward(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """Return the features.

        Args:
            x: float32 ``[N, 3, 299, 299]``, of :func:`preprocess`.

        Returns:
            pool ``[N, 2048]``; spatial ``[N, 7, 17, 17]``, of Mixed_6d's 1 x 1 branch; and logits ``[N, 1008]`` without
            the last layer's bias, as the ADM suite takes them.
        """
        x = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6d(x)
        spatial = x[:, :SPATIAL_CHANNELS]  # the branch that is concatenated first is the 1 x 1 one
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = F.avg_pool2d(x, x.shape[-1]).flatten(1)
        return pool, spatial, pool @ self.fc.weight

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take the public port's weights, folding each batch normalisation into its convolution in float64.

        Args:
            tensors: its state dict, linear weights ``[out, in]``.

        Raises:
            ConversionError: a tensor is missing, has another shape, or a variance is not positive.
        """
        for name, layer in self.named_sublayers():
            if isinstance(layer, _Conv):
                weight, bias = _folded(tensors, name, layer.weight.shape)
                layer.weight.set_value(weight)
                layer.bias.set_value(bias)
        self.fc.weight.set_value(_taken(tensors, "fc.weight", [_OUTPUTS, POOL_FEATURES]).T.astype(np.float32))
        self.fc.bias.set_value(_taken(tensors, "fc.bias", [_OUTPUTS]).astype(np.float32))


def _taken(tensors: Mapping[str, np.ndarray], name: str, shape: list[int]) -> np.ndarray:
    """Return a tensor in float64, once it is known to be the one."""
    if name not in tensors:
        raise ConversionError(f"the Inception weights lack '{name}'; take the file that --help names")
    if list(tensors[name].shape) != shape:
        raise ConversionError(
            f"'{name}' of the Inception weights has shape {list(tensors[name].shape)}, not {shape}; "
            "take the file that --help names, not those of a classifier"
        )
    return np.asarray(tensors[name], np.float64)


def _folded(tensors: Mapping[str, np.ndarray], name: str, shape: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight and bias of a convolution that does its batch normalisation as well."""
    weight = _taken(tensors, f"{name}.conv.weight", shape)
    scale, shift, mean, variance = (
        _taken(tensors, f"{name}.bn.{part}", shape[:1]) for part in ("weight", "bias", "running_mean", "running_var")
    )
    if not (variance >= 0).all():
        raise ConversionError(f"'{name}.bn.running_var' of the Inception weights is not positive; the file is damaged")
    scale = scale / np.sqrt(variance + _EPSILON)
    return (weight * scale[:, None, None, None]).astype(np.float32), (shift - mean * scale).astype(np.float32)


def resize(images: np.ndarray) -> paddle.Tensor:
    """Resize to 299 x 299 as the original graph does: bilinear, source = index x in / out, no half-pixel shift.

    Args:
        images: uint8 ``[N, H, W, 3]``.

    Returns:
        float32 ``[N, 3, 299, 299]``, 0 to 255. Larger images are sampled, not averaged; the graph knows no better.
    """
    x = paddle.to_tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).astype("float32")
    return F.interpolate(x, [INPUT_SIZE, INPUT_SIZE], mode="bilinear", align_corners=False, align_mode=1)


def preprocess(images: np.ndarray) -> paddle.Tensor:
    """Return what the network takes of uint8 ``[N, H, W, 3]``: resized, ``(x - 128) / 128``."""
    return (resize(images) - 128.0) / 128.0
