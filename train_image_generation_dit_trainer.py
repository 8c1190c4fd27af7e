"""Train a diffusion transformer with PaddleNLP's Trainer: its flags and callbacks, the same steps as train.py.

    python -u train_image_generation_dit_trainer.py --do_train --output_dir ./image_generation_dit_output_trainer \\
        --per_device_train_batch_size 16 --max_steps 1000000000 --image_logging_steps 1000 --logging_steps 50 \\
        --save_steps 5000 --save_total_limit 50 --vae_name_or_path stabilityai/sd-vae-ft-mse

With --data_path imagenet/train, images instead of latents are trained on, which that VAE encodes in each step. The same
command again continues the run from its newest whole checkpoint; --overwrite_output_dir moves what is there
aside and starts anew. A YAML or JSON recipe may stand first; flags override it. The defaults are the DiT paper's.
"""

from paddle_dit import runtime
from paddle_dit.errors import ConfigError, entry_point


@entry_point
def main() -> None:
    """Parse, check, train."""
    runtime.prepare()
    from paddle_dit.evaluation.while_training import TrainingJudge
    from paddle_dit.training.plan import make_plan
    from paddle_dit.training.plan_report import describe
    from paddle_dit.training.session import start_session
    from paddle_dit.training.trainer import DiTTrainer
    from paddle_dit.training.trainer_arguments import parse_arguments, trainer_flag_names

    arguments = parse_arguments(description=__doc__)
    with trainer_flag_names():
        plan = make_plan(arguments.recipe())
        if arguments.dry_run:
            print(describe(plan))
            return
        if not arguments.do_train:
            raise ConfigError("nothing to do: give --do_train, or --dry_run for the plan alone")
        start_session(plan, TrainingJudge).run(lambda session: DiTTrainer(arguments, session).train())


if __name__ == "__main__":
    main()
