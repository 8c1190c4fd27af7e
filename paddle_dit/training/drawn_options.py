"""What can be refused of ``--eval-every`` before anything is loaded."""

from typing import TYPE_CHECKING

from paddle_dit.diffusion.schedule import NUM_TRAIN_TIMESTEPS
from paddle_dit.errors import ConfigError

if TYPE_CHECKING:
    from paddle_dit.training.recipe import TrainRecipe

_FEWEST = 4  # precision and recall need each image's third nearest neighbour
_MOST = 10**9


def check_drawn(recipe: "TrainRecipe") -> None:
    """Refuse values with which no images could be drawn, or compared.

    Raises:
        ConfigError: naming the first such value.
    """
    if not recipe.eval_every:
        if recipe.eval_steps > 0 and recipe.eval_samples != type(recipe).eval_samples:
            raise ConfigError(
                "--eval-samples counts the images drawn with --eval-every; the samples held out for --eval-steps are "
                "--held-out-samples"
            )
        return
    if not _FEWEST <= recipe.eval_samples < _MOST:
        raise ConfigError(f"--eval-samples must be {_FEWEST} or more, and below 10**9, got {recipe.eval_samples}")
    if recipe.eval_reference is None:
        raise ConfigError("--eval-every needs real images to compare with; give --eval-reference FOLDER or .npz")
    if recipe.inception is not None and recipe.eval_features != "inception":
        raise ConfigError("--inception is for --eval-features inception; leave one of the two out")
    if not 1 <= recipe.eval_inference_steps <= NUM_TRAIN_TIMESTEPS:
        raise ConfigError(
            f"--eval-inference-steps must be 1 to {NUM_TRAIN_TIMESTEPS}, got {recipe.eval_inference_steps}"
        )
    if recipe.eval_guidance_scale < 1:
        raise ConfigError(f"--eval-guidance-scale must be 1 (none) or more, got {recipe.eval_guidance_scale}")
