"""What half precision cannot hold is computed in float32, and said once; on the CPU it is refused."""

import numpy as np
import paddle
import pytest

from paddle_dit import half_precision
from paddle_dit.errors import ConfigError
from paddle_dit.half_precision import GuardedPrecision


@pytest.fixture
def rounding(monkeypatch):
    """Let half precision be told from float32 without a GPU; return the narrow numbers' dtype while it is on."""
    narrow = []

    class Autocast:
        """Says that narrow numbers are wanted."""

        def __init__(self, precision, level="O1"):
            self.precision = precision

        def __enter__(self):
            narrow.append(half_precision.PADDLE_NAMES[self.precision])

        def __exit__(self, *_):
            narrow.pop()

    monkeypatch.setattr(half_precision, "has_gpu", lambda: True)
    monkeypatch.setattr(half_precision, "autocast", Autocast)
    return narrow


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_numbers_that_overflow_are_computed_again_in_float32_and_said_once(rounding, precision):
    said = []
    guarded = GuardedPrecision(precision, "this VAE", said.append)
    small, large = ([1.1, -2.0], [1.1, 1e5]) if precision == "fp16" else ([1.1, -2.0], [1.1, 3.4e38])

    def run():
        return paddle.to_tensor(numbers).astype(rounding[-1] if rounding else "float32")

    numbers = small
    narrow = guarded.compute(run)
    assert narrow.dtype == paddle.float32
    assert 0 < abs(float(narrow[0]) - np.float32(1.1)) < 0.01
    assert (guarded.overflows, said) == (0, [])
    numbers = large
    for _ in range(2):
        np.testing.assert_array_equal(guarded.compute(run).numpy(), np.float32(large))
    mend = "; bf16 has float32's range" if precision == "fp16" else ""
    assert said == [f"{precision} overflows in this VAE: such batches are computed in float32{mend}"]
    assert guarded.overflows == 2
    numbers = small
    np.testing.assert_array_equal(guarded.compute(run).numpy(), narrow.numpy())


def test_float32_is_computed_once_whatever_comes_of_it_and_without_gradients():
    calls, weight = [], paddle.to_tensor([float("nan")], stop_gradient=False)
    result = GuardedPrecision("fp32", "this VAE", pytest.fail).compute(lambda: calls.append(1) or 2 * weight)
    assert result.isnan().all()
    assert result.stop_gradient
    assert calls == [1]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_needs_a_gpu(monkeypatch, precision):
    monkeypatch.setattr(half_precision, "has_gpu", lambda: False)
    GuardedPrecision("fp32")
    with pytest.raises(ConfigError, match=f"--precision {precision} needs a GPU; .*: use fp32"):
        GuardedPrecision(precision)
