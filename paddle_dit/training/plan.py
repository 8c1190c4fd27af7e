"""From a recipe to a plan: open the data, settle the model's shape and classes, count steps, without Paddle."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.data.image_source import ImageOptions
from paddle_dit.data.image_workers import Decoders
from paddle_dit.data.mixture import ClassSubset, name_samples, open_sources
from paddle_dit.data.moments import check_moments
from paddle_dit.data.order import SampleOrder
from paddle_dit.data.source import LatentSource, image_size_of, latent_shape_of, open_source
from paddle_dit.data.subset import Subset, hold_out, spread
from paddle_dit.errors import ConfigError, DataError
from paddle_dit.files import check_writable
from paddle_dit.models.refit import parameter_shapes
from paddle_dit.models.vae import find_vae
from paddle_dit.training.frozen import trained_names
from paddle_dit.training.initial_weights import InitialWeights, find_initial
from paddle_dit.training.recipe import TrainRecipe

IMAGENET_CLASSES = 1000
_PAPERS_IMAGE_SIZE = 256


@dataclass(frozen=True)
class Plan:
    """A checked recipe with its data opened.

    Attributes:
        recipe: what was asked for.
        source: the latents, the moments that they are drawn from, or the images to be encoded.
        order: which samples each step takes.
        info: the model to build, with the names and the VAE that belong to it.
        total_steps: updates of the whole run.
        ranks: processes that it runs on, or is planned for.
        validation: held-out samples, or None.
        images: how images are taken, or None where the sources hold latents or moments.
        initial: what ``--init-from`` names, refitted, or None.
    """

    recipe: TrainRecipe
    source: LatentSource
    order: SampleOrder
    info: ModelInfo
    total_steps: int
    ranks: int = 1
    validation: LatentSource | None = None
    images: ImageOptions | None = None
    initial: InitialWeights | None = None

    @property
    def identity(self) -> dict:
        """What a run must keep when it is continued: another value would make it another experiment."""
        held_out = isinstance(self.source, Subset) and not isinstance(self.source, ClassSubset)
        whole = self.source.whole if held_out else self.source
        values = {
            "model": self.info.config.to_dict(),
            "data": whole.fingerprint,
            "global_batch_size": self.recipe.global_batch_size,
            "global_seed": self.recipe.global_seed,
        }
        if self.images is not None:  # a folder's fingerprint does not say what becomes of its images
            values["images"] = {"image_size": self.images.image_size, "vae": self.images.vae.fingerprint}
        if whole.kind == "moments":  # files of latents have it in their values
            values["scaling_factor"] = whole.vae["scaling_factor"]
        if held_out:  # by --eval-steps; --eval-path leaves the training data as they are
            values["held_out_samples"] = self.recipe.held_out_samples
        if self.recipe.train_only:
            values["train_only"] = self.recipe.train_only
        return json.loads(json.dumps(values))  # as a checkpoint gives it back

    def sample_names(self, indices: np.ndarray) -> str:
        """Return the numbers in their folder, or the files, of the first few samples of ``source[indices]``."""
        return name_samples(self.source, indices)


def make_plan(recipe: TrainRecipe) -> Plan:
    """Check a recipe against its data and the number of ranks.

    A dry run needs no data: where the folder is missing, ImageNet's latents are assumed.

    Raises:
        ConfigError, DataError: anything that would stop the run later; nothing has been written.
    """
    recipe.check()
    launched = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
    ranks = (recipe.cards if recipe.dry_run else None) or launched
    recipe.share_of_batch(ranks)
    if not recipe.dry_run:
        check_writable(recipe.output_dir, "--output-dir")
    initial = find_initial(recipe)
    base = initial.base_config(recipe) if initial else recipe.base_config()
    images = _image_options(recipe, base)
    source, config = _open_and_fit(recipe, base, images)
    trained_names(parameter_shapes(config), recipe.train_only)
    source, validation = _hold_out(recipe, source, images)
    order = SampleOrder(len(source), recipe.global_batch_size, recipe.global_seed)
    info = ModelInfo(config, source.label_names if config.num_classes else None, source.vae)
    if initial:
        initial.fit(info, recipe)
    steps = recipe.total_steps(order.steps_per_epoch)
    return Plan(recipe, source, order, info, steps, ranks, validation, images, initial)


def _image_options(recipe: TrainRecipe, config: DiTConfig) -> ImageOptions | None:
    """Return how the run takes images, if it does; None also where a dry run has none."""
    if recipe.data_path is None or _is_assumed(recipe):
        return None
    image_size = _PAPERS_IMAGE_SIZE if recipe.image_size is None else recipe.image_size
    main = os.environ.get("PADDLE_TRAINER_ID", "0") == "0"
    options = ImageOptions(
        image_size,
        find_vae(recipe.vae_name_or_path, fingerprint=not recipe.dry_run),
        Decoders(image_size, recipe.num_workers),
        print if main else lambda line: None,
    )
    options.check_size(config.patch_size)
    return options


def _is_assumed(recipe: TrainRecipe) -> bool:
    """Whether a dry run has no data, so that ImageNet's are assumed."""
    return recipe.dry_run and not any(path.exists() for path in _paths(recipe))


def _paths(recipe: TrainRecipe) -> tuple[Path, ...]:
    return recipe.feature_path if recipe.data_path is None else (recipe.data_path,)


def _open_for_training(path: Path, **expected: object) -> LatentSource:
    """Open a folder of latents, or of moments that latents can be drawn from; as ``open_source`` otherwise."""
    source = open_source(path, **expected)
    if source.kind == "moments":
        check_moments(source, path)
    return source


def _hold_out(
    recipe: TrainRecipe, source: LatentSource, images: ImageOptions | None
) -> tuple[LatentSource, LatentSource | None]:
    """Return what to train on and what to evaluate on, if anything."""
    if recipe.eval_steps < 0 or isinstance(source, ImageNetLatents):
        return source, None
    if recipe.eval_path is None:
        return hold_out(source, recipe.held_out_samples)
    other = open_sources(
        [recipe.eval_path],
        num_classes=source.num_classes,
        sample_shape=latent_shape_of(source),
        class_subset=source.classes if isinstance(source, ClassSubset) else (),
        open_one=images.open if images else _open_for_training,
    )
    return source, spread(other, recipe.held_out_samples)


class ImageNetLatents:
    """Stands for data that a dry run has not got: as many latents as ImageNet's training images."""

    kind, vae, labels, label_names, fingerprint, has_flip = "latents", None, None, None, "", False

    def __init__(self, image_size: int, num_classes: int):
        self.sample_shape, self.num_classes = (4, image_size // 8, image_size // 8), num_classes

    def __len__(self) -> int:
        """Return the number of ImageNet's training images."""
        return 1_281_167

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Refuse: there are none."""
        raise DataError("these latents are only assumed")


def _open_and_fit(
    recipe: TrainRecipe, config: DiTConfig, images: ImageOptions | None
) -> tuple[LatentSource, DiTConfig]:
    """Open the data and return it with the architecture: a preset takes the data's shape, a JSON model must match."""
    asked = recipe.num_classes
    if asked is None and not recipe.is_preset:
        asked = config.num_classes
    shape = None if recipe.is_preset else config.sample_shape
    if _is_assumed(recipe):
        classes = asked or len(recipe.class_subset) or IMAGENET_CLASSES
        source: LatentSource = ImageNetLatents(recipe.image_size or 8 * config.height_width[0], classes)
    else:
        source = open_sources(
            _paths(recipe),
            num_classes=asked or None,
            sample_shape=shape,
            class_subset=recipe.class_subset,
            open_one=images.open if images else _open_for_training,
        )
    _check_image_size(recipe, source)
    if asked is None:
        if source.num_classes is None:  # npy pairs do not say; from now on they refuse labels beyond
            source.num_classes = IMAGENET_CLASSES if recipe.init_from is None else config.num_classes
        asked = source.num_classes
    channels, height, width = latent_shape_of(source)
    _check_patches(recipe, config.patch_size, height, width)
    size = height if height == width else (height, width)
    return source, dataclasses.replace(config, in_channels=channels, sample_size=size, num_classes=asked)


def _check_image_size(recipe: TrainRecipe, source: LatentSource) -> None:
    size = image_size_of(source)
    if recipe.image_size is not None and recipe.image_size != size:
        raise ConfigError(
            f"--image-size {recipe.image_size} but the latents in {_folders(recipe)} are"
            f" {list(latent_shape_of(source))}, of {size}-pixel images; use --image-size {size} or other latents"
        )


def _check_patches(recipe: TrainRecipe, patch: int, height: int, width: int) -> None:
    if height % patch or width % patch:
        raise ConfigError(
            f"the latents in {_folders(recipe)} are {height} x {width}, which {recipe.model or recipe.init_from} cannot"
            f" cut into patches of {patch}; use a model with other patches, or latents of images of another size"
        )


def _folders(recipe: TrainRecipe) -> str:
    return ", ".join(map(str, _paths(recipe)))
