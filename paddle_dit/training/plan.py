"""From a recipe to a plan: open the data, settle the model's shape and classes, count steps, without Paddle."""

import dataclasses
import json
import os
from dataclasses import dataclass

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.data.order import SampleOrder
from paddle_dit.data.source import LatentSource, image_size_of, open_source
from paddle_dit.errors import ConfigError, DataError
from paddle_dit.files import check_writable
from paddle_dit.training.recipe import TrainRecipe

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Plan:
    """A checked recipe with its data opened.

    Attributes:
        recipe: what was asked for.
        source: the latents.
        order: which samples each step takes.
        info: the model to build, with the names and the VAE that belong to it.
        total_steps: updates of the whole run.
    """

    recipe: TrainRecipe
    source: LatentSource
    order: SampleOrder
    info: ModelInfo
    total_steps: int

    @property
    def identity(self) -> dict:
        """What a run must keep when it is continued: another value would make it another experiment."""
        values = {
            "model": self.info.config.to_dict(),
            "data": self.source.fingerprint,
            "global_batch_size": self.recipe.global_batch_size,
            "global_seed": self.recipe.global_seed,
        }
        return json.loads(json.dumps(values))  # as a checkpoint gives it back

    def describe(self) -> str:
        """Return the resolved recipe and its costs, for ``--dry-run``."""
        config = self.info.config
        rows = {
            **{key: value for key, value in self.recipe.to_dict().items() if key not in ("config", "dry_run")},
            "latents": f"{len(self.source):,} x {list(self.source.sample_shape)}",
            **{name: value for name, value in config.to_dict().items() if name != "in_channels"},
            "parameters": f"{config.num_parameters():,}",
            "multiply-adds per forward": f"{config.multiply_adds() / 1e9:.4g} G per sample",
            "training cost": f"{6 * config.multiply_adds() / 1e9:.4g} GFLOP per sample",
            "steps per epoch": f"{self.order.steps_per_epoch:,}",
            "total steps": f"{self.total_steps:,}",
        }
        width = max(map(len, rows))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


def make_plan(recipe: TrainRecipe) -> Plan:
    """Check a recipe against its data and the number of ranks.

    Raises:
        ConfigError, DataError: anything that would stop the run later; nothing has been written.
    """
    recipe.check()
    recipe.share_of_batch(int(os.environ.get("PADDLE_TRAINERS_NUM", "1")))
    check_writable(recipe.output_dir, "--output-dir")
    source, config = _open_and_fit(recipe)
    order = SampleOrder(len(source), recipe.global_batch_size, recipe.global_seed)
    info = ModelInfo(config, source.label_names if config.num_classes else None, source.vae)
    return Plan(recipe, source, order, info, recipe.total_steps(order.steps_per_epoch))


def _open_and_fit(recipe: TrainRecipe) -> tuple[LatentSource, DiTConfig]:
    """Open the data and return it with the architecture: a preset takes the data's shape, a JSON model must match."""
    config = recipe.base_config()
    asked = recipe.num_classes
    if asked is None and not recipe.is_preset:
        asked = config.num_classes
    shape = None if recipe.is_preset else config.sample_shape
    source = open_source(recipe.feature_path, num_classes=asked or None, sample_shape=shape)
    if source.kind != "latents":
        raise DataError(
            f"{recipe.feature_path} holds {source.kind}; training takes latents: make the store with latents"
        )
    _check_image_size(recipe, source)
    if asked is None:
        if source.num_classes is None:  # npy pairs do not say; from now on they refuse labels beyond
            source.num_classes = IMAGENET_CLASSES
        asked = source.num_classes
    channels, height, width = source.sample_shape
    size = height if height == width else (height, width)
    return source, dataclasses.replace(config, in_channels=channels, sample_size=size, num_classes=asked)


def _check_image_size(recipe: TrainRecipe, source: LatentSource) -> None:
    size = image_size_of(source)
    if recipe.image_size is not None and recipe.image_size != size:
        raise ConfigError(
            f"--image-size {recipe.image_size} but the latents in {recipe.feature_path} are"
            f" {list(source.sample_shape)}, of {size}-pixel images; use --image-size {size} or other latents"
        )
