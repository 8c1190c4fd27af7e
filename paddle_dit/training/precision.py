"""Numbers of half the width on GPUs: which tensors have them, and what keeps float16 from underflowing."""

import contextlib
import os
from dataclasses import dataclass

import paddle

from paddle_dit.config import Dtype
from paddle_dit.half_precision import PADDLE_NAMES, autocast, check_precision
from paddle_dit.runtime import has_gpu
from paddle_dit.training.recipe import AmpLevel, TrainRecipe

MASTER = "fp32_master_0"


@dataclass(frozen=True)
class Precision:
    """The policy of one run.

    ===================  =======  ==================  ==================
    tensor               fp32     half, O1            half, O2
    ===================  =======  ==================  ==================
    weights, gradients   float32  float32             half
    master weights       none     none                float32
    AdamW's moments      float32  float32             float32
    averaged weights     float32  float32             float32
    matrix products      float32  half                half
    sinusoids, loss      float32  float32             float32
    ``1 + scale``        float32  float32             float32
    ===================  =======  ==================  ==================

    Attributes:
        dtype: "fp32", "bf16" or "fp16".
        level: Paddle's O1 or O2; without meaning for fp32.
    """

    dtype: Dtype = "fp32"
    level: AmpLevel = "O1"

    @classmethod
    def of(cls, recipe: TrainRecipe) -> "Precision":
        """Return the policy that a recipe asks for."""
        return cls(recipe.precision, recipe.amp_level)

    @property
    def is_half(self) -> bool:
        """Whether anything is narrower than float32."""
        return self.dtype != "fp32"

    @property
    def has_master_weights(self) -> bool:
        """Whether the model's own weights are half, so that the optimizer keeps float32 ones."""
        return self.is_half and self.level == "O2"

    @property
    def weight_dtype(self) -> str:
        """Paddle's name of the dtype of the weights and their gradients."""
        return PADDLE_NAMES[self.dtype] if self.has_master_weights else "float32"

    def check_device(self) -> None:
        """Refuse half precision where Paddle would compute in float32 without a word.

        Raises:
            ConfigError: this Paddle has no GPU.
        """
        check_precision(self.dtype)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context that a forward pass runs in."""
        return autocast(self.dtype, self.level)

    @paddle.no_grad()
    def cast(self, model, optimizer) -> None:
        """Under O2, narrow the model's weights, and leave the present ones to the optimizer as master weights.

        Call it after restoring and before the first step.
        """
        if self.has_master_weights:
            for weight in model.parameters():
                master = weight.detach().clone()
                master.name = f"{weight.name}_{MASTER}"  # as Paddle names it; the moments are named after it
                optimizer._master_weights[weight.name] = master
            model.to(dtype=self.weight_dtype)

    def loss_scaler(self) -> "LossScaler | None":
        """Return what scales the loss: float16 alone needs it."""
        return LossScaler() if self.dtype == "fp16" else None


class LossScaler:
    """Dynamic loss scaling: the scale halves when a gradient overflows, and doubles after 2,000 steps without.

    Micikevicius et al. 2018, "Mixed precision training", section 3.2.
    """

    def __init__(self):
        self.inner = paddle.amp.GradScaler(init_loss_scaling=2.0**16, incr_every_n_steps=2000)

    def scale(self, loss):
        """Return the loss whose backward pass is to be made."""
        return self.inner.scale(loss)

    def step(self, optimizer) -> bool:
        """Unscale the gradients and update the weights; False, and no update, where a gradient overflowed."""
        self.inner.step(optimizer)
        self.inner.update()
        return not bool(self.inner._cache_found_inf)  # Paddle tells it nowhere else

    def state(self) -> dict[str, float]:
        """Return what a resumed run needs, for JSON."""
        state = self.inner.state_dict()
        return {"scale": float(state["scale"]), "incr_count": state["incr_count"], "decr_count": state["decr_count"]}

    def restore(self, state: dict[str, float]) -> None:
        """Take over :meth:`state`."""
        self.inner.load_state_dict(
            {**self.inner.state_dict(), **state, "scale": paddle.to_tensor([state["scale"]]).numpy()}
        )


def be_deterministic() -> None:
    """On a GPU, use only kernels that give the same bits each time; those of the CPU do anyway. Not run on a GPU yet.

    Call it before the ranks are joined: NCCL reads its settings then.
    """
    if has_gpu():
        paddle.set_flags({"FLAGS_cudnn_deterministic": True, "FLAGS_embedding_deterministic": 1})
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
