"""How fast a run is: what a window of steps took, waited for and used."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import paddle

from paddle_dit.config import DiTConfig
from paddle_dit.runtime import has_gpu
from paddle_dit.training.costs import PEAK_TFLOPS
from paddle_dit.training.frozen import flops_of


class Throughput:
    """Clock of the steps since :meth:`restart`.

    Args:
        config: of the model.
        global_batch_size: samples per step, over all ranks.
        cards: number of ranks.
        train_only: patterns of the parameters that train; none means all.
    """

    def __init__(self, config: DiTConfig, global_batch_size: int, cards: int, train_only: Sequence[str] = ()):
        self._flops, self._batch, self._cards = flops_of(config, train_only), global_batch_size, cards
        self._peak = _peak_tflops()
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self._start, self._steps, self._waited, self._encoded = time.perf_counter(), 0, 0.0, 0.0

    def advance(self) -> None:
        """Count one step."""
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Count the block as encoding images, which must wait for the GPU by itself before it ends."""
        if has_gpu():
            paddle.device.synchronize()  # or it would wait for the former step as well
        start = time.perf_counter()
        yield
        self._encoded += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out: saving, evaluating and drawing are no training."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def figures(self) -> dict[str, float]:
        """Return the window's figures.

        ``images_per_second`` over all ranks and ``_per_card``; ``tflops_per_card``, of the model alone (6 x its
        multiply-adds, less what frozen weights save, and recomputation is not counted as work); ``mfu``, its share of a
        known card's dense half-precision peak; ``data_wait``, the share of the time that this rank waited for data;
        ``peak_memory_mib``, of this rank's tensors.

        Where images were encoded: ``encoding``, the share of the time that it took this rank, and
        ``images_per_second_from_latents``, the rate without encoding and without waiting for data, which is what
        latents that have been extracted beforehand would come to.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._steps * self._batch / seconds
        figures = {
            "images_per_second": rate,
            "images_per_second_per_card": rate / self._cards,
            "tflops_per_card": rate / self._cards * self._flops / 1e12,
            "data_wait": self._waited / seconds,
            "peak_memory_mib": peak_memory() / 2**20,
        }
        if self._encoded:
            figures["encoding"] = self._encoded / seconds
            rest = max(seconds - self._waited - self._encoded, 1e-9)
            figures["images_per_second_from_latents"] = self._steps * self._batch / rest
        if self._peak is not None:
            figures["mfu"] = figures["tflops_per_card"] / self._peak
        return figures


def peak_memory() -> int:
    """Return the most bytes that this rank's tensors have taken, on the card or, without one, in main memory.

    That is what the planner counts. A process holds more, on the CPU a good deal more.
    """
    if has_gpu():
        return paddle.device.cuda.max_memory_allocated()
    return paddle.base.core.host_memory_stat_peak_value("Allocated", 0)


def _peak_tflops() -> float | None:
    if not has_gpu():
        return None
    name = paddle.device.cuda.get_device_name()
    known = [card for card in PEAK_TFLOPS if re.search(rf"\b{card}\b", name)]  # whole words: an A10G is no A10
    return PEAK_TFLOPS[max(known, key=len)] if known else None
