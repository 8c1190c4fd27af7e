"""``--init-from``: another model's weights as a run's beginning, refitted to the run's classes, patches and outputs."""

import contextlib
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from paddle_dit.checkpoint import INFO, checkpoint_folders, read_info
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.loading import known_names, read_weights
from paddle_dit.errors import CheckpointError, ConfigError, PaddleDiTError
from paddle_dit.models.refit import (
    Tensors,
    fresh_labels,
    match_classes,
    relabelled,
    resample_patches,
    with_variance,
    without_variance,
)
from paddle_dit.randomness import Stream, generator
from paddle_dit.training.recipe import TrainRecipe

# What no refitting can change, and of the loaded model's configuration what a preset does not decide.
_ARCHITECTURE = ("depth", "hidden_size", "num_heads", "mlp_ratio", "frequency_shift", "norm_eps")
_CARRIED = ("mlp_ratio", "frequency_shift", "norm_eps", "num_classes")


@dataclass
class InitialWeights:
    """What a run begins with.

    Attributes:
        name: as the user named it.
        info: the configuration and class names of the loaded model; of a run that is continued, its own.
        tensors: its weights, as read and then as refitted; None where a run is continued, which reads nothing.
        notes: what the refitting did, a line each.
    """

    name: str
    info: ModelInfo
    tensors: Tensors | None
    notes: list[str] = field(default_factory=list)

    def base_config(self, recipe: TrainRecipe) -> DiTConfig:
        """Return the architecture of the run, before the data's shape and classes are known: the loaded model's.

        The frequencies' shift, the MLP's ratio and the norms' epsilon are the loaded model's in any case.

        Raises:
            ConfigError: ``--model`` names another architecture, or another patch size without ``--resize-patch``.
        """
        found = self.info.config
        if recipe.model is None:
            return replace(found, learn_sigma=recipe.learn_sigma, class_dropout_prob=recipe.class_dropout_prob)
        asked = recipe.base_config()
        if recipe.is_preset:
            asked = replace(asked, **{name: getattr(found, name) for name in _CARRIED})
        if self.tensors is not None:
            self._check_architecture(asked, recipe)
        return asked

    def _check_architecture(self, asked: DiTConfig, recipe: TrainRecipe) -> None:
        found = self.info.config
        for name in _ARCHITECTURE:
            if getattr(asked, name) != getattr(found, name):
                raise ConfigError(
                    f"--model {recipe.model} has {name} {getattr(asked, name)}, the weights of --init-from {self.name} "
                    f"have {getattr(found, name)}; leave --model out, which takes theirs, or give other weights"
                )
        if asked.patch_size != found.patch_size and not recipe.resize_patch:
            raise ConfigError(
                f"--model {recipe.model} has patch size {asked.patch_size}, the weights of --init-from {self.name} have"
                f" {found.patch_size}; leave --model out, or let --resize-patch resample the projections"
            )

    def fit(self, info: ModelInfo, recipe: TrainRecipe) -> None:
        """Refit the weights to the run's model, and note what that did.

        Raises:
            ConfigError: the data's latents have other channels.
        """
        if self.tensors is None:
            return
        old, new = self.info.config, info.config
        if new.in_channels != old.in_channels:
            raise ConfigError(
                f"the latents have {new.in_channels} channels, the weights of --init-from {self.name} take "
                f"{old.in_channels}; give latents of their VAE, or other weights"
            )
        self.notes = [f"starting from {self.name}"]
        if new.height_width != old.height_width:
            sizes = ["x".join(map(str, config.height_width)) for config in (old, new)]
            self.notes.append(f"latents {sizes[0]} -> {sizes[1]}: the position table is computed anew")
        self._fit_outputs(old, new)
        self._fit_labels(info, recipe)

    def _fit_outputs(self, old: DiTConfig, new: DiTConfig) -> None:
        if new.patch_size != old.patch_size:
            self.tensors = resample_patches(self.tensors, old, new.patch_size)
            self.notes.append(f"patch size {old.patch_size} -> {new.patch_size}: the projections are resampled")
            old = replace(old, patch_size=new.patch_size, sample_size=new.sample_size)
        if new.learn_sigma and not old.learn_sigma:
            self.tensors = with_variance(self.tensors, old)
            self.notes.append("outputs for the variance are added, zero at first")
        elif old.learn_sigma and not new.learn_sigma:
            self.tensors = without_variance(self.tensors, old)
            self.notes.append("the outputs for the variance are left out")

    def _fit_labels(self, info: ModelInfo, recipe: TrainRecipe) -> None:
        old, new = self.info.config, info.config
        kept, how = _kept_classes(self.info, info)
        self.tensors = relabelled(self.tensors, old, new, {} if recipe.reset_labels else kept)
        if recipe.reset_labels:
            random = generator(recipe.global_seed, Stream.LABELS, 0, 0)
            self.tensors = fresh_labels(self.tensors, new, random)
            self.notes.append(f"label table: all {new.num_classes} rows drawn afresh")
        elif new.num_classes:
            rest = new.num_classes - len(kept)
            null = "the null row" if old.has_null_class else "the mean of the rows, as there is no null row"
            others = f", {rest} start from {null}" if rest else ""
            self.notes.append(f"label table: {len(kept)} of {new.num_classes} rows kept{how}{others}")

    def take(self) -> Tensors:
        """Return the refitted weights, float32, and forget them: they are needed once.

        Raises:
            CheckpointError: there are none, because the run that was to be continued has vanished meanwhile.
        """
        if self.tensors is None:
            raise CheckpointError("the run that was to be continued is gone; give the same command again to start anew")
        tensors, self.tensors = self.tensors, None
        return {name: np.asarray(array, np.float32) for name, array in tensors.items()}


def fingerprint_of(tensors: Tensors) -> int:
    """Return a checksum of arrays and their names, below 2**32, that tells other weights from the same."""
    checksum = 0
    for name, array in sorted(tensors.items()):
        checksum = zlib.crc32(np.ascontiguousarray(array), zlib.crc32(name.encode(), checksum))
    return checksum


def find_initial(recipe: TrainRecipe) -> InitialWeights | None:
    """Return what ``--init-from`` names, or None where it names nothing.

    A run that is continued has its weights, and only its configuration is read: that of ``--init-from`` is not needed
    any more, and may be gone.

    Raises:
        CheckpointError, ConversionError: there is no such model, it is damaged, or it is no DiT.
    """
    if recipe.init_from is None:
        return None
    former = _former_run(recipe)
    if former is not None:
        return InitialWeights(recipe.init_from, former, None)
    try:
        tensors, info = read_weights(recipe.init_from, recipe.init_weights)
    except PaddleDiTError as error:
        told = str(error).replace("--weights", "--init-weights")
        raise type(error)(f"--init-from: {told}") from None
    return InitialWeights(recipe.init_from, info, tensors)


def _former_run(recipe: TrainRecipe) -> ModelInfo | None:
    """Return what is known of the model of the run that is to be continued, if one is; its weights decide later."""
    if not recipe.resume:
        return None
    named = recipe.resume_from_checkpoint
    for folder in [*checkpoint_folders(recipe.output_dir), *([named] if named else [])]:
        with contextlib.suppress(CheckpointError):  # which the run will name, when it looks for the newest whole one
            return read_info(Path(folder) / INFO)
    return None


def _kept_classes(old: ModelInfo, new: ModelInfo) -> tuple[dict[int, int], str]:
    """Return new class -> old class, and by what they were matched, for a message."""
    theirs, ours = (_names(info) for info in (old, new))
    if theirs and ours:
        return match_classes(ours, theirs), " by name"
    classes = new.config.num_classes
    if classes == old.config.num_classes:
        return {label: label for label in range(classes)}, " by id"
    if not old.config.num_classes:
        return {}, ""
    without = "the data" if theirs else f"{'these weights' if ours else 'weights and data'}"
    return {}, f" ({old.config.num_classes} classes before, and no class names in {without} to match them by)"


def _names(info: ModelInfo) -> dict[int, str] | None:
    """Return the known names of the classes that there are; some pipelines name more."""
    names = known_names(info) or {}
    return {label: name for label, name in names.items() if label < info.config.num_classes} or None
