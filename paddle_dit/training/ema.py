"""Exponential moving average of the weights, in float32."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import paddle

from paddle_dit.errors import CheckpointError
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.parallel import local
from paddle_dit.training.ranks import Ranks


class ExponentialMovingAverage:
    """Shadow weights: ``shadow <- decay * shadow + (1 - decay) * weights`` after every update.

    Sampling uses the shadow, as the paper does (section 4: decay 0.9999, constant from the first step).

    Args:
        model: whose weights are averaged.
        decay: of the average.
        warmup: begin with a smaller decay, ``(1 + updates) / (10 + updates)``, so that a young average is not made of
            the initial weights.
        spread_over: ranks that keep an equal part of the shadow each, as they do with a sharded optimizer; by default
            every rank keeps all of it.

    Attributes:
        shadow: structured name -> float32 tensor, of the weights that this rank keeps.
    """

    def __init__(self, model, decay: float = 0.9999, *, warmup: bool = False, spread_over: Ranks | None = None):
        self.decay, self.warmup = decay, warmup
        self._ranks = spread_over or Ranks()
        self._weights = dict(model.named_parameters())
        self._keeper = _share_out({name: weight.size for name, weight in self._weights.items()}, self._ranks.world_size)
        self.shadow = {
            name: weight.detach().astype("float32").clone()
            for name, weight in self._weights.items()
            if self._keeper[name] == self._ranks.rank
        }

    def decay_at(self, updates: int) -> float:
        """Return the decay of the update that follows ``updates`` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    @paddle.no_grad()
    def update(self, updates: int = 0, weights: Iterable[tuple[str, paddle.Tensor]] | None = None) -> None:
        """Move the shadow towards the present weights, each in one pass over the memory.

        Args:
            updates: made before this one; matters during the warm-up alone.
            weights: names and float32 weights, where the model's own are not that.
        """
        rate = 1.0 - self.decay_at(updates)
        for name, weight in self._weights.items() if weights is None else weights:
            if name in self.shadow and not self._weights[name].stop_gradient:  # a frozen weight is its own average
                _move(local(self.shadow[name]), local(weight), rate)

    @contextmanager
    def applied(self, parallel: DataParallel | None = None) -> Iterator[None]:
        """Let the model carry the averaged weights within the block, and its own again, bit for bit, after it.

        Args:
            parallel: how the model lies on the ranks.
        """
        parallel = parallel or DataParallel()
        carriers = {name: parallel.carrier(weight) for name, weight in self._weights.items()}
        own = {name: carrier.detach().clone() for name, carrier in carriers.items()}
        try:
            for name, shadow in self.whole():
                part = parallel.own_part(shadow, self._weights[name])
                paddle.assign(part.astype(own[name].dtype), output=carriers[name])
            yield
        finally:
            for name, value in own.items():  # asked anew: ZeRO's forward pass gives a cut weight another tensor
                paddle.assign(value, output=parallel.carrier(self._weights[name]))

    def whole(self) -> Iterator[tuple[str, paddle.Tensor]]:
        """Yield every name and its shadow, fetched from the rank that keeps it; all ranks must iterate."""
        for name, weight in self._weights.items():
            shadow = self.shadow.get(name)
            if self._ranks.world_size > 1:
                if shadow is None:
                    shadow = paddle.empty(weight.shape, dtype="float32")
                self._ranks.copy_from([shadow], self._keeper[name])
            yield name, shadow

    def restore(self, tensors: Mapping) -> None:
        """Take over saved shadows, structured name -> float32 array; CheckpointError where one is missing."""
        missing = sorted(self.shadow.keys() - tensors.keys())
        if missing:
            raise CheckpointError(f"the averaged weights are of another model: they lack '{missing[0]}'")
        for name, shadow in self.shadow.items():
            shadow.set_value(tensors[name])


def _move(shadow, weight, rate: float) -> None:
    """``shadow += rate * (weight - shadow)`` in place, by the kernel that reads and writes every number just once."""
    if shadow.place.is_cpu_place():
        # A matrix product with a 1 x 1 one: the BLAS does it with all threads, 2.4 times faster than lerp_.
        one = paddle.ones([1, 1], dtype="float32")
        shadow.reshape([1, -1]).addmm_(one, weight.reshape([1, -1]), beta=1.0 - rate, alpha=rate)
    else:  # a product might be rounded to TF32 here
        shadow.lerp_(weight, rate)


def _share_out(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Return name -> rank, each to the rank that has least so far: as Paddle's sharded optimizer spreads its state."""
    load, keeper = [0] * ranks, {}
    for name, size in sizes.items():
        keeper[name] = rank = load.index(min(load))
        load[rank] += size
    return keeper
