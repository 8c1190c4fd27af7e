"""Stateless sample order: which samples step ``s`` sees, as a pure function, so that nothing about it is ever saved.

The global batch of a step depends on (seed, step, number of samples, global batch size) alone. Ranks take contiguous
parts of it, so another number of ranks sees the same batches in the same order.
"""

import numpy as np

from paddle_dit.errors import ConfigError, DataError
from paddle_dit.randomness import permutation


class SampleOrder:
    """A fresh permutation for every epoch, cut into global batches; the incomplete last batch is dropped.

    Args:
        num_samples: size of the data set.
        global_batch_size: samples per update over all ranks and accumulation steps.
        seed: non-negative; the same seed gives the same order on every machine and NumPy version.

    Raises:
        ConfigError: ``seed`` or ``global_batch_size`` is out of range.
        DataError: there are fewer samples than one global batch takes.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int) -> None:
        if global_batch_size < 1:
            raise ConfigError(f"the global batch size is {global_batch_size}; it must be at least 1")
        if seed < 0:
            raise ConfigError(f"the seed is {seed}; it must not be negative")
        if num_samples < global_batch_size:
            raise DataError(
                f"the data has {num_samples} samples, fewer than one global batch of {global_batch_size}; "
                f"use --global-batch-size {num_samples} or less"
            )
        self.num_samples, self.global_batch_size, self.seed = num_samples, global_batch_size, seed
        self.steps_per_epoch = num_samples // global_batch_size
        self._cached: tuple[int, np.ndarray] | None = None  # (epoch, its permutation)

    def global_batch(self, step: int) -> np.ndarray:
        """Return the sample indices, int64 ``[global_batch_size]``, of update ``step`` (from 0, over all epochs)."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_batch_size
        return self._permutation(epoch)[start : start + self.global_batch_size]

    def local_batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return one rank's part of the global batch.

        Returns:
            Sample indices and their positions in the global batch, both int64 ``[global_batch_size / world_size]``.
            Randomness per sample is derived from the position, which does not depend on the number of ranks. With
            accumulation the caller slices both.

        Raises:
            ConfigError: the global batch cannot be split evenly over the ranks.
        """
        size, rest = divmod(self.global_batch_size, world_size)
        if rest:
            raise ConfigError(
                f"a global batch of {self.global_batch_size} cannot be split over {world_size} ranks; "
                f"use a multiple of {world_size}"
            )
        positions = np.arange(rank * size, (rank + 1) * size)
        return self.global_batch(step)[positions], positions

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, permutation(self.num_samples, self.seed, epoch)
        return self._cached[1]
