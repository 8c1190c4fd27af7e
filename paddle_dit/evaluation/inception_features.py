"""Inception's features of images, as FID, sFID and the Inception Score take them."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import paddle

from paddle_dit.errors import DataError
from paddle_dit.evaluation.features import FeatureBatch
from paddle_dit.evaluation.inception import INPUT_SIZE, POOL_FEATURES, SPATIAL_CHANNELS, Inception, preprocess
from paddle_dit.evaluation.inception_weights import SHA256


class InceptionFeatures:
    """The network as the figures are computed with it, a :class:`~paddle_dit.evaluation.features.Features`.

    Args:
        tensors: as for :meth:`Inception.load`.
        weights: their SHA-256, or whatever else names them.
    """

    sizes = (POOL_FEATURES, SPATIAL_CHANNELS * 17 * 17)
    few = 10_000
    any_size = False

    def __init__(self, tensors: Mapping[str, np.ndarray], weights: str):
        network = Inception()
        network.load(tensors)
        on_cpu = paddle.device.get_device() == "cpu"
        self._network, self.batch_size = (_compiled(network), 8) if on_cpu else (network, 64)
        public = "of 2015-12-05" if weights == SHA256 else "with other weights than the public ones"
        self.about = {
            "name": f"Inception v3 (FID variant) {public}",
            "weights": weights,
            "resize": f"bilinear to {INPUT_SIZE}, no half-pixel shift, as the original graph",
        }

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raise DataError unless the images are RGB."""
        if len(shape) != 3 or shape[2] != 3:
            grey = "; repeat the grey channel three times" if len(shape) == 2 or shape[2] == 1 else ""
            raise DataError(f"{name} holds images of shape {list(shape)}, not [H, W, 3]; give RGB images{grey}")

    @paddle.no_grad()
    def __call__(self, images: np.ndarray) -> FeatureBatch:
        """Return the features of uint8 ``[N, H, W, 3]``; the spatial ones in the order of the original graph."""
        pool, spatial, logits = (paddle.to_tensor(output) for output in self._network(preprocess(images)))
        spatial = spatial.transpose([0, 2, 3, 1]).flatten(1)  # stored statistics have the channels last
        return FeatureBatch(pool.numpy(), spatial.numpy(), logits.numpy())


def _compiled(network: Inception) -> Callable[[paddle.Tensor], list[np.ndarray]]:
    """Return the network as Paddle Inference runs it: on a CPU oneDNN makes it more than twice as fast."""
    from paddle import inference

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "inception")
        images = paddle.static.InputSpec([None, 3, INPUT_SIZE, INPUT_SIZE], "float32")
        paddle.jit.save(network, path, input_spec=[images])
        config = inference.Config(f"{path}.json", f"{path}.pdiparams")
        config.disable_gpu()
        config.disable_glog_info()
        config.enable_mkldnn()
        config.set_cpu_math_library_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        predictor = inference.create_predictor(config)

    def run(x: paddle.Tensor) -> list[np.ndarray]:
        predictor.get_input_handle(predictor.get_input_names()[0]).copy_from_cpu(x.numpy())
        predictor.run()
        return [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]

    return run
