"""Train a diffusion transformer on pre-extracted latents or on images, on one process or many.

    python -m paddle.distributed.launch --nnodes=1 --nproc_per_node=8 train.py \\
        --model DiT-XL/2 --feature-path ./data/fastdit_imagenet256 --global-batch-size 256

With --data-path imagenet/train --vae stabilityai/sd-vae-ft-mse instead of --feature-path, each step encodes its images.
With --init-from PATH or a hub name, training starts from those weights, on these data's classes and image size.

The same command again continues the run from its newest whole checkpoint. A YAML recipe (-c recipe.yaml) holds the
same options; the command line overrides it. The defaults are the DiT paper's.
"""

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point
from paddle_dit.training.plan import make_plan
from paddle_dit.training.plan_report import describe
from paddle_dit.training.recipe import TrainRecipe


@entry_point
def main() -> None:
    """Parse, check, train."""
    recipe = parse(TrainRecipe, description=__doc__)
    runtime.prepare()  # a plan may have to download a VAE, and what does that imports Paddle
    plan = make_plan(recipe)
    if recipe.dry_run:
        print(describe(plan))
        return
    from paddle_dit.evaluation.while_training import TrainingJudge
    from paddle_dit.training.loop import train
    from paddle_dit.training.session import start_session

    start_session(plan, TrainingJudge).run(train)


if __name__ == "__main__":
    main()
