"""The one training step that both training scripts take: draws, loss, backward, update, EMA."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from paddle_dit.config import DiTConfig
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import NonFiniteLossError
from paddle_dit.randomness import Stream, generator
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.parallel import local
from paddle_dit.training.precision import LossScaler, Precision


@dataclass(frozen=True)
class Draws:
    """The random part of one step, for one rank's samples.

    Attributes:
        timesteps: int64 ``[b]``.
        noise: float32 ``[b, C, H, W]``.
        class_labels: int64 ``[b]``, some replaced by the null class.
    """

    timesteps: np.ndarray
    noise: np.ndarray
    class_labels: np.ndarray


def draw(seed: int, step: int, positions: Sequence[int], class_labels, config: DiTConfig, num_timesteps: int) -> Draws:
    """Draw timesteps, noise and label dropout for samples at ``positions`` of the global batch of ``step``."""
    timesteps = np.empty(len(positions), dtype=np.int64)
    noise = np.empty((len(positions), *config.sample_shape), dtype=np.float32)
    labels = np.array(class_labels, dtype=np.int64)
    if config.num_classes == 0:
        labels[:] = config.null_class
    for row, position in enumerate(positions):
        random = generator(seed, Stream.TRAINING, step, position)
        timesteps[row] = random.integers(num_timesteps)
        if random.random() < config.class_dropout_prob:
            labels[row] = config.null_class
        random.standard_normal(out=noise[row], dtype=np.float32)
    return Draws(timesteps, noise, labels)


class TrainingStep:
    """One update on every rank: :meth:`backward` on each rank's share of a global batch, then :meth:`update`.

    Args:
        model: the :class:`~paddle_dit.models.dit.DiT` to train.
        objective: gives the losses.
        optimizer: a Paddle optimizer over the model's parameters.
        ema: moved after each update.
        parallel: how the ranks work together.
        seed: of the draws.
        accumulation: micro-batches that one rank's share is cut into.
        precision: what is computed in half precision.
        scaler: scales the loss and tells of overflows; by default what ``precision`` needs.

    Attributes:
        overflows: updates left out so far because a scaled gradient overflowed.
    """

    def __init__(
        self,
        model,
        objective: GaussianDiffusion,
        optimizer: paddle.optimizer.Optimizer,
        ema: ExponentialMovingAverage,
        parallel: DataParallel,
        seed: int,
        accumulation: int = 1,
        *,
        precision: Precision | None = None,
        scaler: LossScaler | None = None,
    ):
        self.model, self.objective, self.optimizer, self.ema = model, objective, optimizer, ema
        self.parallel, self.seed, self.accumulation = parallel, seed, accumulation
        self.precision = precision or Precision()
        self.scaler = scaler or self.precision.loss_scaler()
        self.forward, self.overflows = model, 0

    def backward(self, step: int, latents: np.ndarray, class_labels: np.ndarray, positions: np.ndarray) -> dict:
        """Compute this rank's gradients; no weight changes, and plain data parallelism sends nothing yet.

        Args:
            step: number of the update, from 0.
            latents: float32 ``[b, C, H, W]``.
            class_labels: int64 ``[b]``.
            positions: int64 ``[b]``, place of each sample in the global batch.

        Returns:
            this rank's mean ``loss`` and its parts, as tensors.

        Raises:
            NonFiniteLossError: a sample's loss is NaN or infinite; the gradients are cleared. Where the backward pass
                of a rank needs the others, it is raised on all.
        """
        draws = draw(self.seed, step, positions, class_labels, self.model.config, len(self.objective.schedule))
        sums: dict = {}
        for part in np.array_split(np.arange(len(latents)), self.accumulation):
            inputs = latents[part], draws.class_labels[part], draws.timesteps[part], draws.noise[part]
            losses = self.objective.training_losses(self.predict, *map(self.parallel.batch, inputs))
            means = {name: value.mean() * (len(part) / len(latents)) for name, value in losses.items()}
            if self.parallel.any_rank(not math.isfinite(float(means["loss"]))):
                if sums:
                    self.optimizer.clear_grad()
                bad = ~np.isfinite(local(losses["loss"]).numpy())
                raise NonFiniteLossError(step, [int(position) for position in positions[part][bad]])
            (self.scaler.scale(means["loss"]) if self.scaler else means["loss"]).backward()
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in means.items()}
        return sums

    def predict(self, x, timesteps, class_labels):
        """Run the model in the step's precision."""
        with self.precision.autocast():
            return self.forward(x, timesteps, class_labels)

    def update(self, step: int) -> bool:
        """Average the gradients over the ranks, step the optimizer, move the averaged weights.

        Args:
            step: number of the update, from 0.

        Returns:
            whether the weights moved: under float16 an overflowing gradient leaves everything as it was.

        Raises:
            NonFiniteLossError: a gradient is NaN or infinite, on all ranks; nothing has changed, and it is cleared.
        """
        self.parallel.reduce_gradients(self.model.parameters())
        moved = True
        if self.scaler is None:
            if self.parallel.any_rank(not _finite(self.parallel.gradients(self.model))):
                self.optimizer.clear_grad()
                raise NonFiniteLossError(step, [])
            self.optimizer.step()
        else:
            moved = self.scaler.step(self.optimizer)  # the ranks agree, as their gradients are the same by now
        self.optimizer.clear_grad()
        if moved:
            self.ema.update(step, self.parallel.weights(self.model, self.optimizer))
        self.overflows += not moved
        return moved


@paddle.no_grad()
def _finite(gradients: list[paddle.Tensor]) -> bool:
    """Whether all of them are: one number of each is read, its sum of squares."""
    squares = [paddle._C_ops.squared_l2_norm(local(gradient)).astype("float32") for gradient in gradients]
    return not squares or bool(paddle.isfinite(paddle.add_n(squares)))
