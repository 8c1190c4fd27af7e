"""What a run does between two steps besides saving: losses on held-out samples, previews, figures of drawn images."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from paddle_dit.training.drawn_figures import CannotEvaluateError, DrawnFigures
from paddle_dit.training.sampling_preview import PreviewOptions, SamplingPreview, evaluating
from paddle_dit.training.validation import Validation

if TYPE_CHECKING:
    from paddle_dit.training.session import Session


class Stopped(Exception):
    """Leaves a duty because a signal asks the run to stop."""


class Duties:
    """Each may be called between two steps, on all ranks alike, and leaves the training as it was.

    Args:
        session: whose weights they look at.
        figures: of drawn images, or None.

    Attributes:
        undone: what is still to be done after the last step, because a signal came, or because it comes after the
            save: "evaluate", "draw", "measure".
    """

    def __init__(self, session: "Session", figures: DrawnFigures | None):
        self._session, self.figures, self.undone = session, figures, []
        self._validation = self._preview = None
        self._drawn = False
        plan = session.plan
        if plan.validation is not None:
            held_out = session.latents_of(plan.validation)
            seed = plan.recipe.global_seed
            self._validation = Validation(held_out, plan.info.config, session.step.objective, seed, session.ranks)

    def enter(self) -> None:
        """Get ready for pictures, once the session's reports are open."""
        session, recipe = self._session, self._session.recipe
        if recipe.image_logging_steps > 0:
            options = PreviewOptions(
                recipe.num_inference_steps,
                recipe.guidance_scales,
                vae=recipe.vae_name_or_path,
                precision=recipe.precision,
            )
            loaded = session.encoder or self.figures
            self._preview = SamplingPreview(
                session.plan.info,
                options,
                session.ranks,
                recipe.output_dir,
                session.monitor.add_image,
                lambda: session.asked_to_stop,
                loaded.vae if loaded else None,
            )
        if self.figures:
            for line in self.figures.introduce(recipe.eval_every):
                session.say(line)

    def catch_up(self) -> None:
        """Do what is still to be done, unless the run is to stop."""
        if self._session.stopping:
            return
        duties, self.undone = self.undone, []
        if "evaluate" in duties and self._validation:
            self.evaluate()
        if "draw" in duties and self._preview:
            self.draw()
        if "measure" in duties and self.figures:
            self.measure()

    def evaluate(self) -> dict[str, float]:
        """Record and return the losses on held-out samples, of the weights and of their average."""
        session, losses = self._session, {}
        with self._unless_stopped("evaluate"):
            losses = self._validation.losses(session.predict)
            with session.ema.applied(session.parallel):
                averaged = self._validation.losses(session.predict)
            losses |= {f"{name}_ema": value for name, value in averaged.items()}
            session.monitor.record(session.updates, losses, group="eval")
        return losses

    def draw(self) -> None:
        """Draw the preview images with the averaged weights; the first time, also decode some training latents."""
        session = self._session
        with self._unless_stopped("draw"):
            with session.ema.applied(session.parallel):
                made = self._preview.draw(session.model, session.updates, session.predict)
            if made and not self._drawn:
                source = session.plan.source
                with session.ranks.together():
                    latents = session.latents_of(source).gather(np.arange(min(8, len(source))))
                made = self._drawn = self._preview.reconstruct(*latents)
            if not made:
                raise Stopped

    def measure(self) -> None:
        """Record the figures of images that the averaged weights draw; what fails costs the figures alone."""
        session, step = self._session, self._session.updates
        with self._unless_stopped("measure"):
            try:
                with session.ema.applied(session.parallel), evaluating(session.model):
                    found = self.figures.measure(session)
            except CannotEvaluateError as error:
                session.say(f"warning: no figures after step {step:,}, the training goes on: {error}")
                return
            if found is not None:
                session.monitor.record(step, found.figures, group="eval")
                for line in (f"step {step:,}: {found.told}", *(f"warning: {line}" for line in found.warnings)):
                    session.say(line)

    @contextlib.contextmanager
    def _unless_stopped(self, duty: str) -> Iterator[None]:
        """Leave the block when a signal comes; the next run does it again."""
        try:
            with self._session.throughput.paused():
                yield
        except Stopped:  # on all ranks alike
            self.undone.append(duty)
            self._session.look_around()
