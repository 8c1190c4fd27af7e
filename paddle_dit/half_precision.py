"""Half precision: where it is allowed, and float32 again for what it cannot hold."""

import contextlib
from collections.abc import Callable

from paddle_dit.errors import ConfigError
from paddle_dit.runtime import has_gpu

PADDLE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_precision(precision: str) -> None:
    """Refuse half precision where Paddle would compute in float32 without a word.

    Args:
        precision: "fp32", "bf16" or "fp16".

    Raises:
        ConfigError: this Paddle has no GPU.
    """
    if precision != "fp32" and not has_gpu():
        raise ConfigError(f"--precision {precision} needs a GPU; Paddle's CPU kernels have float32 alone: use fp32")


def autocast(precision: str, level: str = "O1") -> contextlib.AbstractContextManager:
    """Return the context in which Paddle computes in a precision.

    Args:
        precision: "fp32", "bf16" or "fp16".
        level: Paddle's O1 or O2; without meaning for fp32.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    import paddle

    return paddle.amp.auto_cast(dtype=PADDLE_NAMES[precision], level=level)


class GuardedPrecision:
    """Computes in a precision without gradients, and again in float32 what overflows.

    Attributes:
        overflows: how many computations did.

    Args:
        precision: "fp32", "bf16" or "fp16"; neither of the latter has been run on a GPU yet.
        what: overflows, for the message.
        report: is told so, in a line, the first time.

    Raises:
        ConfigError: half precision without a GPU.
    """

    def __init__(
        self, precision: str = "fp32", what: str = "this model", report: Callable[[str], None] = print
    ) -> None:
        check_precision(precision)
        self.overflows = 0
        self._precision, self._what, self._report = precision, what, report

    def compute(self, run: Callable):
        """Return the tensor that ``run()`` returns, in float32.

        Args:
            run: is called again, outside of half precision, where a value of the first call is not finite.
        """
        import paddle

        with paddle.no_grad():
            with autocast(self._precision):
                values = run().astype("float32")
            if self._precision == "fp32" or bool(paddle.isfinite(values).all()):
                return values
            if not self.overflows:
                mend = "; bf16 has float32's range" if self._precision == "fp16" else ""
                self._report(f"{self._precision} overflows in {self._what}: such batches are computed in float32{mend}")
            self.overflows += 1
            return run().astype("float32")
