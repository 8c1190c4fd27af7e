"""AdamW as the recipe wants it, and its state under names that mean something.

Paddle names optimizer state after generated parameter names ("linear_37.w_0_moment1_0"), which change with the order of
construction. Checkpoints use the model's own: "blocks.0.attn.qkv.weight/moment1_0".
"""

import numpy as np
import paddle

from paddle_dit.errors import CheckpointError
from paddle_dit.training.recipe import TrainRecipe


def build_optimizer(recipe: TrainRecipe, model) -> paddle.optimizer.AdamW:
    """Return AdamW over the model's parameters; the learning rate is set anew at each step."""
    return paddle.optimizer.AdamW(
        learning_rate=recipe.learning_rate,
        beta1=recipe.adam_betas[0],
        beta2=recipe.adam_betas[1],
        epsilon=1e-8,
        weight_decay=recipe.weight_decay,
        parameters=model.parameters(),
        grad_clip=paddle.nn.ClipGradByGlobalNorm(recipe.max_grad_norm) if recipe.max_grad_norm > 0 else None,
    )


def optimizer_tensors(optimizer, model) -> dict[str, np.ndarray]:
    """Return the optimizer's state as ``"<parameter>/<slot>" -> array``."""
    names = {parameter.name: name for name, parameter in model.named_parameters()}
    tensors = {}
    for key, value in optimizer.state_dict().items():
        owner = max((own for own in names if key.startswith(f"{own}_")), key=len, default=None)
        if owner is not None:
            tensors[f"{names[owner]}/{key[len(owner) + 1 :]}"] = value.numpy()
    return tensors


def restore_optimizer(optimizer, model, tensors: dict[str, np.ndarray]) -> None:
    """Give a fresh optimizer the state that :func:`optimizer_tensors` returned.

    Raises:
        CheckpointError: state of a parameter that the model does not have.
    """
    own = {name: parameter.name for name, parameter in model.named_parameters()}
    state = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in own:
            raise CheckpointError(f"the optimizer's state is of another model: it names '{name}'")
        state[f"{own[name]}_{slot}"] = paddle.to_tensor(value)
    optimizer.set_state_dict(state)
