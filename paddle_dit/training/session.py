"""One run's state and what is done with it; the loops of ``train.py`` and of PaddleNLP's Trainer only say when."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
import paddle
from tqdm import tqdm

from paddle_dit.config import DiTConfig
from paddle_dit.data.loader import BatchLoader
from paddle_dit.data.moments import DrawnLatents
from paddle_dit.data.source import LatentSource
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.errors import ConfigError, NonFiniteLossError, PaddleDiTError
from paddle_dit.models.dit import DiT
from paddle_dit.runtime import has_gpu
from paddle_dit.training.background import Background
from paddle_dit.training.data_parallel import DataParallel, ShardedDataParallel
from paddle_dit.training.ema import ExponentialMovingAverage
from paddle_dit.training.encoding import Encoder
from paddle_dit.training.frozen import freeze
from paddle_dit.training.monitor import Monitor
from paddle_dit.training.optimizer import build_optimizer
from paddle_dit.training.parallel import TensorParallel
from paddle_dit.training.plan import Plan
from paddle_dit.training.precision import Precision, be_deterministic
from paddle_dit.training.ranks import Ranks
from paddle_dit.training.recipe import TrainRecipe
from paddle_dit.training.sampling_preview import PreviewOptions, SamplingPreview
from paddle_dit.training.saving import open_run, save
from paddle_dit.training.signals import STOPPED, StopSignals
from paddle_dit.training.step import TrainingStep
from paddle_dit.training.throughput import Throughput
from paddle_dit.training.validation import Validation
from paddle_dit.training.window import LossWindow


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
    if recipe.deterministic:
        be_deterministic()
    return Session(plan, Ranks.join(recipe.tensor_parallel_degree))


def _layout(recipe: TrainRecipe, config: DiTConfig, ranks: Ranks) -> DataParallel | TensorParallel:
    """Return how the model and its training lie on the ranks."""
    if recipe.tensor_parallel_degree > 1:
        layout = TensorParallel(ranks)
        layout.check(config)
        return layout
    return DataParallel(ranks) if recipe.sharding == "none" else ShardedDataParallel(ranks, recipe.sharding)


def _what_latents_would_bring(figures: dict[str, float]) -> str:
    return (
        f"of the time, encoding images takes {figures['encoding']:.0%} and waiting for them {figures['data_wait']:.0%}:"
        f" {figures['images_per_second']:.4g} images/s; from latents, which scripts/extract_features.py makes once for"
        f" all runs, it would be about {figures['images_per_second_from_latents']:.4g}"
    )


class _Stopped(Exception):
    """Leaves an evaluation or a preview because a signal asks the run to stop."""


class Session:
    """Model, optimizer, averaged weights, data and reports of one run, from its newest checkpoint on.

    :meth:`run` opens it, calls a loop and leaves it. In the loop, :meth:`backward` and :meth:`update` make one step,
    and the other methods may be called between two steps, on all ranks alike.

    Attributes:
        updates: steps made so far.
        skipped: those of them that were left out because a loss was not finite.
        stopping: whether a signal to any rank asks the run to stop; settled at the end of each step.
        saved: step of the run's newest checkpoint, 0 before the first.
        undone: what is still to be done after the last step, because a signal came: "evaluate", "draw".
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
        freeze(self.model, recipe.train_only)
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
        self.stopping, self.saved, self.undone = False, 0, []
        self.window, self.background = LossWindow(ranks), Background()
        self.throughput = Throughput(config, recipe.global_batch_size, ranks.world_size, recipe.train_only)
        self.validation = self.preview = self.encoder = None
        if plan.images is not None:
            with ranks.together():  # each loads the VAE for itself
                self.encoder = Encoder(plan.info, recipe.global_seed, self.step.precision, self.say)
        if plan.validation is not None:
            held_out = self._latents_of(plan.validation)
            self.validation = Validation(held_out, config, objective, recipe.global_seed, ranks)
        self._drawn, self._windows = False, 0
        with contextlib.ExitStack() as opened:
            self._signals = opened.enter_context(StopSignals())  # from here on, as verifying a checkpoint takes a while
            opened.enter_context(self.background)
            self.lock = open_run(self, opened)
            self.step.precision.cast(self.model, self.optimizer)
            self.parallel.wrap(self.step)
            self._open = opened.pop_all()  # to be closed at the end of the run, or by an error before

    @property
    def optimizer(self) -> paddle.optimizer.Optimizer:
        """The optimizer; sharding wraps it once all state has been restored."""
        return self.step.optimizer

    @property
    def finished(self) -> bool:
        """Whether every step has been made."""
        return self.updates >= self.plan.total_steps

    def run(self, loop: Callable[["Session"], None]) -> None:
        """Open the run, do what was left undone, call ``loop`` unless there is nothing to do, and leave.

        Raises:
            SystemExit: with code :data:`~paddle_dit.training.signals.STOPPED`: a signal stopped the run, which has
                been saved before the last rank left.
        """
        with self._open as opened:
            if self.finished and not self.undone:
                total = self.plan.total_steps
                self.say(f"already at step {self.updates:,} of {total:,}: nothing to do; raise --max-steps to go on")
                return
            self._enter(opened)
            self._look_around()
            self._catch_up()
            if not self.finished and not self.stopping:
                loop(self)
            stopped = self.stopping and not (self.finished and not self.undone)
            if stopped and self.saved != self.updates:
                self.save()
            self.ranks.wait_for_main(self.background.waiting())
        if stopped:
            self.say(f"stopped after step {self.updates:,}; the same command continues")
            sys.exit(STOPPED)

    def _enter(self, opened: contextlib.ExitStack) -> None:
        """Open the data and the reports."""
        recipe, ranks = self.recipe, self.ranks
        loader = BatchLoader(
            self.plan.source,
            self.plan.order,
            rank=ranks.data_rank,
            world_size=ranks.data_ranks,
            start_step=self.updates,
            num_workers=recipe.num_workers,
            seed=recipe.global_seed,
        )
        self.loader = opened.enter_context(loader)
        if self.plan.images is not None:  # closes first: whoever still reads need not be waited for
            opened.enter_context(self.plan.images.decoders)
        monitor = Monitor(
            recipe.output_dir,
            self.plan.total_steps,
            self.updates,
            ranks.is_main,
            visualdl=recipe.visualdl_folder,
            progress_bar=recipe.progress_bar,
        )
        self.monitor = opened.enter_context(monitor)  # closes first: an error's message starts on a line of its own
        if recipe.image_logging_steps > 0:
            options = PreviewOptions(
                recipe.num_inference_steps,
                recipe.guidance_scales,
                vae=recipe.vae_name_or_path,
                precision=recipe.precision,
            )
            self.preview = SamplingPreview(
                self.plan.info,
                options,
                ranks,
                recipe.output_dir,
                self.monitor.add_image,
                lambda: self._signals.received is not None,
                self.encoder.vae if self.encoder else None,
            )
        self.throughput.restart()

    def _latents_of(self, source: LatentSource) -> LatentSource:
        """Return a source as latents, of moments and images the same each time."""
        if source.kind == "moments":
            return DrawnLatents(source, self.recipe.global_seed)
        return source if self.encoder is None else self.encoder.fixed(source)

    def _catch_up(self) -> None:
        """Do what a signal kept from being done after the step that the run continues from."""
        duties, self.undone = self.undone, []
        if "evaluate" in duties and self.validation:
            self.evaluate()
        if "draw" in duties and self.preview:
            self.draw()

    def _look_around(self) -> None:
        """Learn, on all ranks alike, of signals and of a save in the background that has failed."""
        received, failed = self.ranks.any(self._signals.received is not None, self.background.has_failed)
        if failed:
            self.ranks.wait_for_main(self.background.waiting())
        self.stopping = received

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.ranks.is_main:
            tqdm.write(line)

    def backward(self) -> dict | None:
        """Read the next batch, encode it if need be, compute its gradients; return this rank's losses as tensors.

        An error of one rank is raised on all. None is returned where a loss was not finite and the step is skipped.
        """
        losses = None
        with self.ranks.together():
            with self.throughput.waiting():
                batch = next(self.loader)
            latents = batch.latents
            if self.encoder is not None:
                with self.throughput.encoding():
                    latents = self.encoder(batch.latents, batch.step, batch.positions)
        # Where a rank's backward pass waits for others, it raises what concerns them on all by itself; and anything
        # else must leave the process, for the launcher to end those who wait.
        collective = self.parallel.backward_is_collective
        try:
            with contextlib.nullcontext() if collective else self.ranks.together():
                losses = self.step.backward(batch.step, latents, batch.labels, batch.positions)
        except NonFiniteLossError as error:
            if losses is not None:  # it was another rank's
                self.optimizer.clear_grad()
            self._skip(error)
            return None
        self.window.add(losses)
        return losses

    def _skip(self, error: NonFiniteLossError) -> None:
        told = str(error)
        if error.positions:
            samples = self.plan.order.global_batch(error.step)[error.positions]
            told += f", samples {self.plan.sample_names(samples)}"
        self.skipped += 1
        if self.skipped > self.recipe.max_skipped_steps:
            look = ", look at these samples," if error.positions else ""
            raise PaddleDiTError(
                f"{told}; the weights are as before, and earlier checkpoints are whole: lower --learning-rate{look} or"
                " allow it some times with --max-skipped-steps"
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
        self._look_around()

    def log(self) -> dict[str, float]:
        """Record and return the mean losses since the last call, over all ranks, with rate and memory."""
        figures = self.window.mean() | {"learning_rate": self._learning_rate} | self.throughput.figures()
        figures |= {"skipped_steps": self.skipped} if self.recipe.max_skipped_steps else {}
        figures |= {"overflows": self.step.overflows} if self.step.scaler else {}
        self.monitor.record(self.updates, figures)
        self._windows += 1
        if "encoding" in figures and self._windows == 2:  # the first has in it what takes a while to start
            self.say(_what_latents_would_bring(figures))
        self.throughput.restart()
        return figures

    def evaluate(self) -> dict[str, float]:
        """Record and return the losses on held-out samples, of the weights and of their average."""
        losses: dict[str, float] = {}
        with self._unless_stopped("evaluate"):
            losses = self.validation.losses(self._predict)
            with self.ema.applied(self.parallel):
                losses |= {f"{name}_ema": value for name, value in self.validation.losses(self._predict).items()}
            self.monitor.record(self.updates, losses, group="eval")
        return losses

    def draw(self) -> None:
        """Draw the preview images with the averaged weights; the first time, also decode some training latents."""
        with self._unless_stopped("draw"):
            with self.ema.applied(self.parallel):
                made = self.preview.draw(self.model, self.updates, self._predict)
            if made and not self._drawn:
                first = np.arange(min(8, len(self.plan.source)))
                with self.ranks.together():
                    latents = self._latents_of(self.plan.source).gather(first)
                made = self._drawn = self.preview.reconstruct(*latents)
            if not made:
                raise _Stopped

    @contextlib.contextmanager
    def _unless_stopped(self, duty: str) -> Iterator[None]:
        """Leave the block, which predicts by :meth:`_predict`, when a signal comes; the next run does it again."""
        try:
            with self.throughput.paused():
                yield
        except _Stopped:  # on all ranks alike
            self.undone.append(duty)
            self._look_around()

    def _predict(self, x, timesteps, class_labels):
        """Run the model, which takes a while on all ranks alike, unless the run is to stop."""
        self._look_around()
        if self.stopping:
            raise _Stopped
        return self.step.predict(x, timesteps, class_labels)

    def save(self) -> None:
        """Save a checkpoint; when every rank returns it is whole, or with ``--async-save`` on its way."""
        with self.throughput.paused():
            save(self)
