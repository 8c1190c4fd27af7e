"""A program in the place of a model, for :mod:`paddle_dit.generation` and the previews of a training run."""

import paddle

from paddle_dit.config import DiTConfig
from paddle_dit.deploy.backends import Program
from paddle_dit.deploy.paddle_backends import PaddleProgram
from paddle_dit.generation import Predictor

_INPUTS = ("x", "timesteps", "class_labels")


def as_predictor(program: Program, config: DiTConfig) -> Predictor:
    """Return what :func:`~paddle_dit.generation.generate_latents` takes for a model.

    Args:
        program: of any backend, of the kind :data:`~paddle_dit.deploy.specs.MODEL`.
        config: of the model that it was made of.
    """
    stays = isinstance(program, PaddleProgram)

    def predict(*tensors):
        inputs = dict(zip(_INPUTS, tensors if stays else [tensor.numpy() for tensor in tensors], strict=True))
        prediction = program.run(inputs, keep=stays)["prediction"]
        return prediction if stays else paddle.to_tensor(prediction)

    return Predictor(config, predict)
