"""The hand-written gradients against Paddle's own operations."""

import numpy as np
import paddle
import pytest

from paddle_dit.models import fused

SHAPES = {"x": [3, 5, 8], "branch": [3, 5, 8], "shift": [3, 8], "scale": [3, 8], "gate": [3, 8]}
CASES = {
    "modulated_norm": (lambda x, shift, scale: fused.modulated_norm(x, shift, scale, 1e-6), ["x", "shift", "scale"]),
    "add_gated": (fused.add_gated, ["x", "branch", "gate"]),
}


def run(function, names, by_hand, monkeypatch, spread=1.0, offset=0.0):
    """Return the output and the gradients for fixed random inputs, with or without the hand-written ones."""
    called = []
    decide = fused._by_hand
    monkeypatch.setattr(fused, "_by_hand", lambda *tensors: called.append(1) or (by_hand and decide(*tensors)))
    random = np.random.default_rng(0)
    inputs = []
    for name in names:
        value = random.standard_normal(SHAPES[name]).astype(np.float32)
        value = value * spread + offset if name == "x" else value
        inputs.append(paddle.to_tensor(value, stop_gradient=False))
    out = function(*inputs)
    (out * paddle.to_tensor(random.standard_normal(out.shape).astype(np.float32))).sum().backward()
    monkeypatch.undo()
    assert called
    return [out.numpy(), *(value.grad.numpy() for value in inputs)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("spread", "offset"), [(1.0, 0.0), (100.0, 50.0), (0.01, 0.0)])
def test_values_and_gradients_agree(case, spread, offset, monkeypatch):
    function, names = CASES[case]
    ours = run(function, names, True, monkeypatch, spread, offset)
    theirs = run(function, names, False, monkeypatch, spread, offset)
    for name, one, other in zip(["out", *names], ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), err_msg=name)


def test_linear_agrees(monkeypatch):
    layer = fused.Linear(8, 6)
    results = []
    for by_hand in (True, False):
        layer.clear_gradients()
        results.append(run(layer, ["x"], by_hand, monkeypatch))
        results[-1] += [layer.weight.grad.numpy(), layer.bias.grad.numpy()]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


def test_inference_takes_paddles_operations():
    x = paddle.ones([2, 3, 8])
    with paddle.no_grad():
        assert not fused._by_hand(x)
    assert not fused._by_hand(x)  # nothing asks for its gradient
    x.stop_gradient = False
    assert fused._by_hand(x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_scales_of_half_precision_are_not_lost(dtype):
    random = np.random.default_rng(0)
    x = paddle.to_tensor(random.standard_normal(SHAPES["x"]).astype(np.float32))
    shift, scale = (
        paddle.to_tensor((deviation * random.standard_normal(SHAPES["scale"])).astype(np.float32)).astype(dtype)
        for deviation in (1.0, 1e-4)
    )
    with paddle.no_grad():
        out = fused.modulated_norm(x, shift, scale, 1e-6)
        normed = paddle.nn.functional.layer_norm(x, x.shape[-1], epsilon=1e-6).numpy()
    added = [value.astype("float32").numpy()[:, None] for value in (1 + scale, scale, shift)]
    rounded, scale, shift = added
    assert out.dtype == paddle.float32
    np.testing.assert_allclose(out.numpy(), normed * (1 + scale) + shift, atol=1e-6)
    assert np.abs(out.numpy() - (normed * rounded + shift)).max() > 1e-5
