"""The losses between two lines of the log."""

import paddle

from paddle_dit.training.ranks import Ranks


class LossWindow:
    """Sums of a rank's losses since the last line, which a checkpoint keeps: the line after a stop then means the same.

    Args:
        ranks: who trains.
    """

    def __init__(self, ranks: Ranks):
        self._ranks, self._steps, self._sums = ranks, 0, {}

    def add(self, losses: dict[str, paddle.Tensor]) -> None:
        """Add the losses of a step, scalars."""
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in losses.items()}
        self._steps += 1

    def mean(self) -> dict[str, float]:
        """Return the means over steps and ranks, and begin anew; every rank must call it."""
        sums, steps = self._sums, self._steps
        self._steps, self._sums = 0, {}
        if not steps:  # every one of them was skipped
            return {"loss": float("nan")}
        means = self._ranks.mean(float(value) / steps for value in sums.values())
        return dict(zip(sums, map(float, means), strict=True))

    def state(self) -> dict:
        """Return what a checkpoint keeps, for JSON: the sums of each rank; every rank must call it."""
        if not self._steps:
            return {"steps": 0, "sums": {}}
        own = paddle.to_tensor([float(value) for value in self._sums.values()], dtype="float32")
        of_ranks = zip(*(sums.tolist() for sums in self._ranks.gather(own)), strict=True)
        return {"steps": self._steps, "sums": dict(zip(self._sums, map(list, of_ranks), strict=True))}

    def restore(self, state: dict) -> None:
        """Take over :meth:`state`, of as many ranks or of others."""
        self._steps = state["steps"]
        for name, sums in state["sums"].items():
            own = sums[self._ranks.rank] if len(sums) == self._ranks.world_size else sum(sums) / len(sums)
            self._sums[name] = paddle.to_tensor(own, dtype="float32")
