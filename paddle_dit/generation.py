"""From weights to images: the functions that scripts, previews and evaluation share.

Image ``i`` of a seed depends on ``(seed, i)`` alone: its starting noise and every later draw come from a generator of
its own, whatever the batch size and whichever other images are drawn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import paddle
from tqdm import tqdm

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.loading import class_names, load_model
from paddle_dit.data.labels import resolve_labels
from paddle_dit.diffusion.guidance import can_guide, guided
from paddle_dit.diffusion.samplers import SAMPLERS
from paddle_dit.diffusion.schedule import NUM_TRAIN_TIMESTEPS, Schedule
from paddle_dit.errors import ConfigError, nearest
from paddle_dit.models.vae import decode, fit_vae, load_vae
from paddle_dit.randomness import MAX_SEED, Stream, generator

PAPER_GUIDANCE = 4.0
PAPER_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # of ImageNet; the samples that the paper's code draws


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw. The defaults are the paper's (section 5; guidance as in its figure 1).

    Attributes:
        sampler: "ddpm" (ancestral, learned variance) or "ddim" (deterministic).
        num_inference_steps: steps of the sampler, 1 to 1000.
        guidance_scale: 1 is no guidance. None is 4 for a model that can be guided, else 1.
        guidance_channels: latent channels that are guided: 3 as the paper's code, all as ppdiffusers.
        guidance_interval: guide at timesteps ``low <= t < high`` only; None everywhere.
        seed: of every draw, 0 to 2**56 - 1.
    """

    sampler: str = "ddpm"
    num_inference_steps: int = 250
    guidance_scale: float | None = None
    guidance_channels: int = 3
    guidance_interval: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise ConfigError(f"unknown sampler '{self.sampler}'.{nearest(self.sampler, SAMPLERS)} Known: {known}")
        if not 1 <= self.num_inference_steps <= NUM_TRAIN_TIMESTEPS:
            raise ConfigError(f"num_inference_steps must be 1 to {NUM_TRAIN_TIMESTEPS}, got {self.num_inference_steps}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must be 0 to {MAX_SEED}, got {self.seed}")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale must be a finite number, got {self.guidance_scale}")
        if self.guidance_channels < 1:
            raise ConfigError(f"guidance_channels must be 1 or more, got {self.guidance_channels}")

    def for_model(self, config: DiTConfig) -> "SamplingOptions":
        """Return these options with the guidance scale that a model of this configuration is drawn with."""
        if self.guidance_scale is not None:
            return self
        return replace(self, guidance_scale=PAPER_GUIDANCE if can_guide(config) else 1.0)

    def schedule(self) -> Schedule:
        """Return the training schedule respaced to the steps asked for.

        DDIM strides evenly from timestep 0, as its paper and the reference do, where the count divides 1000.
        """
        strided = self.sampler == "ddim" and NUM_TRAIN_TIMESTEPS % self.num_inference_steps == 0
        return Schedule.linear().respaced(f"{'ddim' if strided else ''}{self.num_inference_steps}")

    def to_dict(self) -> dict:
        """Return plain values, to be kept with the images."""
        return asdict(self)


def generate_latents(
    model,
    class_labels: Sequence[int],
    options: SamplingOptions | None = None,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
    report: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Draw one latent per label.

    Args:
        model: a :class:`~paddle_dit.models.dit.DiT` in evaluation mode.
        class_labels: one label per image; ``num_classes`` draws without a class, where the model has a null class.
        options: sampler, steps, guidance and seed.
        indices: which images of the seed these are; ``0 .. N-1`` by default.
        batch_size: images drawn together.
        report: is told after each batch how many images it had.

    Returns:
        float32 ``[N, C, H, W]``, scaled as the model was trained.

    Raises:
        ConfigError: a label outside the model's classes, a batch of none, or guidance that it cannot have.
    """
    options = (options or SamplingOptions()).for_model(model.config)
    labels, last = np.asarray(class_labels, dtype=np.int64), model.config.label_rows - 1
    if labels.size and not 0 <= labels.min() <= labels.max() <= last:
        raise ConfigError(f"class labels must be 0 to {last}, got {labels.min()} to {labels.max()}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, got {batch_size}")
    indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
    batches = []
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        batches.append(_generate_batch(model, labels[part], indices[part], options))
        report(len(labels[part]))
    return np.concatenate(batches) if batches else np.zeros((0, *model.config.sample_shape), np.float32)


def _generate_batch(model, labels: np.ndarray, indices: np.ndarray, options: SamplingOptions) -> np.ndarray:
    generators = [generator(options.seed, Stream.GENERATION, 0, index) for index in indices]

    def noise(step: int = 0) -> paddle.Tensor:
        shape = model.config.sample_shape
        return paddle.to_tensor(np.stack([one.standard_normal(shape, dtype=np.float32) for one in generators]))

    denoise = guided(
        model,
        paddle.to_tensor(labels),
        guidance_scale=options.guidance_scale,
        guidance_channels=options.guidance_channels,
        guidance_interval=options.guidance_interval,
    )
    return SAMPLERS[options.sampler](denoise, noise(), options.schedule(), noise).numpy()


@dataclass(frozen=True)
class Generator:
    """A model, the VAE that decodes its latents, and the names of its classes."""

    model: paddle.nn.Layer
    vae: paddle.nn.Layer
    info: ModelInfo

    @property
    def id2label(self) -> dict[int, str]:
        """Class id -> name: the model's own names, ImageNet's for 1000 classes, or the numbers.

        An unconditional model has its null class alone, which is label 0.
        """
        classes, names = self.info.config.num_classes, class_names(self.info)
        if classes == 0:
            return {self.info.config.null_class: "no class"}
        return {label: names.get(label, f"class {label}") for label in range(classes)}

    def default_labels(self) -> list[int]:
        """Return the classes drawn where none are asked for: the paper's of ImageNet's 1000, else the first eight."""
        classes = self.info.config.num_classes
        if classes == 0:
            return [self.info.config.null_class] * len(PAPER_CLASSES)
        return list(PAPER_CLASSES if classes == 1000 else range(min(len(PAPER_CLASSES), classes)))

    def resolve(self, requested: Sequence[str | int]) -> list[int]:
        """Return the ids of classes given by id or name; ConfigError offers the nearest names."""
        return resolve_labels(list(requested), self.id2label)

    def name_of(self, label: int) -> str:
        """Return the first name of a class."""
        return self.id2label.get(label, "").split(",")[0]


def load_generator(path: str | Path, vae: str | None = None, weights: str = "ema") -> Generator:
    """Load what is needed to draw images.

    Args:
        path: checkpoint, run folder, weights file or DiTPipeline folder.
        vae: folder or hub name; by default the pipeline folder's, or the one that made the training latents.
        weights: "ema" or "model", where there are both.

    Raises:
        CheckpointError, ConversionError: a model or VAE that is missing, damaged or cannot be read.
        ConfigError: the VAE is not known, or does not decode the model's latents.
    """
    model, info = load_model(path, weights)
    own = Path(path) / "vae"
    name = vae or (str(own) if own.is_dir() else (info.vae or {}).get("name"))
    if name is None:
        raise ConfigError(f"{path} does not say which VAE made its latents; give --vae FOLDER")
    loaded = load_vae(name)
    fit_vae(loaded, info.config.in_channels, info.vae)
    return Generator(model, loaded, info)


def draw_images(source: Generator, class_labels: Sequence[int], options: SamplingOptions, batch_size: int = 32):
    """Draw one image per label with a progress bar; uint8 ``[N, H, W, 3]``."""
    with tqdm(total=len(class_labels), desc="draw", unit="image") as bar:
        latents = generate_latents(source.model, class_labels, options, batch_size=batch_size, report=bar.update)
    return decode(source.vae, latents, batch_size=batch_size)
