"""The course of the learning rate."""

import math

from paddle_dit.training.recipe import TrainRecipe


def learning_rate_at(recipe: TrainRecipe, step: int, total_steps: int) -> float:
    """Return the learning rate of update ``step`` (from 0): a pure function, so nothing of it needs saving.

    The warm-up rises from 0 at step 0, as PaddleNLP's schedulers do.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    progress = (step - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps)
    share = 1.0 - progress if recipe.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return recipe.learning_rate * max(0.0, share)
