"""From weights to images: the functions that scripts, previews and evaluation share.

Image ``i`` of a seed depends on ``(seed, i)`` alone: its starting noise and every later draw come from a generator of
its own, whatever the batch size and whichever other images are drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import paddle
from tqdm import tqdm

from paddle_dit.config import ModelInfo
from paddle_dit.conversion.loading import class_names, load_model
from paddle_dit.data.labels import resolve_labels
from paddle_dit.diffusion.guidance import guided
from paddle_dit.diffusion.samplers import SAMPLERS
from paddle_dit.diffusion.schedule import NUM_TRAIN_TIMESTEPS, Schedule
from paddle_dit.errors import ConfigError, nearest
from paddle_dit.models.vae import decode, load_vae
from paddle_dit.randomness import Stream, generator


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw. The defaults are the paper's (section 5; guidance as in its figure 1).

    Attributes:
        sampler: "ddpm" (ancestral, learned variance) or "ddim" (deterministic).
        num_inference_steps: steps of the sampler, 1 to 1000.
        guidance_scale: 1 is no guidance.
        guidance_channels: latent channels that are guided: 3 as the paper's code, all as ppdiffusers.
        guidance_interval: guide at timesteps ``low <= t < high`` only; None everywhere.
        seed: of every draw.
    """

    sampler: str = "ddpm"
    num_inference_steps: int = 250
    guidance_scale: float = 4.0
    guidance_channels: int = 3
    guidance_interval: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise ConfigError(f"unknown sampler '{self.sampler}'.{nearest(self.sampler, SAMPLERS)} Known: {known}")
        if not 1 <= self.num_inference_steps <= NUM_TRAIN_TIMESTEPS:
            raise ConfigError(f"num_inference_steps must be 1 to {NUM_TRAIN_TIMESTEPS}, got {self.num_inference_steps}")

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
        class_labels: one label per image; ``num_classes`` draws without a class.
        options: sampler, steps, guidance and seed.
        indices: which images of the seed these are; ``0 .. N-1`` by default.
        batch_size: images drawn together.
        report: is told after each batch how many images it had.

    Returns:
        float32 ``[N, C, H, W]``, scaled as the model was trained.

    Raises:
        ConfigError: a label outside the model's classes.
    """
    options = options or SamplingOptions()
    labels = np.asarray(class_labels, dtype=np.int64)
    if labels.size and not 0 <= labels.min() <= labels.max() <= model.config.null_class:
        raise ConfigError(f"class labels must be 0 to {model.config.null_class}, got {labels.min()} to {labels.max()}")
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
        """Class id -> name: the model's own names, ImageNet's for 1000 classes, or the numbers."""
        return class_names(self.info)

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
    """
    model, info = load_model(path, weights)
    own = Path(path) / "vae"
    name = vae or (str(own) if own.is_dir() else (info.vae or {}).get("name"))
    if name is None:
        raise ConfigError(f"{path} does not say which VAE made its latents; give --vae FOLDER")
    return Generator(model, load_vae(name), info)


def draw_images(source: Generator, class_labels: Sequence[int], options: SamplingOptions, batch_size: int = 32):
    """Draw one image per label with a progress bar; uint8 ``[N, H, W, 3]``."""
    with tqdm(total=len(class_labels), desc="draw", unit="image") as bar:
        latents = generate_latents(source.model, class_labels, options, batch_size=batch_size, report=bar.update)
    return decode(source.vae, latents, batch_size=batch_size)
