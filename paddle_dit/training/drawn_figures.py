"""Evaluation while training: images that the averaged weights draw, shared among the ranks, and the figures of them.

Who computes the figures is in a room above this one, and is handed in as a :class:`Judge`. The images are those that
``scripts/sample_ddp.py`` draws of the same weights with the same settings: image i depends on (seed, i) alone.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import paddle

from paddle_dit.diffusion.options import SamplingOptions, can_guide
from paddle_dit.errors import ConfigError, DataError, PaddleDiTError
from paddle_dit.generation import Predictor, generate_latents, image_bar
from paddle_dit.half_precision import GuardedPrecision
from paddle_dit.models.vae import decode, factor_of
from paddle_dit.sampling.many import labels_of
from paddle_dit.training.encoding import load_vae_of
from paddle_dit.training.plan import Plan
from paddle_dit.training.ranks import Ranks
from paddle_dit.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from paddle_dit.training.session import Session

_SEED = 0  # of every run: two runs' figures then differ by their weights alone
_BATCH = 32  # images that a rank draws together, and that the judge is given at once


@dataclass(frozen=True)
class Judgement:
    """What is said of drawn images.

    Attributes:
        figures: by their names in the log: ``fid``, ``inception_score``, ...
        told: the figures with their names, in a line.
        warnings: a line each.
    """

    figures: dict[str, float]
    told: str
    warnings: list[str]


class Judge(Protocol):
    """Compares images with real ones; it is made on the main rank alone, by :data:`OpenJudge`.

    ``still_here`` must be called every few seconds, as other ranks wait meanwhile; it may raise, to end the work.

    Attributes:
        about: says in words what the images are compared with, and how; known after :meth:`load`.
    """

    about: str

    def load(self, shape: tuple[int, int, int], still_here: Callable[[], object]) -> list[str]:
        """Get ready for images of a shape ``(H, W, 3)``; return warnings, a line each.

        Raises:
            PaddleDiTError: it cannot.
        """

    def begin(self) -> None:
        """Forget all images."""

    def add(self, images: np.ndarray) -> None:
        """Take the next images, uint8 ``[N, H, W, 3]``."""

    def finish(self, still_here: Callable[[], object]) -> Judgement:
        """Return what all images since :meth:`begin` came to; PaddleDiTError where that cannot be said."""


OpenJudge = Callable[[TrainRecipe], Judge]  # raises PaddleDiTError for what can be known to be wrong at once


class CannotEvaluateError(Exception):
    """An evaluation failed, on all ranks alike; the training can go on. The message says why."""


class _GaveUp(Exception):
    """Leaves the judge because a signal asks the run to stop."""


def find_judge(recipe: TrainRecipe, open_judge: OpenJudge | None, is_main: bool) -> Judge | None:
    """Return the judge on the main rank, if one is needed; before the ranks meet, so that a download may take a while.

    Raises:
        PaddleDiTError: there is none, or something it needs is missing.
    """
    if not recipe.eval_every:
        return None
    if open_judge is None:
        raise ConfigError("--eval-every needs someone who evaluates: start_session(plan, open_judge)")
    return open_judge(recipe) if is_main else None


class DrawnFigures:
    """Draws the images, and has them judged.

    Args:
        plan: of a run with ``--eval-every``.
        ranks: who draws; all must make one, and call its methods together.
        judge: on the main rank.

    Attributes:
        vae: decodes the images.

    Raises:
        PaddleDiTError: the model cannot be guided, there is no VAE that fits, or the judge cannot get ready.
    """

    def __init__(self, plan: Plan, ranks: Ranks, judge: Judge | None):
        recipe, self._config = plan.recipe, plan.info.config
        self._ranks, self._judge, self._shows_bar = ranks, judge, recipe.progress_bar
        self._options = _sampling_options(recipe, self._config)
        self._labels = labels_of(recipe.eval_samples, self._config, "uniform", _SEED)
        self._precision = GuardedPrecision(recipe.precision, "this VAE")
        with ranks.together():
            self.vae = load_vae_of(plan.info, recipe.vae_name_or_path)
        self._told: set[str] = set()
        self._warnings: list[str] = []
        height, width = (side * factor_of(self.vae) for side in self._config.height_width)
        ranks.let_main(lambda still_here: self._warnings.extend(judge.load((height, width, 3), still_here)))

    @property
    def about(self) -> str:
        """What is drawn and how, and, on the main rank, what with and how it is compared, in words."""
        options = self._options
        steps = f"{options.sampler}, {options.num_inference_steps} steps, guidance {options.guidance_scale:g}"
        drawn = f"{len(self._labels):,} images by the averaged weights, {steps}, seed {_SEED}"
        return f"{drawn}, {self._judge.about}" if self._judge else drawn

    def introduce(self, every: int) -> list[str]:
        """Return lines that say what will be done, and how far it can be trusted."""
        warnings = (f"warning: {line}" for line in self._new(self._warnings))
        return [f"evaluation every {every:,} steps: {self.about}", *warnings]

    def measure(self, session: "Session") -> Judgement | None:
        """Draw and judge with the weights that the session's model carries; every rank must call it.

        Returns:
            the judgement on the main rank, with the warnings that were not there before; None on the others.

        Raises:
            CannotEvaluateError: on all ranks.
            Whatever :meth:`Session.go_on` raises.
        """
        started, count = time.perf_counter(), len(self._labels)
        with self._for_all():
            if self._judge:
                self._judge.begin()
        with image_bar(count, shown=self._shows_bar and self._ranks.is_main, leave=False) as bar:
            done = 0
            while done < count:
                images = self._draw_some(session, done, bar.update)
                done += len(images)
                bar.update(done - bar.n)  # which its parts miss by their rounding
                self._hand_over(session, images)
        found = self._finish(session)
        if found is None:
            return None
        told = f"{found.told}; of {self.about}; {time.perf_counter() - started:,.1f} s"
        return Judgement(found.figures, told, self._new(found.warnings))

    def _new(self, lines: list[str]) -> list[str]:
        """Return the lines that this was not given before."""
        new = [line for line in lines if line not in self._told]
        self._told.update(new)
        return new

    def _draw_some(self, session: "Session", done: int, advance: Callable[[float], object]) -> np.ndarray:
        """Return the next images in order, uint8 ``[n, H, W, 3]``, on every rank; each draws an equal share.

        Where images run out the last is drawn again: a model that is spread over ranks runs on all or on none.
        """
        ranks, left = self._ranks, len(self._labels) - done
        size = min(_BATCH, -(-left // ranks.data_ranks))
        own = np.minimum(done + ranks.data_rank * size + np.arange(size), len(self._labels) - 1)
        latents = generate_latents(
            Predictor(self._config, self._predictions(session)),
            self._labels[own],
            self._options,
            indices=own,
            batch_size=size,
            report=lambda amount: advance(min(amount * ranks.data_ranks, amount * left / size)),
        )
        images = np.stack(
            [part.numpy() for part in ranks.gather(paddle.to_tensor(self._decode_share(session, latents)))]
        )
        # The ranks of a model have decoded in turn: (data rank, image, rank within the model) is the order wanted.
        shares = images.reshape(ranks.data_ranks, ranks.model_degree, *images.shape[1:]).swapaxes(1, 2)
        in_turn = shares.reshape(ranks.data_ranks, -1, *images.shape[2:])[:, :size]
        return in_turn.reshape(-1, *images.shape[2:])[:left]

    def _predictions(self, session: "Session") -> Callable:
        # Where the model itself waits for other ranks, no one can tell them of an error: it ends the process.
        alone = not session.parallel.backward_is_collective

        def predict(*inputs):
            session.go_on()
            with self._for_all() if alone else nullcontext():
                return session.step.predict(*inputs)

        return predict

    def _decode_share(self, session: "Session", latents: np.ndarray) -> np.ndarray:
        """Decode what falls to this rank of latents that the ranks of its model have in common, one by one."""
        degree, images = self._ranks.model_degree, []
        for start in range(0, len(latents), degree):
            session.go_on()
            with self._for_all():
                place = min(start + self._ranks.rank % degree, len(latents) - 1)
                images.append(decode(self.vae, latents[[place]], precision=self._precision))
        return np.concatenate(images)

    def _hand_over(self, session: "Session", images: np.ndarray) -> None:
        for start in range(0, len(images), _BATCH):
            session.go_on()
            with self._for_all():
                if self._judge:
                    self._judge.add(images[start : start + _BATCH])

    def _finish(self, session: "Session") -> Judgement | None:
        found: list[Judgement | None] = []

        def finish(still_here: Callable[[], bool]) -> None:
            def go_on() -> None:
                if still_here():
                    raise _GaveUp

            try:
                with _mendable():
                    found.append(self._judge.finish(go_on))
            except _GaveUp:
                found.append(None)

        with _survivable():
            self._ranks.let_main(finish, lambda: session.asked_to_stop)
        if self._ranks.from_main(int(found == [None])):
            session.go_on()
        return found[0] if found else None

    @contextmanager
    def _for_all(self) -> Iterator[None]:
        """Let an error of one rank end the evaluation on all of them, and the training on none."""
        with _survivable(), self._ranks.together(), _mendable():
            yield


def _sampling_options(recipe: TrainRecipe, config) -> SamplingOptions:
    if recipe.eval_guidance_scale > 1 and not can_guide(config):
        raise ConfigError("this model has no classes or no null class to be guided by; use --eval-guidance-scale 1")
    return SamplingOptions(
        recipe.eval_sampler,
        recipe.eval_inference_steps,
        recipe.eval_guidance_scale,
        guidance_channels=min(3, config.in_channels),
        seed=_SEED,
    )


@contextmanager
def _mendable() -> Iterator[None]:
    """Name what a full disk or memory raises as what other ranks can be told."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    except MemoryError as error:
        raise DataError(f"out of memory: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def _survivable() -> Iterator[None]:
    try:
        yield
    except PaddleDiTError as error:
        raise CannotEvaluateError(str(error)) from error
