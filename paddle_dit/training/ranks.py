"""Several processes: who am I, and how gradients and figures are averaged. gloo on the CPU, NCCL on GPUs."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.distributed as dist

from paddle_dit.errors import PaddleDiTError


@dataclass(frozen=True)
class Ranks:
    """Place of a process among the processes of a run. Every method is a no-op for a single process."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """Join the process group that ``paddle.distributed.launch`` set up, if it started us."""
        if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) == 1:
            return cls()
        dist.init_parallel_env()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def copy_from_main(self, tensors: Iterable[paddle.Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def average_gradients(self, parameters: list) -> None:
        """Average gradients over the ranks, in a few large messages.

        Called once per update, after the last backward: unlike ``DataParallel``'s hooks this works with recomputation
        and costs accumulation nothing.
        """
        if self.world_size > 1:
            from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

            fused_allreduce_gradients(parameters, None)

    def mean(self, values: Iterable[float]) -> np.ndarray:
        """Return the mean of each value over the ranks, float64."""
        values = np.asarray(list(values), dtype=np.float64)
        if self.world_size == 1:
            return values
        total = paddle.to_tensor(values)
        dist.all_reduce(total)
        return total.numpy() / self.world_size

    def from_main(self, value: int) -> int:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        shared = paddle.to_tensor(value, dtype="int64")
        dist.broadcast(shared, src=0)
        return int(shared)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the body on every rank; an error that a user can mend is then raised on all, the first rank's.

        Without this, one rank's bad file would leave the others waiting in their next collective call, and its message
        in a log that nobody reads. Also a barrier.
        """
        error = None
        try:
            yield
        except PaddleDiTError as caught:
            error = caught
        if self.world_size > 1:
            failed = paddle.to_tensor(0.0 if error is None else 1.0)
            dist.all_reduce(failed)
            if float(failed) > 0:
                messages: list[str] = []
                dist.all_gather_object(messages, "" if error is None else str(error))
                rank = next(rank for rank, message in enumerate(messages) if message)
                raise PaddleDiTError(f"rank {rank}: {messages[rank]}") from error
        if error is not None:
            raise error
