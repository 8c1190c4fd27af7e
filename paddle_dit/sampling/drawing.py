"""A loaded model, how it is to draw, and the record of both that goes with every image."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paddle_dit.checkpoint import fingerprint
from paddle_dit.conversion.sources import pinned
from paddle_dit.diffusion.options import SamplingOptions, check_guidance
from paddle_dit.generation import Generator, load_generator
from paddle_dit.half_precision import check_precision
from paddle_dit.models.vae import factor_of
from paddle_dit.runtime import choose_device, environment, has_gpu, peak_rss
from paddle_dit.sampling.options import DrawingOptions


@dataclass(frozen=True)
class Drawing:
    """What images are drawn with.

    Attributes:
        source: model, VAE and names of classes.
        sampling: how, with the guidance that the model has.
        record: plain values that say all of it; see :meth:`record_of`.
    """

    source: Generator
    sampling: SamplingOptions
    record: dict

    @classmethod
    def open(cls, options: DrawingOptions, batch_size: int) -> "Drawing":
        """Load what the options ask for.

        Args:
            options: see there.
            batch_size: images drawn together, for the record: the last bits depend on it.

        Raises:
            ConfigError: options that cannot be, or that contradict the weights.
            CheckpointError, ConversionError: weights or VAE that are missing, damaged or cannot be read.
        """
        asked, path = _sampling(options), pinned(options.path)
        check_precision(options.precision)
        device = choose_device()
        source = load_generator(path, options.vae_name, options.weights)
        factor = factor_of(source.vae)
        config = source.info.config
        options.check_model(config, factor)
        sampling = asked.for_model(config)
        check_guidance(config, sampling.guidance_scale, sampling.guidance_channels, sampling.guidance_interval)
        record = {
            "format": "paddle_dit images",
            "model": str(path),
            "weights": options.weights,
            "vae": options.vae_name,
            "image_size": [side * factor for side in config.height_width],
            **sampling.to_dict(),
            "batch_size": batch_size,
            "weights_sha256": fingerprint(source.model),
            "vae_sha256": fingerprint(source.vae),
            "device": device,
            "environment": environment(),
        }
        return cls(source, sampling, json.loads(json.dumps(record)))

    def record_of(self, position: int, class_labels: Sequence[int], first_index: int) -> dict:
        """Return the record of one image: what all have, its number and class, and the batch that it was drawn in.

        Args:
            position: of the image among ``class_labels``.
            class_labels: of images drawn with one call.
            first_index: number of the first of them among those of the seed.
        """
        size = self.record["batch_size"]
        start = position // size * size
        return {
            **self.record,
            "index": first_index + position,
            "class_label": int(class_labels[position]),
            "first_index": first_index + start,
            "class_labels": [int(label) for label in class_labels[start : start + size]],
        }


def _sampling(options: DrawingOptions) -> SamplingOptions:
    return SamplingOptions(
        sampler=options.sampler,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        guidance_channels=options.guidance_channels,
        guidance_interval=options.guidance_interval,
        seed=options.seed,
        timestep_spacing=options.timestep_spacing,
        eta=options.eta,
        precision=options.precision,
    )


def closing_line(what: Path, images: int, seconds: float) -> str:
    """Return the last line of a command: what was written, how fast, and with how much memory."""
    memory = f"{peak_rss() / 2**20:,.0f} MiB"
    if has_gpu():
        import paddle

        memory += f", on the GPU {paddle.device.cuda.max_memory_allocated() / 2**20:,.0f} MiB"
    rate = images / max(seconds, 1e-9)
    return f"wrote {what}: {images:,} images in {seconds:,.1f} s, {rate:.3g} images/s; peak memory {memory}"
