"""From weights to images: the functions that scripts, previews and evaluation share.

Image ``i`` of a seed depends on ``(seed, i)`` alone: its starting noise and every later draw come from a generator of
its own, whatever the batch size and whichever other images are drawn.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from paddle_dit.diffusion.schedule import NUM_TRAIN_TIMESTEPS, Schedule, spaced_timesteps
from paddle_dit.errors import ConfigError, nearest
from paddle_dit.half_precision import PADDLE_NAMES, autocast
from paddle_dit.models.vae import decode, fit_vae, load_vae
from paddle_dit.randomness import MAX_SEED, Stream, generator

PAPER_GUIDANCE = 4.0
PAPER_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # of ImageNet; the samples that the paper's code draws


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw. The defaults are the paper's (section 5; guidance as in its figure 1).

    Attributes:
        sampler: "ddpm" (ancestral, with the learned variance where the model has one), "ddim", or "dpm-solver++" (its
            multistep form of second order).
        num_inference_steps: steps of the sampler, 1 to 1000.
        guidance_scale: 1 is no guidance. None is 4 for a model that can be guided, else 1.
        guidance_channels: latent channels that are guided: 3 as the paper's code, all as ppdiffusers.
        guidance_interval: guide at timesteps ``low <= t < high`` only; None everywhere.
        seed: of every draw, 0 to 2**56 - 1.
        timestep_spacing: "linspace", "leading" or "trailing", as ``schedule.spaced_timesteps`` has them. None is what
            was published: "linspace" for ddpm (the paper's code) and dpm-solver++ (ppdiffusers), "leading" for ddim,
            whose paper strides evenly from timestep 0, where the steps divide 1000.
        eta: share of ddpm's noise that ddim adds, 0 (none, deterministic) to 1.
        precision: of the model's matrix products: "fp32", or on a GPU "bf16" or "fp16".
    """

    sampler: str = "ddpm"
    num_inference_steps: int = 250
    guidance_scale: float | None = None
    guidance_channels: int = 3
    guidance_interval: tuple[int, int] | None = None
    seed: int = 0
    timestep_spacing: str | None = None
    eta: float = 0.0
    precision: str = "fp32"

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
        if not 0 <= self.eta <= 1 or (self.eta and self.sampler != "ddim"):
            raise ConfigError(f"eta must be 0 to 1, and 0 for other samplers than ddim, got {self.eta}")
        if self.precision not in PADDLE_NAMES:
            raise ConfigError(f"precision must be {', '.join(PADDLE_NAMES)}, got '{self.precision}'")
        self.schedule()  # checks the spacing

    def for_model(self, config: DiTConfig) -> "SamplingOptions":
        """Return these options with the guidance scale that a model of this configuration is drawn with."""
        if self.guidance_scale is not None:
            return self
        return replace(self, guidance_scale=PAPER_GUIDANCE if can_guide(config) else 1.0)

    @property
    def spacing(self) -> str:
        """Name of the timestep spacing."""
        strided = self.sampler == "ddim" and NUM_TRAIN_TIMESTEPS % self.num_inference_steps == 0
        return self.timestep_spacing or ("leading" if strided else "linspace")

    def schedule(self) -> Schedule:
        """Return the training schedule, of which the steps asked for are kept."""
        skip_zero = self.sampler == "dpm-solver++"
        kept = spaced_timesteps(NUM_TRAIN_TIMESTEPS, self.num_inference_steps, self.spacing, skip_zero)
        return Schedule.linear().keeping(kept)

    def to_dict(self) -> dict:
        """Return plain values, to be kept with the images; the spacing has its name."""
        return {**asdict(self), "timestep_spacing": self.spacing}


@dataclass(frozen=True)
class Predictor:
    """What the samplers need of a model: its configuration, and predictions in the precision of their sums.

    Attributes:
        config: of the model.
        predict: called as ``predict(x, timesteps, class_labels)``.
    """

    config: DiTConfig
    predict: Callable

    def __call__(self, x, timesteps, class_labels):
        """Return the prediction as float32."""
        return self.predict(x, timesteps, class_labels).astype("float32")


def generate_latents(
    model,
    class_labels: Sequence[int],
    options: SamplingOptions | None = None,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
    report: Callable[[float], object] = lambda amount: None,
) -> np.ndarray:
    """Draw one latent per label.

    Args:
        model: a :class:`~paddle_dit.models.dit.DiT` in evaluation mode.
        class_labels: one label per image; ``num_classes`` draws without a class, where the model has a null class.
        options: sampler, steps, guidance and seed.
        indices: which images of the seed these are; ``0 .. N-1`` by default.
        batch_size: images drawn together.
        report: is told after each step by how many images, or what part of one, the work has grown; N in all.

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
        batches.append(_generate_batch(model, labels[part], indices[part], options, report))
    return np.concatenate(batches) if batches else np.zeros((0, *model.config.sample_shape), np.float32)


def _generate_batch(
    model, labels: np.ndarray, indices: np.ndarray, options: SamplingOptions, report: Callable[[float], object]
) -> np.ndarray:
    generators = [generator(options.seed, Stream.GENERATION, 0, index) for index in indices]

    def noise(step: int = 0) -> paddle.Tensor:
        shape = model.config.sample_shape
        return paddle.to_tensor(np.stack([one.standard_normal(shape, dtype=np.float32) for one in generators]))

    def progress(steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            yield step
            report(len(labels) / options.num_inference_steps)

    denoise = guided(
        _in_precision(model, options.precision),
        paddle.to_tensor(labels),
        guidance_scale=options.guidance_scale,
        guidance_channels=options.guidance_channels,
        guidance_interval=options.guidance_interval,
    )
    sampler = SAMPLERS[options.sampler]
    if options.eta:
        sampler = functools.partial(sampler, eta=options.eta)
    return sampler(denoise, noise(), options.schedule(), noise, progress).numpy()


def _in_precision(model, precision: str):
    """Return a model that computes its matrix products in ``precision``; half was not run on a GPU yet."""
    if precision == "fp32":
        return model

    def predict(*inputs):
        with autocast(precision):
            return model(*inputs)

    return Predictor(model.config, predict)


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


def draw_batches(
    source: Generator,
    class_labels: Sequence[int],
    options: SamplingOptions,
    *,
    first_index: int = 0,
    batch_size: int = 32,
    report: Callable[[float], object] = lambda amount: None,
) -> Iterator[np.ndarray]:
    """Yield the images of each batch, uint8 ``[n, H, W, 3]``: one per label, in order.

    Args:
        source: what to draw with.
        class_labels: one label per image.
        options: sampler, steps, guidance and seed.
        first_index: number of the first image among those of the seed.
        batch_size: images drawn, and decoded, together.
        report: see :func:`generate_latents`.

    Raises:
        ConfigError: as :func:`generate_latents`.
    """
    for start in range(0, len(class_labels), batch_size):
        labels = class_labels[start : start + batch_size]
        indices = first_index + start + np.arange(len(labels))
        latents = generate_latents(source.model, labels, options, indices=indices, batch_size=batch_size, report=report)
        yield decode(source.vae, latents, batch_size=batch_size)


def image_bar(total: int, done: int = 0, *, shown: bool = True, leave: bool = True) -> tqdm:
    """Return a progress bar with the rate in images per second, however slow, and the time left.

    Args:
        total: images.
        done: of them already.
        shown: whether to show it.
        leave: whether it stays on the screen at the end.
    """
    return tqdm(
        disable=not shown,
        leave=leave,
        total=total,
        initial=done,
        desc="draw",
        unit=" images",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}, {rate_noinv_fmt}]",
        smoothing=0,  # the mean, as batches of other processes come all at once
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )


def draw_images(
    source: Generator,
    class_labels: Sequence[int],
    options: SamplingOptions,
    batch_size: int = 32,
    first_index: int = 0,
) -> np.ndarray:
    """Draw one image per label with a progress bar; uint8 ``[N, H, W, 3]``. Arguments as for :func:`draw_batches`."""
    with image_bar(len(class_labels)) as bar:
        batches = list(
            draw_batches(
                source, class_labels, options, first_index=first_index, batch_size=batch_size, report=bar.update
            )
        )
        bar.update(len(class_labels) - bar.n)  # which its parts miss by their rounding
    return np.concatenate(batches)
