"""What scripts/infer.py is told, and what it does."""

import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import arg

from paddle_dit import __version__
from paddle_dit.deploy.backends import differences
from paddle_dit.deploy.parity import check, load_reference
from paddle_dit.deploy.pipeline import InferencePipeline
from paddle_dit.diffusion.options import Sampler, SamplingOptions, TimestepSpacing, check_first_index
from paddle_dit.errors import ConfigError
from paddle_dit.pictures import hold_folder, save_images
from paddle_dit.runtime import peak_rss


@dataclass
class InferOptions:
    """With what to draw, and how."""

    model: Path
    """Folder of scripts/export_inference.py."""
    class_labels: tuple[str, ...] = ()
    """Class ids or names. Default: the paper's eight for 1000 classes, else the first eight."""
    sampler: Sampler | None = None
    """Default: that of the exported pipeline's scheduler, else ddim."""
    num_inference_steps: Annotated[int, arg(aliases=["--num-sampling-steps", "--sampling-steps"])] = 25
    """Steps of the sampler."""
    guidance_scale: Annotated[float | None, arg(aliases=["--cfg-scale"])] = None
    """Strength of classifier-free guidance; 1 is none. Default: 4, or 1 for a model that cannot be guided."""
    guidance_channels: int = 3
    """Latent channels that are guided: 3 as the paper's code, 4 as ppdiffusers."""
    guidance_interval: tuple[int, int] | None = None
    """Guide between these timesteps only: LOW HIGH. Elsewhere just the conditional half is computed."""
    timestep_spacing: TimestepSpacing | None = None
    """Which timesteps the steps are. Default: as published."""
    eta: float = 0.0
    """Share of ddpm's noise that ddim adds: 0 is none."""
    seed: Annotated[int, arg(aliases=["--global-seed"])] = 0
    """Image i of a seed is always the same; 0 to 2**56 - 1."""
    first_index: int = 0
    """Number of the first image among those of the seed."""
    batch_size: int | None = None
    """Images drawn together. Default, and at most: the engine's largest."""
    threads: int | None = None
    """Threads of the CPU. Default: all."""
    output: Path | None = None
    """Folder to write into. Default: outputs/samples, or outputs/samples-2, -3, ... where earlier images are."""
    overwrite: bool = False
    """Replace earlier images in the output."""
    verify: bool = False
    """Compare the engine with the figures of the model that it was made from; draw only if classes are given."""
    fallback: bool = False
    """Where the engine's backend cannot run, run its programs by the plain one of the same kind."""

    def check(self) -> None:
        """Raise ConfigError for numbers that cannot be."""
        for flag, value in (("--batch-size", self.batch_size), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} must be 1 or more, got {value}")
        check_first_index(self.first_index, "--first-index")


def infer(options: InferOptions, report: Callable[[str], object] = print) -> None:
    """Compare, if it is asked for, and draw.

    Raises:
        ConfigError: options that cannot be.
        DeployError: an engine that cannot be used, or that does not compute what it should.
    """
    options.check()
    draws = bool(options.class_labels) or not options.verify
    with hold_folder(options.output, options.overwrite) if draws else nullcontext() as folder:
        pipeline = InferencePipeline.from_pretrained(
            options.model, threads=options.threads, fallback=options.fallback, report=report
        )
        different = differences(pipeline.info.versions, pipeline.versions)
        if different and not options.verify:
            report(f"the engine was proven with {different}; --verify compares it with the model again")
        if options.verify:
            figures = check(pipeline, load_reference(options.model), report)
            report(f"{options.model}: {len(figures)} comparisons within their limits")
        if draws:
            _draw(pipeline, options, folder, report)


def _draw(pipeline: InferencePipeline, options: InferOptions, folder: Path, report: Callable[[str], object]) -> None:
    info, classes = pipeline.info, pipeline.info.classes
    labels = classes.resolve(options.class_labels) if options.class_labels else classes.default_labels()
    names = set(SamplingOptions.__dataclass_fields__) & set(InferOptions.__dataclass_fields__)
    asked = {name: getattr(options, name) for name in names}
    asked["sampler"] = options.sampler or info.sampling["sampler"]
    sampling = SamplingOptions(**asked).for_model(info.config)
    started = time.perf_counter()
    latents = pipeline.draw_latents(labels, sampling, first_index=options.first_index, batch_size=options.batch_size)
    drawn = time.perf_counter() - started
    images = pipeline.decode(latents)
    seconds = time.perf_counter() - started
    record = {
        "format": "paddle_dit images",
        "engine": str(options.model),
        "image_size": list(images.shape[1:3]),
        **sampling.to_dict(),
        "precision": pipeline.settings.precision,
        "backend": pipeline.backend,
        "batch_size": min(options.batch_size or info.max_batch_size, info.max_batch_size),
        **{name: info.source[name] for name in ("weights_sha256", "vae_sha256")},
        "device": pipeline.settings.device,
        "environment": {
            **pipeline.versions,
            "paddle_dit": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    numbered = enumerate(labels, options.first_index)
    records = [{**record, "index": index, "class_label": label} for index, label in numbered]
    whole = {**record, "first_index": options.first_index, "class_labels": labels}
    grid = save_images(folder, images, [classes.name_of(label) for label in labels], whole, records)
    report(
        f"wrote {grid}: {len(labels):,} images in {seconds:,.2f} s ({drawn:,.2f} s for {options.num_inference_steps} "
        f"steps, {seconds - drawn:,.2f} s for the decoder); peak memory {peak_rss() / 2**20:,.0f} MiB"
    )
