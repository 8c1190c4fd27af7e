"""One run's state and what is done with it; the loops of ``train.py`` and of PaddleNLP's Trainer only say when."""

import contextlib

import numpy as np
import paddle
from tqdm import tqdm

from paddle_dit.config import DiTConfig
from paddle_dit.data.loader import BatchLoader
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import ConfigError, NonFiniteLossError, PaddleDiTError
from paddle_dit.models.dit import DiT
from paddle_dit.training.data_parallel import DataParallel, ShardedDataParallel
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.monitor import Monitor
from paddle_dit.training.optimizer import build_optimizer
from paddle_dit.training.parallel import TensorParallel
from paddle_dit.training.plan import Plan
from paddle_dit.training.precision import Precision, has_gpu
from paddle_dit.training.ranks import Ranks
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.sampling_preview import PreviewOptions, SamplingPreview
from paddle_dit.training.saving import open_run, save
from paddle_dit.training.step import TrainingStep
from paddle_dit.training.throughput import Throughput
from paddle_dit.training.validation import Validation


def start_session(plan: Plan) -> "Session":
    """Join the other ranks and build or continue the run.

    Raises:
        ConfigError: the recipe needs a GPU and there is none.
        CheckpointError: the run cannot be continued.
    """
    recipe = plan.recipe
    if recipe.sharding != "none" and not has_gpu():
        raise ConfigError(f"--sharding {recipe.sharding} needs GPUs; leave it out on the CPU")
    Precision.of(recipe).check_device()
    return Session(plan, Ranks.join(recipe.tensor_parallel_degree))


def _layout(recipe: TrainRecipe, config: DiTConfig, ranks: Ranks) -> DataParallel | TensorParallel:
    """Return how the model and its training lie on the ranks."""
    if recipe.tensor_parallel_degree > 1:
        layout = TensorParallel(ranks)
        layout.check(config)
        return layout
    return DataParallel(ranks) if recipe.sharding == "none" else ShardedDataParallel(ranks, recipe.sharding)


class Session:
    """Model, optimizer, averaged weights, data and reports of one run, from its newest checkpoint on.

    A context manager: inside, :meth:`backward` and :meth:`update` make one step, and the other methods may be called
    between two steps, on all ranks alike.

    Attributes:
        updates: steps made so far.
        skipped: those of them that were left out because a loss was not finite.
    """

    def __init__(self, plan: Plan, ranks: Ranks):
        self.plan, self.recipe, self.ranks = plan, plan.recipe, ranks
        recipe, config = plan.recipe, plan.info.config
        paddle.seed(recipe.global_seed)
        objective = GaussianDiffusion()
        self.parallel = _layout(recipe, config, ranks)
        self.model = DiT(config, recompute_every=recipe.recompute)
        ranks.copy_from(self.model.parameters())
        self.parallel.shard_model(self.model)
        spread_over = None if recipe.sharding == "none" else ranks
        self.ema = ExponentialMovingAverage(
            self.model, recipe.ema_decay, warmup=recipe.ema_warmup, spread_over=spread_over
        )
        self.step = TrainingStep(
            self.model,
            objective,
            build_optimizer(recipe, self.model),
            self.ema,
            self.parallel,
            recipe.global_seed,
            recipe.accumulation,
            precision=Precision.of(recipe),
        )
        self.updates = self.skipped = 0
        self.throughput = Throughput(config, recipe.global_batch_size, ranks.world_size)
        self.validation = self.preview = None
        if plan.validation is not None:
            self.validation = Validation(plan.validation, config, objective, recipe.global_seed, ranks)
        self._window: list[dict] = []
        self._drawn = False
        self._open = contextlib.ExitStack()
        open_run(self)
        self.step.precision.cast(self.model, self.optimizer)
        self.parallel.wrap(self.step)

    @property
    def optimizer(self) -> paddle.optimizer.Optimizer:
        """The optimizer; sharding wraps it once all state has been restored."""
        return self.step.optimizer

    @property
    def finished(self) -> bool:
        """Whether every step has been made."""
        return self.updates >= self.plan.total_steps

    def __enter__(self) -> "Session":
        """Open the data and the reports."""
        recipe, ranks = self.recipe, self.ranks
        monitor = Monitor(
            recipe.output_dir,
            self.plan.total_steps,
            self.updates,
            ranks.is_main,
            visualdl=recipe.visualdl_folder,
            progress_bar=recipe.progress_bar,
        )
        loader = BatchLoader(
            self.plan.source,
            self.plan.order,
            rank=ranks.data_rank,
            world_size=ranks.data_ranks,
            start_step=self.updates,
            num_workers=recipe.num_workers,
            flip_seed=recipe.global_seed,
        )
        # The monitor closes first, so that an error's message starts on a line of its own.
        self.loader, self.monitor = self._open.enter_context(loader), self._open.enter_context(monitor)
        if recipe.image_logging_steps > 0:
            options = PreviewOptions(recipe.num_inference_steps, recipe.guidance_scales, vae=recipe.vae_name_or_path)
            add_image = self.monitor.add_image
            self.preview = SamplingPreview(self.plan.info, options, ranks, recipe.output_dir, add_image)
        self.throughput.restart()
        return self

    def __exit__(self, *_: object) -> None:
        """Close both."""
        self._open.close()

    def say_finished(self) -> None:
        """Say that there is no step left to make."""
        total = self.plan.total_steps
        self.say(f"already at step {self.updates:,} of {total:,}: nothing to do; raise --max-steps to go on")

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.ranks.is_main:
            tqdm.write(line)

    def backward(self) -> dict | None:
        """Read the next batch and compute its gradients; return this rank's losses as tensors.

        An error of one rank is raised on all. None is returned where a loss was not finite and the step is skipped.
        """
        losses = None
        with self.ranks.together(), self.throughput.waiting():
            batch = next(self.loader)
        # Where a rank's backward pass waits for others, it raises what concerns them on all by itself; and anything
        # else must leave the process, for the launcher to end those who wait.
        collective = self.parallel.backward_is_collective
        try:
            with contextlib.nullcontext() if collective else self.ranks.together():
                losses = self.step.backward(batch.step, batch.latents, batch.labels, batch.positions)
        except NonFiniteLossError as error:
            if losses is not None:  # it was another rank's
                self.optimizer.clear_grad()
            self._skip(error)
            return None
        self._window.append(losses)
        return losses

    def _skip(self, error: NonFiniteLossError) -> None:
        told = str(error)
        if error.positions:
            samples = self.plan.order.global_batch(error.step)[error.positions]
            told += f", samples {self.plan.sample_names(samples)}"
        self.skipped += 1
        if self.skipped > self.recipe.max_skipped_steps:
            raise PaddleDiTError(
                f"{told}; the weights are as before, and earlier checkpoints are whole: lower"
                " --learning-rate, look at these samples, or allow it some times with --max-skipped-steps"
            ) from error
        self.say(f"{told}: skipped ({self.skipped} of {self.recipe.max_skipped_steps})")

    def update(self, losses: dict | None) -> None:
        """End the step that :meth:`backward` began."""
        self._learning_rate = float(self.optimizer.get_lr())
        if losses is not None:
            try:
                self.step.update(self.updates)
            except NonFiniteLossError as error:
                self._skip(error)
        self.updates += 1
        self.throughput.advance()
        self.monitor.advance()

    def log(self) -> dict[str, float]:
        """Record and return the mean losses since the last call, over all ranks, with rate and memory."""
        figures = self._mean_losses() | {"learning_rate": self._learning_rate} | self.throughput.figures()
        figures |= {"skipped_steps": self.skipped} if self.recipe.max_skipped_steps else {}
        figures |= {"overflows": self.step.overflows} if self.step.scaler else {}
        self.monitor.record(self.updates, figures)
        self.throughput.restart()
        return figures

    def _mean_losses(self) -> dict[str, float]:
        window, self._window = self._window, []
        if not window:  # every step of it was skipped
            return {"loss": float("nan")}
        names = list(window[0])
        means = self.ranks.mean(float(sum(losses[name] for losses in window)) / len(window) for name in names)
        return dict(zip(names, map(float, means), strict=True))

    def evaluate(self) -> dict[str, float]:
        """Record and return the losses on held-out samples, of the weights and of their average."""
        with self.throughput.paused():
            losses = self.validation.losses(self.step.predict)
            with self.ema.applied(self.parallel):
                losses |= {f"{name}_ema": value for name, value in self.validation.losses(self.step.predict).items()}
        self.monitor.record(self.updates, losses, group="eval")
        return losses

    def draw(self) -> None:
        """Draw the preview images with the averaged weights; the first time, also decode some training latents."""
        with self.throughput.paused():
            if not self._drawn:
                first = np.arange(min(8, len(self.plan.source)))
                self.preview.reconstruct(*self.plan.source.gather(first))
                self._drawn = True
            with self.ema.applied(self.parallel):
                self.preview.draw(self.model, self.updates, self.step.predict)

    def save(self) -> None:
        """Write a checkpoint; every rank returns when it is whole."""
        with self.throughput.paused():
            save(self)
