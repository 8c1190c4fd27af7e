"""Every rank trains on other samples: with a whole model each, or with its state spread over the ranks (ZeRO).

Both classes, and :class:`~paddle_dit.training.parallel.TensorParallel`, answer the same questions: how a batch becomes
tensors, how gradients are put together, what an array looks like as a whole.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import paddle
import paddle.distributed as dist

from paddle_dit.errors import ConfigError
from paddle_dit.training.optimizer import SLICE, full_precision_weights, master_weights
from paddle_dit.training.precision import MASTER
from paddle_dit.training.ranks import Ranks

_LEVELS = {"stage1": "os", "stage2": "os_g", "stage3": "p_g_os"}  # Paddle's names


class DataParallel:
    """Every rank holds the whole model; gradients are averaged once per update.

    Attributes:
        backward_is_collective: whether a rank's forward and backward pass wait for other ranks.
    """

    backward_is_collective = False

    def __init__(self, ranks: Ranks | None = None):
        self.ranks = ranks or Ranks()

    def batch(self, array: np.ndarray) -> paddle.Tensor:
        """Return this rank's samples as a tensor."""
        return paddle.to_tensor(array)

    def shard_model(self, model) -> None:
        """Leave the model whole."""

    def wrap(self, step) -> None:
        """Leave a :class:`~paddle_dit.training.step.TrainingStep` as it is."""

    def reduce_gradients(self, parameters: list) -> None:
        """Average gradients over the ranks, in a few large messages.

        Called once per update, after the last backward: unlike Paddle's ``DataParallel`` this works with recomputation
        and costs accumulation nothing.
        """
        if self.ranks.world_size > 1:
            from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

            fused_allreduce_gradients(parameters, None)

    def weights(self, model, optimizer) -> Iterator[tuple[str, paddle.Tensor]]:
        """Yield structured names and float32 weights, as the averages follow them; every rank must iterate."""
        yield from full_precision_weights(model, optimizer).items()

    def gradients(self, model) -> list[paddle.Tensor]:
        """Return the gradients that this rank has."""
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    def any_rank(self, fact: bool) -> bool:
        """Whether something is so on any rank that this one waits for in a backward pass: here there is none.

        The gradients, once reduced, are the same on all.
        """
        return bool(self.backward_is_collective and self.ranks.mean([fact])[0] > 0) or fact

    def carrier(self, parameter) -> paddle.Tensor:
        """Return the tensor that holds what this rank has of a parameter."""
        return parameter

    def own_part(self, whole: paddle.Tensor, parameter) -> paddle.Tensor:
        """Return what this rank holds of a tensor of the parameter's shape."""
        return whole

    def full(self, name: str, tensor: paddle.Tensor) -> np.ndarray:
        """Return a whole array for a checkpoint, on the main rank, which writes it; every rank must call it."""
        return tensor.numpy() if self.ranks.is_main else np.empty(0, np.float32)

    def arranged(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return a checkpoint's array as ``set_value`` is to be given it."""
        return array

    def merged(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the arrays that the ranks hold together; every rank must call it."""
        return arrays


class ShardedDataParallel(DataParallel):
    """ZeRO through Paddle's ``group_sharded_parallel`` (Rajbhandari et al. 2020): not run on a GPU yet.

    Args:
        ranks: among whom the state is spread.
        stage: "stage1", "stage2" (in Paddle the two are one: optimizer state and gradients) or "stage3" (weights too).

    Raises:
        ConfigError: there is just one rank.
    """

    backward_is_collective = True

    def __init__(self, ranks: Ranks, stage: str):
        super().__init__(ranks)
        if ranks.world_size == 1:
            raise ConfigError(f"--sharding {stage} needs several ranks; launch them, or leave it out")
        self.stage = stage

    def wrap(self, step) -> None:
        """Hand the step's model, optimizer and scaler to Paddle, once all state has been restored."""
        from paddle.distributed.sharding import group_sharded_parallel

        scaler = step.scaler.inner if step.scaler else None
        restored, masters = step.optimizer._accumulators_holder, dict(master_weights(step.optimizer))
        self._parameters = dict(step.model.named_parameters())
        if masters:  # or every rank would keep all of them beside those that Paddle makes anew, of the half weights
            step.optimizer._master_weights = {}
        step.forward, step.optimizer, scaler = group_sharded_parallel(
            step.model, step.optimizer, _LEVELS[self.stage], scaler=scaler
        )
        if step.scaler:
            step.scaler.inner = scaler
        state = {}  # Paddle names it after other tensors from now on
        for parameter in self._parameters.values():
            if self.stage != "stage3" and step.optimizer.param2rank[parameter.name] != self.ranks.rank:
                continue
            if parameter.name in masters:
                self._put_back(masters[parameter.name], parameter, step.optimizer._optim._master_weights)
            for key in [key for key in restored if key.startswith(f"{parameter.name}_")]:
                prefix = SLICE if _is_cut(parameter) and not masters else ""
                state[prefix + key.replace(f"_{MASTER}", "")] = self.own_part(restored[key], parameter)
        step.optimizer.set_state_dict(state)

    def _put_back(self, master: paddle.Tensor, parameter, masters: dict[str, paddle.Tensor]) -> None:
        key = SLICE + parameter.name if _is_cut(parameter) else parameter.name
        if key in masters:
            paddle.assign(self.own_part(master, parameter), output=masters[key])

    def gradients(self, model) -> list[paddle.Tensor]:
        """Return the gradients that this rank has, those of its slices among them."""
        found = [
            getattr(parameter, "bw_storage", None) if _is_cut(parameter) else parameter.grad
            for parameter in model.parameters()
        ]
        return [gradient for gradient in found if gradient is not None]

    def carrier(self, parameter) -> paddle.Tensor:
        """Return a cut parameter's slice, and others as they are."""
        return parameter.fw_storage if _is_cut(parameter) else parameter

    def own_part(self, whole: paddle.Tensor, parameter) -> paddle.Tensor:
        """Return this rank's slice of what belongs to a cut parameter, and the rest whole."""
        if not _is_cut(parameter) or whole.size == 1:
            return whole
        return paddle.to_tensor(slice_of(whole.numpy(), parameter.fw_storage.size, self.ranks.rank))

    def reduce_gradients(self, parameters: list) -> None:
        """Do nothing: Paddle's hooks have reduced them during the backward pass."""

    def weights(self, model, optimizer) -> Iterator[tuple[str, paddle.Tensor]]:
        """Yield whole float32 weights, from the ranks that update them."""
        masters = optimizer._optim._master_weights
        for name, parameter in model.named_parameters():
            if _is_cut(parameter):
                part = masters.get(SLICE + parameter.name, parameter.fw_storage)
                yield name, joined(part, parameter.shape, self.ranks)
            elif self.stage == "stage3":
                yield name, masters.get(parameter.name, parameter)
            elif parameter.dtype == paddle.float32:
                yield name, parameter
            else:
                owner = optimizer.param2rank[parameter.name]
                master = masters[parameter.name] if owner == self.ranks.rank else paddle.empty(parameter.shape)
                self.ranks.copy_from([master], owner)
                yield name, master

    def full(self, name: str, tensor: paddle.Tensor) -> np.ndarray:
        """Return whole weights as they are, and the optimizer's state of a cut parameter joined."""
        parameter = self._parameters[name.partition("/")[0]]
        if "/" in name and _is_cut(parameter) and tensor.size > 1:
            tensor = joined(tensor, parameter.shape, self.ranks)
        return tensor.numpy()

    def merged(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every rank's arrays on every rank: those of stages 1 and 2 hold different parameters' state."""
        return merged(arrays, self.ranks)


def _is_cut(parameter) -> bool:
    return getattr(parameter, "fw_storage", None) is not None


def slice_of(whole: np.ndarray, size: int, rank: int) -> np.ndarray:
    """Return a rank's piece, ``[size]``, of an array that is flattened and filled up with zeros."""
    piece = whole.reshape(-1)[rank * size : (rank + 1) * size]
    return np.pad(piece, (0, size - piece.size))


@paddle.no_grad()
def joined(piece: paddle.Tensor, shape: Iterable[int], ranks: Ranks) -> paddle.Tensor:
    """Undo :func:`slice_of`: return the whole tensor on every rank."""
    return paddle.concat(ranks.gather(piece))[: int(np.prod(shape))].reshape(list(shape))


def merged(arrays: dict[str, np.ndarray], ranks: Ranks) -> dict[str, np.ndarray]:
    """Return the union of all ranks' float arrays; where several have one, the first rank's."""
    shapes: list[dict[str, tuple]] = []
    dist.all_gather_object(shapes, {name: (array.shape, str(array.dtype)) for name, array in arrays.items()})
    whole: dict[str, np.ndarray] = {}
    for rank, held in enumerate(shapes):
        for name, (shape, dtype) in held.items():
            if name not in whole:
                tensor = paddle.to_tensor(arrays[name]) if rank == ranks.rank else paddle.empty(shape, dtype)
                ranks.copy_from([tensor], rank)
                whole[name] = tensor.numpy()
    return whole
