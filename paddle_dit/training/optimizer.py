"""AdamW as the recipe wants it, and its state under names that mean something.

Paddle names optimizer state after generated parameter names ("linear_37.w_0_moment1_0"), which change with the order of
construction. Checkpoints use the model's own: "blocks.0.attn.qkv.weight/moment1_0".
"""

from collections.abc import Callable

import numpy as np
import paddle

from paddle_dit.errors import CheckpointError
from paddle_dit.training.precision import MASTER, Precision
from paddle_dit.training.recipe import TrainRecipe

SLICE = "slice@"  # what Paddle puts before the name of a parameter that it has cut (ZeRO stage 3)


def build_optimizer(recipe: TrainRecipe, model) -> paddle.optimizer.AdamW:
    """Return AdamW over those of the model's parameters that train; the learning rate is set anew at each step."""
    return paddle.optimizer.AdamW(
        learning_rate=recipe.learning_rate,
        beta1=recipe.adam_betas[0],
        beta2=recipe.adam_betas[1],
        epsilon=1e-8,
        weight_decay=recipe.weight_decay,
        parameters=[parameter for parameter in model.parameters() if not parameter.stop_gradient],
        multi_precision=Precision.of(recipe).has_master_weights,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(recipe.max_grad_norm) if recipe.max_grad_norm > 0 else None,
    )


def master_weights(optimizer) -> dict[str, paddle.Tensor]:
    """Return generated parameter name -> float32 weights; empty where the model's own are float32."""
    return optimizer._master_weights if optimizer._multi_precision else {}


def full_precision_weights(model, optimizer) -> dict[str, paddle.Tensor]:
    """Return structured name -> float32 weights: the master weights where there are any."""
    masters = master_weights(optimizer)
    return {name: masters.get(weight.name, weight) for name, weight in model.named_parameters()}


def optimizer_tensors(
    optimizer, model, full: Callable[[str, paddle.Tensor], np.ndarray] = lambda name, tensor: tensor.numpy()
) -> dict[str, np.ndarray]:
    """Return the optimizer's state as ``"<parameter>/<slot>" -> array``; ``full`` makes whole arrays of tensors."""
    names = {parameter.name: name for name, parameter in model.named_parameters()}
    tensors = {}
    for key, value in optimizer.state_dict().items():
        if isinstance(value, dict):  # master weights, which a checkpoint has as the model's, or a schedule
            continue
        key = key.removeprefix(SLICE)
        owner = max((own for own in names if key.startswith(f"{own}_")), key=len, default=None)
        if owner is not None:
            slot = key[len(owner) + 1 :].removeprefix(f"{MASTER}_")  # the same with and without master weights
            key = f"{names[owner]}/{slot}"
            tensors[key] = full(key, value)
    return tensors


def restore_optimizer(optimizer, model, tensors: dict[str, np.ndarray]) -> None:
    """Give a fresh optimizer the state that :func:`optimizer_tensors` returned.

    Raises:
        CheckpointError: state of a parameter that the model does not have, or that other parameters train.
    """
    suffix = f"_{MASTER}" if optimizer._multi_precision else ""
    own = {name: f"{parameter.name}{suffix}" for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    state = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in own:
            raise CheckpointError(f"the optimizer's state is of another model: it names '{name}'")
        state[f"{own[name]}_{slot}"] = paddle.to_tensor(value)
    changed = sorted(trained ^ {key.rpartition("/")[0] for key in tensors})
    if tensors and changed:
        raise CheckpointError(
            f"the optimizer's state is of a run that trained other parameters, as '{changed[0]}' shows; keep the former"
            " --train-only, or begin a run of its own with --init-from"
        )
    optimizer.set_state_dict(state)
