"""Layers with hand-written gradients, for training on the CPU.

Some of Paddle's CPU gradient kernels are far slower than what they compute: the sum over the rows of a bias' gradient
takes as long as the matrix product beside it, and LayerNorm's gradient 25 times its forward. Here every such sum is a
product with a vector of ones, which the BLAS does with all threads. Results differ from Paddle's by rounding alone.

Everything else (inference, tracing for export, GPUs, sharded weights) takes Paddle's own operations.
"""

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer


def _by_hand(*tensors) -> bool:
    """Whether the hand-written gradients are of use: float32 training on the CPU, and every input takes part."""
    return (
        paddle.in_dynamic_mode()
        and paddle.is_grad_enabled()
        and all(not x.stop_gradient and x.place.is_cpu_place() and not x.is_dist() for x in tensors)
        and all(x.dtype == paddle.float32 for x in tensors)
    )


class Linear(nn.Linear):
    """``x @ weight + bias`` for ``x [..., in]``."""

    def forward(self, x):
        """Map ``[..., in]`` to ``[..., out]``."""
        if not _by_hand(x, self.weight, self.bias):
            return super().forward(x)
        rows = _Linear.apply(x.reshape([-1, x.shape[-1]]), self.weight, self.bias)
        return rows.reshape([*x.shape[:-1], rows.shape[-1]])


class _Linear(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return paddle.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        return (
            paddle.matmul(grad, weight, transpose_y=True),
            paddle.matmul(x, grad, transpose_x=True),
            paddle.matmul(paddle.ones([1, grad.shape[0]], grad.dtype), grad).squeeze(0),
        )


def modulated_norm(x, shift, scale, epsilon: float):
    """Return ``layer_norm(x) * (1 + scale) + shift`` for ``x [N, T, D]``, ``shift`` and ``scale [N, D]``.

    The sums are float32 also where the inputs are half: ``1 + scale`` in bfloat16 would drop scales below 0.004.
    """
    if _by_hand(x, shift, scale):
        return _ModulatedNorm.apply(x, shift, scale, epsilon)
    normed, gain = _wide(F.layer_norm(x, x.shape[-1], epsilon=epsilon)), 1 + _wide(scale)
    out = normed * along_tokens(gain, x) + along_tokens(_wide(shift), x)
    return out if out.dtype == x.dtype else out.astype(x.dtype)


class _ModulatedNorm(PyLayer):
    @staticmethod
    def forward(ctx, x, shift, scale, epsilon):
        normed, gain = F.layer_norm(x, x.shape[-1], epsilon=epsilon), (1 + scale).unsqueeze(1)
        # With s the deviation that layer_norm divides by, mean(x * normed) = (s^2 - epsilon) / s. Solved for 1 / s:
        product = paddle.matmul(x * normed, paddle.full([x.shape[-1], 1], 1 / x.shape[-1], x.dtype))
        inverse = 2 / (product + paddle.sqrt(product * product + 4 * epsilon))  # (N, T, 1)
        ctx.save_for_backward(normed, inverse, gain)
        return (normed * _to_tokens(gain, x)).add_(_to_tokens(shift.unsqueeze(1), x))

    @staticmethod
    def backward(ctx, grad):
        normed, inverse, gain = ctx.saved_tensor()
        along_normed = grad * normed
        mean_of = gain.transpose([0, 2, 1]) / gain.shape[-1]  # (N, D, 1): the mean over D of what gain multiplies
        mean = paddle.matmul(grad, mean_of) * inverse
        slope = paddle.matmul(along_normed, mean_of) * inverse
        grad_x = grad * paddle.matmul(inverse, gain) - normed * _to_width(slope, grad) - _to_width(mean, grad)
        return grad_x, _sum_tokens(grad), _sum_tokens(along_normed)


def add_gated(x, branch, gate):
    """Return ``x + gate * branch`` for ``x`` and ``branch [N, T, D]``, ``gate [N, D]``."""
    if _by_hand(x, branch, gate):
        return _AddGated.apply(x, branch, gate)
    return x + branch * along_tokens(gate, x)


class _AddGated(PyLayer):
    @staticmethod
    def forward(ctx, x, branch, gate):
        ctx.save_for_backward(branch, gate)
        return x + branch * _to_tokens(gate.unsqueeze(1), x)

    @staticmethod
    def backward(ctx, grad):
        branch, gate = ctx.saved_tensor()
        return grad, grad * _to_tokens(gate.unsqueeze(1), grad), _sum_tokens(grad * branch)


def along_tokens(values, x):
    """Return ``values [N, D]``, or ``[1, T, D]``, in a shape that multiplies ``x [N, T, D]``.

    Expanded first, where the operation runs at once: Paddle's CPU kernels are slow at broadcast products. A program
    that is traced for export leaves it out, because ONNX has no such operation for a batch of unknown size.
    """
    values = values if values.ndim == 3 else values.unsqueeze(1)
    return values.expand_as(x) if paddle.in_dynamic_mode() else values


def _wide(x):
    return x if x.dtype == paddle.float32 else x.astype("float32")


def _sum_tokens(x):
    """Sum ``[N, T, D]`` over T."""
    return paddle.matmul(paddle.ones([x.shape[0], 1, x.shape[1]], x.dtype), x).squeeze(1)


def _to_tokens(x, like):
    """Repeat ``[N, 1, D]`` for every token of ``like [N, T, D]``; several times faster than ``expand``."""
    return paddle.matmul(paddle.ones([like.shape[0], like.shape[1], 1], like.dtype), x)


def _to_width(x, like):
    """Repeat ``[N, T, 1]`` over the width of ``like [N, T, D]``."""
    return paddle.matmul(x, paddle.ones([like.shape[0], 1, like.shape[2]], like.dtype))
