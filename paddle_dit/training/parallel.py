"""Tensor parallelism: several processes share the matrices of every block (Shoeybi et al. 2019, section 3).

As in that paper, Megatron-LM's, each branch of a block is a pair of matrices. The first is cut by columns, the second
by rows, so that between the two every process computes with its own attention heads, or its own hidden units, and one
sum after the second joins them again. :data:`PLAN` says which array is cut where; all others are the same everywhere.

Paddle's distributed tensors in dynamic mode carry it out. They know how they are spread, so sums over processes, in the
gradients and in their global norm too, are Paddle's. :class:`TensorParallel` only lays out, fetches and puts back.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.auto_parallel.api import dtensor_from_local

from paddle_dit.config import DiTConfig
from paddle_dit.errors import ConfigError
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.ranks import Ranks


@dataclass(frozen=True)
class Cut:
    """How an array is spread over the processes that share a model.

    Attributes:
        axis: which axis is cut into equal pieces, one per process.
        parts: equal arrays side by side along that axis (query, key and value: 3); a process gets its piece of each,
            so that what it holds has the layout of the whole array with fewer heads.
    """

    axis: int
    parts: int = 1

    def by_owner(self, array: np.ndarray, degree: int) -> np.ndarray:
        """Reorder an array so that the pieces of each process lie together: ``[parts, degree, n]`` by owner first."""
        return self._swapped(array, self.parts, degree)

    def in_usual_order(self, array: np.ndarray, degree: int) -> np.ndarray:
        """Undo :meth:`by_owner`."""
        return self._swapped(array, degree, self.parts)

    def _swapped(self, array: np.ndarray, outer: int, inner: int) -> np.ndarray:
        before, after = array.shape[: self.axis], array.shape[self.axis + 1 :]
        pieces = array.reshape(*before, outer, inner, -1, *after)
        return np.ascontiguousarray(pieces.swapaxes(self.axis, self.axis + 1)).reshape(array.shape)


PLAN = {
    "blocks.*.attn.qkv.weight": Cut(axis=1, parts=3),
    "blocks.*.attn.qkv.bias": Cut(axis=0, parts=3),
    "blocks.*.attn.proj.weight": Cut(axis=0),
    "blocks.*.mlp.fc1.weight": Cut(axis=1),
    "blocks.*.mlp.fc1.bias": Cut(axis=0),
    "blocks.*.mlp.fc2.weight": Cut(axis=0),
}
"""Pattern of a parameter's name -> its cut. What matches none is whole on every process."""


def cut_of(name: str) -> Cut | None:
    """Return the cut of the parameter ``name``, or None where every process holds all of it."""
    return next((cut for pattern, cut in PLAN.items() if fnmatch.fnmatchcase(name, pattern)), None)


def local(tensor: paddle.Tensor) -> paddle.Tensor:
    """Return what this process holds of a tensor, sharing its memory: the tensor itself unless it is distributed."""
    return tensor._local_value() if tensor.is_dist() else tensor


class TensorParallel(DataParallel):
    """Places a model, its batches and its checkpoints on a grid of ``data_ranks x model_degree`` processes.

    The processes of a row share a model and see the same samples; other rows see other samples.

    Args:
        ranks: this process's place. Its process group must be joined before anything is placed.

    Raises:
        ConfigError: the degree does not divide the number of processes.
    """

    backward_is_collective = True

    def __init__(self, ranks: Ranks):
        super().__init__(ranks)
        self.degree, world_size = ranks.model_degree, ranks.world_size
        if world_size % self.degree:
            raise ConfigError(
                f"--tensor-parallel-degree {self.degree} does not divide the number of processes, {world_size}: "
                f"launch a multiple of {self.degree}, or choose a divisor of {world_size}"
            )
        grid = np.arange(world_size).reshape(ranks.data_ranks, self.degree).tolist()
        self._mesh = dist.ProcessMesh(grid, dim_names=["data", "model"])

    def check(self, config: DiTConfig) -> None:
        """Refuse a model that cannot be cut.

        Raises:
            ConfigError: its heads or the hidden units of its MLP cannot be shared out evenly.
        """
        hidden = int(config.hidden_size * config.mlp_ratio)
        for what, number in (("attention heads", config.num_heads), ("hidden units of the MLP", hidden)):
            if number % self.degree:
                raise ConfigError(
                    f"--tensor-parallel-degree {self.degree} does not divide the model's {number} {what}: "
                    "choose a degree that does"
                )

    def shard_model(self, model) -> None:
        """Spread a :class:`~paddle_dit.models.dit.DiT` over the processes, in place; its weights are equal on all.

        Every parameter becomes a new, distributed one, so build the optimizer and the averaged weights afterwards.
        """
        layers = dict(model.named_sublayers())
        for name, weight in list(model.named_parameters()):
            weight.set_value(self.arranged(name, weight.numpy()))
            layer, _, attribute = name.rpartition(".")
            cut = cut_of(name)
            placements = [dist.Replicate(), dist.Shard(cut.axis) if cut else dist.Replicate()]
            spread = dist.shard_tensor(weight, self._mesh, placements)
            # A row's gradient is a part of the sum. Left so, it would be sent twice: for the norm and for the update.
            spread.register_hook(lambda gradient, whole=placements: dist.reshard(gradient, self._mesh, whole))
            setattr(layers[layer], attribute, spread)
        for block in model.blocks:
            block.attn.attend = _with_own_heads(block.attn.attend)

    def batch(self, array: np.ndarray) -> paddle.Tensor:
        """Return this row's samples ``[b, ...]`` as part of a tensor of all rows' samples, ``[data_ranks * b, ...]``.

        A mean over it is a mean over all rows, and so are the gradients that follow. Rows must bring equally many.
        Where no gradients follow, a row may also give the model ordinary tensors, and gets what belongs to them.
        """
        return dtensor_from_local(paddle.to_tensor(array), self._mesh, [dist.Shard(0), dist.Replicate()])

    def reduce_gradients(self, parameters: list) -> None:
        """Do nothing: the hooks of :meth:`shard_model` have reduced them, in the backward pass of each micro-batch."""

    def full(self, name: str, tensor: paddle.Tensor) -> np.ndarray:
        """Return a whole tensor in the layout of a single process, for checkpoints; every process must call it.

        Args:
            name: the parameter's; or, for its averages and the optimizer's moments, ``"<parameter>/<slot>"``.
            tensor: of the parameter's shape, or a single number of the optimizer's.
        """
        if not tensor.is_dist():
            return tensor.numpy()
        whole = dist.reshard(tensor, self._mesh, [dist.Replicate()] * 2).numpy()
        cut = _cut_of(name, whole)
        return cut.in_usual_order(whole, self.degree) if cut else whole

    def arranged(self, name: str, array: np.ndarray) -> np.ndarray:
        """Undo what :meth:`full` did to the layout: return what ``set_value`` of a distributed tensor is to be given.

        That takes this process's piece by itself. Serves weights, their averages and a fresh optimizer's state alike.
        """
        cut = _cut_of(name, array)
        return cut.by_owner(array, self.degree) if cut else array


def _with_own_heads(attend: Callable[[paddle.Tensor], paddle.Tensor]) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """Let every process attend with its own heads as if there were no others: heads do not need each other."""

    def attend_with_own_heads(qkv):
        own = [[qkv.placements[0], dist.Shard(2)]]
        return dist.local_map(attend, own, own)(qkv)

    return attend_with_own_heads


def _cut_of(name: str, array: np.ndarray) -> Cut | None:
    """Return the cut of a parameter or of what belongs to it; the optimizer's single numbers have none."""
    return cut_of(name.partition("/")[0]) if array.size > 1 else None
