"""The loss on held-out samples: the same samples, timesteps and noise each time, so that its course is free of luck."""

from collections.abc import Callable

import numpy as np
import paddle

from paddle_dit.config import DiTConfig
from paddle_dit.data.source import LatentSource
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.randomness import Stream, generator
from paddle_dit.training.ranks import Ranks


class Validation:
    """Losses of a model on every sample of ``source`` once.

    Timesteps are spaced evenly over the schedule, then shuffled over the samples; no label is dropped out. Every rank
    takes its share, and the figures do not depend on how many there are.

    Args:
        source: held-out latents; those of moments and images must be the same whenever they are gathered.
        config: of the model.
        objective: gives the losses.
        seed: of timesteps and noise.
        ranks: who shares the work.
        batch_size: samples through the model at once.
    """

    def __init__(
        self,
        source: LatentSource,
        config: DiTConfig,
        objective: GaussianDiffusion,
        seed: int,
        ranks: Ranks,
        batch_size: int = 32,
    ):
        self.source, self.config, self.objective, self.seed = source, config, objective, seed
        self.ranks, self.batch_size = ranks, batch_size
        total = len(source)
        order = np.argsort(generator(seed, Stream.VALIDATION, 0, total).random(total))
        self._timesteps = (np.arange(total) * len(objective.schedule) // total)[order]

    @paddle.no_grad()
    def losses(self, predict: Callable) -> dict[str, float]:
        """Return the mean ``loss`` and its parts over all samples and ranks.

        Args:
            predict: called as ``predict(x_t, timesteps, class_labels)``, on every rank.
        """
        own, sums, counted = np.arange(len(self.source))[self.ranks.data_rank :: self.ranks.data_ranks], {}, 0
        # Every rank makes the same number of batches: a model spread over ranks runs on all of them or on none.
        longest = -(-len(self.source) // self.ranks.data_ranks)
        for start in range(0, longest, self.batch_size):
            losses, weight = self._batch(predict, own[start : start + self.batch_size])
            counted += weight
            for name, values in losses.items():
                sums[name] = sums.get(name, 0.0) + float(values.sum()) * (weight > 0)
        names = sorted(sums)
        means = self.ranks.mean([*(sums[name] for name in names), counted])
        return {name: float(mean / means[-1]) for name, mean in zip(names, means[:-1], strict=True)}

    def _batch(self, predict: Callable, indices: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        weight = len(indices)
        indices = indices if weight else np.zeros(1, np.int64)  # a rank without samples left keeps the others company
        with self.ranks.together():  # one rank's bad sample is everyone's error
            latents, labels = self.source.gather(indices)
        if self.config.num_classes == 0:
            labels = np.zeros_like(labels)
        noise = np.stack([self._noise(index) for index in indices])
        inputs = latents, labels, self._timesteps[indices], noise
        losses = self.objective.training_losses(predict, *map(paddle.to_tensor, inputs))
        return {name: value.numpy() for name, value in losses.items()}, weight

    def _noise(self, index: int) -> np.ndarray:
        random = generator(self.seed, Stream.VALIDATION, 1, int(index))
        return random.standard_normal(self.config.sample_shape, dtype=np.float32)
