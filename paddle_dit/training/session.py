"""One run's state and what is done with it; the loops of ``train.py`` and of PaddleNLP's Trainer only say when."""

import contextlib
import os
import sys
from collections.abc import Callable

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
from paddle_dit.training.drawn_figures import DrawnFigures, OpenJudge, find_judge
from paddle_dit.training.duties import Duties, Stopped
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
from paddle_dit.training.saving import open_run, save
from paddle_dit.training.signals import STOPPED, StopSignals
from paddle_dit.training.step import TrainingStep
from paddle_dit.training.throughput import Throughput
from paddle_dit.training.window import LossWindow


def start_session(plan: Plan, open_judge: OpenJudge | None = None) -> "Session":
    """Join the other ranks and build or continue the run.

    Args:
        plan: of the run.
        open_judge: opens what evaluates drawn images, for a recipe with ``eval_every``.

    Raises:
        ConfigError: the recipe needs a GPU and there is none.
        CheckpointError: the run cannot be continued.
        PaddleDiTError: images could not be drawn, or not be evaluated.
    """
    recipe = plan.recipe
    if recipe.sharding != "none" and not has_gpu():
        raise ConfigError(f"--sharding {recipe.sharding} needs GPUs; leave it out on the CPU")
    Precision.of(recipe).check_device()
    if recipe.deterministic:
        be_deterministic()
    judge = find_judge(recipe, open_judge, os.environ.get("PADDLE_TRAINER_ID", "0") == "0")
    ranks = Ranks.join(recipe.tensor_parallel_degree)
    # Before the session, whose seed then makes up for what a network draws for its initial weights.
    return Session(plan, ranks, DrawnFigures(plan, ranks, judge) if recipe.eval_every else None)


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


class Session:
    """Model, optimizer, averaged weights, data and reports of one run, from its newest checkpoint on.

    :meth:`run` opens it, calls a loop and leaves it. In the loop, :meth:`backward` and :meth:`update` make one step,
    and the other methods, and those of :attr:`duties`, may be called between two steps, on all ranks alike.

    Attributes:
        duties: what is done between two steps besides saving.
        updates: steps made so far.
        skipped: those of them that were left out because a loss was not finite.
        stopping: whether a signal to any rank asks the run to stop; settled at the end of each step.
        saved: step of the run's newest checkpoint, 0 before the first.
    """

    def __init__(self, plan: Plan, ranks: Ranks, figures: DrawnFigures | None = None):
        self.plan, self.recipe, self.ranks = plan, plan.recipe, ranks
        recipe, config = plan.recipe, plan.info.config
        paddle.seed(recipe.global_seed)
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
            GaussianDiffusion(),
            build_optimizer(recipe, self.model),
            self.ema,
            self.parallel,
            recipe.global_seed,
            recipe.accumulation,
            precision=Precision.of(recipe),
        )
        self.updates = self.skipped = 0
        self.stopping, self.saved = False, 0
        self.window, self.background = LossWindow(ranks), Background()
        self.throughput = Throughput(config, recipe.global_batch_size, ranks.world_size, recipe.train_only)
        self.encoder = None
        if plan.images is not None:
            with ranks.together():  # each loads the VAE for itself
                loaded = figures.vae if figures else None
                self.encoder = Encoder(plan.info, recipe.global_seed, self.step.precision, self.say, loaded)
        self.duties, self._windows = Duties(self, figures), 0
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
    def asked_to_stop(self) -> bool:
        """Whether a signal has come to this rank; the others learn of it by :meth:`look_around`."""
        return self._signals.received is not None

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
            if self.finished and not self.duties.undone:
                total = self.plan.total_steps
                self.say(f"already at step {self.updates:,} of {total:,}: nothing to do; raise --max-steps to go on")
                return
            self._enter(opened)
            self.look_around()
            self.duties.catch_up()
            if not self.finished and not self.stopping:
                loop(self)
            stopped = self.stopping and not (self.finished and not self.duties.undone)
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
        self.duties.enter()
        self.throughput.restart()

    def latents_of(self, source: LatentSource) -> LatentSource:
        """Return a source as latents, of moments and images the same each time."""
        if source.kind == "moments":
            return DrawnLatents(source, self.recipe.global_seed)
        return source if self.encoder is None else self.encoder.fixed(source)

    def look_around(self) -> None:
        """Learn, on all ranks alike, of signals and of a save in the background that has failed."""
        received, failed = self.ranks.any(self.asked_to_stop, self.background.has_failed)
        if failed:
            self.ranks.wait_for_main(self.background.waiting())
        self.stopping = received

    def go_on(self) -> None:
        """Learn of signals; raise :class:`~paddle_dit.training.duties.Stopped` if the run is to stop."""
        self.look_around()
        if self.stopping:
            raise Stopped

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
        self.look_around()

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

    def predict(self, x, timesteps, class_labels):
        """Run the model, which takes a while on all ranks alike, unless the run is to stop."""
        self.go_on()
        return self.step.predict(x, timesteps, class_labels)

    def save(self) -> None:
        """Save a checkpoint; when every rank returns it is whole, or with ``--async-save`` on its way."""
        with self.throughput.paused():
            save(self)
