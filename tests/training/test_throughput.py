import math
from types import SimpleNamespace

import paddle
import pytest

from paddle_dit.training import throughput
from paddle_dit.training.throughput import Throughput, peak_memory

CARDS = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA L40S": 362}


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that stands until the test moves its ``now``."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_figures_are_of_the_steps_and_the_seconds_since_the_restart(tiny_config, clock):
    window = Throughput(tiny_config, global_batch_size=16, cards=2)
    clock.now += 50
    window.advance()
    window.restart()
    for _ in range(5):
        with window.waiting():
            clock.now += 0.5
        clock.now += 1.5
        window.advance()
    figures = window.figures()
    assert figures["images_per_second"] == pytest.approx(8)
    assert figures["images_per_second_per_card"] == pytest.approx(4)
    assert figures["tflops_per_card"] == pytest.approx(4 * 6 * tiny_config.multiply_adds() / 1e12)
    assert figures["data_wait"] == pytest.approx(0.25)
    assert figures["peak_memory_mib"] == pytest.approx(peak_memory() / 2**20)
    assert "mfu" not in figures


def test_encoding_is_told_beside_the_rate_without_it(tiny_config, clock):
    window = Throughput(tiny_config, global_batch_size=16, cards=2)
    for _ in range(5):
        with window.waiting():
            clock.now += 0.5
        with window.encoding():
            clock.now += 1
        clock.now += 0.5
        window.advance()
    figures = window.figures()
    assert figures["images_per_second"] == pytest.approx(8)
    assert figures["encoding"] == pytest.approx(0.5)
    assert figures["images_per_second_from_latents"] == pytest.approx(32)
    window.restart()
    assert not {"encoding", "images_per_second_from_latents"} & set(window.figures())


def test_pauses_are_no_training(tiny_config, clock):
    window = Throughput(tiny_config, global_batch_size=16, cards=1)
    for _ in range(2):
        clock.now += 1
        window.advance()
        with window.paused():
            clock.now += 30
    assert window.figures()["images_per_second"] == pytest.approx(16)


def test_a_window_without_time_or_steps_has_finite_figures(tiny_config, clock):
    figures = Throughput(tiny_config, 16, 1).figures()
    assert figures["images_per_second"] == 0
    assert all(map(math.isfinite, figures.values()))


@pytest.mark.skipif(throughput.has_gpu(), reason="counts main memory")
def test_the_peak_counts_tensors_and_never_falls():
    before = peak_memory()
    block = paddle.ones([(before >> 20) + 64, 2**18])  # a MiB each
    grown = peak_memory()
    assert grown >= before + 64 * 2**20
    del block
    assert peak_memory() >= grown


@pytest.mark.parametrize(("card", "peak"), CARDS.items())
def test_mfu_is_the_share_of_a_known_cards_peak(tiny_config, clock, monkeypatch, card, peak):
    monkeypatch.setattr(throughput, "has_gpu", lambda: True)
    monkeypatch.setattr(throughput, "peak_memory", lambda: 0)
    monkeypatch.setattr(paddle.device.cuda, "get_device_name", lambda: card)
    window = Throughput(tiny_config, 16, 1)
    window.advance()
    clock.now += 1
    assert window.figures()["mfu"] == pytest.approx(16 * 6 * tiny_config.multiply_adds() / 1e12 / peak)


def test_an_unknown_card_has_no_mfu(tiny_config, monkeypatch):
    monkeypatch.setattr(throughput, "has_gpu", lambda: True)
    monkeypatch.setattr(throughput, "peak_memory", lambda: 0)
    monkeypatch.setattr(paddle.device.cuda, "get_device_name", lambda: "Some Card 9000")
    assert "mfu" not in Throughput(tiny_config, 16, 1).figures()
