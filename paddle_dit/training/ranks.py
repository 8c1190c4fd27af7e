"""Several processes: who am I, and how gradients and figures are averaged. gloo on the CPU, NCCL on GPUs."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.distributed as dist

from paddle_dit.errors import NonFiniteLossError, PaddleDiTError


@dataclass(frozen=True)
class Ranks:
    """Place of a process among the processes of a run. Every method is a no-op for a single process.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        model_degree: neighbouring ranks that hold one model together (tensor parallelism) and see the same samples.
    """

    rank: int = 0
    world_size: int = 1
    model_degree: int = 1

    @classmethod
    def join(cls, model_degree: int = 1) -> "Ranks":
        """Join the process group that ``paddle.distributed.launch`` set up, if it started us."""
        if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) == 1:
            return cls()
        dist.init_parallel_env()
        return cls(dist.get_rank(), dist.get_world_size(), model_degree)

    @property
    def data_rank(self) -> int:
        """Which share of every global batch this rank takes."""
        return self.rank // self.model_degree

    @property
    def data_ranks(self) -> int:
        """Number of shares of a global batch."""
        return self.world_size // self.model_degree

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def copy_from(self, tensors: Iterable[paddle.Tensor], source: int = 0) -> None:
        """Overwrite tensors by those of rank ``source``."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=source)

    def gather(self, tensor: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the tensors of all ranks, of one shape, on every rank."""
        if self.world_size == 1:
            return [tensor]
        tensors: list[paddle.Tensor] = []
        dist.all_gather(tensors, tensor)
        return tensors

    def mean(self, values: Iterable[float]) -> np.ndarray:
        """Return the mean of each value over the ranks, float64."""
        values = np.asarray(list(values), dtype=np.float64)
        if self.world_size == 1:
            return values
        total = paddle.to_tensor(values)
        dist.all_reduce(total)
        return total.numpy() / self.world_size

    def any(self, *facts: bool) -> list[bool]:
        """Return for each fact whether it is so on any rank; PaddleDiTError where one is gone."""
        if self.world_size == 1:
            return list(facts)
        counts = paddle.to_tensor(facts, dtype="float32")
        try:
            dist.all_reduce(counts)
        except RuntimeError as lost:  # gloo's
            silent = "timeout" in str(lost).lower()
            raise PaddleDiTError(
                f"another rank {'has been silent for long' if silent else 'is gone (killed, or out of memory?)'}; the"
                " launcher's log folder may say why, and the same command continues from the newest checkpoint"
            ) from lost
        return [count > 0 for count in counts.tolist()]

    def from_main(self, value: int) -> int:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        shared = paddle.to_tensor(value, dtype="int64")
        dist.broadcast(shared, src=0)
        return int(shared)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the body on every rank; an error of one is then raised on all: its own there, its message elsewhere.

        Without this, one rank's bad file would leave the others waiting in their next collective call, and its message
        in a log that nobody reads. Also a barrier.

        Raises:
            PaddleDiTError: another rank failed, or is gone.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.world_size > 1 and self.any(error is not None)[0]:
            errors: list[PaddleDiTError | None] = []
            dist.all_gather_object(errors, _portable(error))
            if error is None or isinstance(error, PaddleDiTError):
                raise _first_of(errors) from error
        if error is not None:
            raise error

    def wait_for_main(self, steps: Iterable[object]) -> None:
        """Let the main rank go through ``steps``, of some seconds each at most, while the others wait.

        Raises:
            PaddleDiTError: the main rank failed, or is gone.
        """

        def go_through(still_here: Callable[[], bool]) -> None:
            for _ in steps:
                still_here()

        self.let_main(go_through)

    def let_main(self, work: Callable[[Callable[[], bool]], object], fact: Callable[[], bool] = lambda: False) -> None:
        """Let the main rank work while the others wait, however long it takes.

        Args:
            work: called on the main rank with a function that it must call every few seconds, as gloo gives up after
                30 seconds without a word; that returns whether ``fact`` is so on any rank.
            fact: asked on every rank.

        Raises:
            PaddleDiTError: the main rank failed, or is gone.
        """
        with self.together():
            if not self.is_main:
                while not self.any(False, fact())[0]:
                    pass
                return
            try:
                work(lambda: self.any(False, fact())[1])
            finally:
                self.any(True, False)


def _portable(error: Exception | None) -> PaddleDiTError | None:
    """Return what can be sent to other ranks; a bug's traceback stays in its own rank's log."""
    if error is None or isinstance(error, PaddleDiTError):
        return error
    return PaddleDiTError(f"{type(error).__name__}: {error}; its log has the traceback")


def _first_of(errors: list[PaddleDiTError | None]) -> PaddleDiTError:
    """Return what all ranks raise; losses that are not finite may be skipped, so they stay what they are."""
    found = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if all(isinstance(error, NonFiniteLossError) for _, error in found):
        return NonFiniteLossError(found[0][1].step, sorted({place for _, error in found for place in error.positions}))
    rank, first = next((rank, error) for rank, error in found if not isinstance(error, NonFiniteLossError))
    return PaddleDiTError(f"rank {rank}: {first}")
