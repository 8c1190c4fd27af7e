"""What says, while a model trains, how good the images are that it draws: the suite, on one rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from paddle_dit.errors import PaddleDiTError
from paddle_dit.evaluation.job import load_features, open_named
from paddle_dit.evaluation.measuring import Measuring
from paddle_dit.evaluation.suite import check, check_sizes, compare, measure, too_few
from paddle_dit.training.drawn_figures import Judgement
from paddle_dit.training.recipe import TrainRecipe

_NAME = "this run"
_NEIGHBOURS = 10_000  # images of a side in precision and recall, whose cost each evaluation has to bear
_FLAGS = {  # of scripts/evaluate.py -> of training
    "--features": "--eval-features",
    "with --crop SIZE": "with scripts/evaluate.py --crop SIZE --save-stats FILE.npz, and give that file",
    "anew with --save-stats": "anew with scripts/evaluate.py --save-stats",
}


class TrainingJudge:
    """The suite with a run's reference; a :class:`~paddle_dit.training.drawn_figures.Judge`.

    Attributes:
        about: what the images are compared with, and by which features.

    Args:
        recipe: of the run.

    Raises:
        PaddleDiTError: the reference or the network's weights are missing, damaged, or do not fit each other.
    """

    def __init__(self, recipe: TrainRecipe):
        self._count = recipe.eval_samples
        with _flags_of_training():
            self._opened = open_named(recipe.eval_reference, recipe.eval_features)
            self._features = load_features(recipe.eval_features, recipe.inception)
            check(self._opened, self._features)

    def load(self, shape: tuple[int, int, int], still_here: Callable[[], object]) -> list[str]:
        """Compute what the reference comes to, and return warnings.

        Raises:
            PaddleDiTError: images of this shape cannot be compared with it, or it is damaged.
        """
        with _flags_of_training():
            self._features.check(shape, _NAME)
            check_sizes(_NAME, shape, self._opened, self._features)
            self._reference = measure(
                self._opened, self._features, neighbours=_NEIGHBOURS, score=False, report=lambda count: still_here()
            )
        found, network = self._reference.statistics, self._features.about
        count = found.about.get("count")
        reference = f"{self._opened.name} ({f'{count:,}' if count else 'an unknown number of'} images)"
        self.about = f"beside {reference}; features: {network['name']}, weights {network['weights'][:12]}"
        return [*too_few(self._count, self._features), *too_few(count, self._features, "images of the reference")]

    def begin(self) -> None:
        """Forget all images."""
        self._measuring = Measuring(_NAME, self._count, self._features, _NEIGHBOURS)

    def add(self, images: np.ndarray) -> None:
        """Take the next images, uint8 ``[N, H, W, 3]``."""
        for start in range(0, len(images), self._features.batch_size):
            self._measuring.add(images[start : start + self._features.batch_size])

    def finish(self, still_here: Callable[[], object]) -> Judgement:
        """Return the figures of all images since :meth:`begin`."""
        found = compare(self._measuring.result("drawn"), self._reference, self._features, still_here)
        told = ", ".join(f"{figure.name} {figure.value:.3f}" for figure in found.figures.values())
        return Judgement(found.values(), told, found.warnings)


@contextmanager
def _flags_of_training() -> Iterator[None]:
    """Let errors within the block name the flags of the training scripts."""
    try:
        yield
    except PaddleDiTError as error:
        text = str(error)
        for theirs, ours in _FLAGS.items():
            text = text.replace(theirs, ours)
        raise type(error)(text) from error
