"""From weights to images: the functions that scripts, previews and evaluation share.

Image ``i`` of a seed depends on ``(seed, i)`` alone: its starting noise and every later draw come from a generator of
its own, whatever the batch size and whichever other images are drawn.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from tqdm import tqdm

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.loading import known_names, load_model
from paddle_dit.data.classes import Classes
from paddle_dit.diffusion.guidance import guided
from paddle_dit.diffusion.options import SamplingOptions, check_draw
from paddle_dit.diffusion.samplers import sample
from paddle_dit.errors import ConfigError
from paddle_dit.half_precision import autocast
from paddle_dit.models.vae import decode, fit_vae, load_vae
from paddle_dit.randomness import ImageNoise


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
    labels = check_draw(model.config, class_labels, batch_size)
    indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
    batches = []
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        batches.append(_generate_batch(model, labels[part], indices[part], options, report))
    return np.concatenate(batches) if batches else np.zeros((0, *model.config.sample_shape), np.float32)


def _generate_batch(
    model, labels: np.ndarray, indices: np.ndarray, options: SamplingOptions, report: Callable[[float], object]
) -> np.ndarray:
    draw = ImageNoise(options.seed, indices, model.config.sample_shape)

    def noise(step: int = 0) -> paddle.Tensor:
        return paddle.to_tensor(draw())

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
    return sample(denoise, noise(), options.steps(), noise, progress).numpy()


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
    def classes(self) -> Classes:
        """The classes that it draws, and their names."""
        return Classes(self.info.config.num_classes, known_names(self.info))


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
        GenerationError: what was drawn is no image.
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
