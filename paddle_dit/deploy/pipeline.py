"""From class names to images with an engine; with ONNX Runtime no Paddle is needed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image

from paddle_dit.deploy.backends import Program, Settings, open_programs, plain_backend
from paddle_dit.deploy.engine import PROGRAMS, SAVED, EngineInfo
from paddle_dit.deploy.loop import draw_latents
from paddle_dit.deploy.specs import DECODER, program_specs
from paddle_dit.diffusion.options import SamplingOptions, check_draw, check_first_index
from paddle_dit.errors import ConfigError, DeployError, PaddleDiTError
from paddle_dit.models.tiling import LARGEST_TILE, decode_batches


@dataclass(frozen=True)
class Images:
    """What a call returns.

    Attributes:
        images: Pillow images, one per label.
        pixels: the same as uint8 ``[N, H, W, 3]``.
        latents: float32 ``[N, C, h, w]``, from which they were decoded.
    """

    images: list[Image.Image]
    pixels: np.ndarray
    latents: np.ndarray


class InferencePipeline:
    """An engine that draws images.

    Several threads may call it at once. A batch larger than the engine's is drawn in parts.

    Attributes:
        info: what ``deploy.json`` says.
        programs: the engine's programs by name.
        backend: name of what runs them here, which after a fallback is another than the engine was made for.
        settings: how it runs them.
        versions: of what runs them here.
    """

    def __init__(
        self,
        info: EngineInfo,
        programs: Mapping[str, Program],
        *,
        backend: str | None = None,
        settings: Settings | None = None,
        versions: Mapping[str, str] | None = None,
    ):
        self.info, self.programs, self.versions = info, programs, dict(versions or info.versions)
        self.backend, self.settings = backend or info.backend, settings or info.settings()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        fallback: bool = False,
        report: Callable[[str], object] = lambda line: None,
    ) -> "InferencePipeline":
        """Open an engine's folder.

        Args:
            folder: of scripts/export_inference.py.
            threads: of the CPU; all that the process may have by default.
            fallback: where the engine's backend cannot run here, or cannot open the programs, run them by the plain one
                of the same kind on the CPU.
            report: is told, in a line, of a fallback and why.

        Raises:
            ConfigError: a number of threads that cannot be.
            DeployError: no engine, files that are not what was exported, or a backend, version or device that is
                missing here.
        """
        folder = Path(folder)
        info = EngineInfo.load(folder)
        name, settings, specs = info.backend, info.settings(threads), program_specs(info.config, info.max_batch_size)
        place = (info.versions, {program: specs[program] for program in SAVED}, folder / PROGRAMS)
        try:
            backend, programs = open_programs(name, *place, settings)
        except PaddleDiTError as error:
            plain = plain_backend(name, settings)
            if not fallback or plain == (name, settings):
                hint = "" if plain == (name, settings) else "; with --fallback the CPU may run it"
                raise DeployError(f"{error}{hint}") from None
            report(f"{name} on {settings.device} cannot run here ({error}); {plain[0]} on the CPU takes its place")
            name, settings = plain
            backend, programs = open_programs(name, *place, settings)
        return cls(info, programs, backend=name, settings=settings, versions=backend.versions())

    def __call__(
        self,
        class_labels: Sequence[int | str],
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        seed: int = 0,
        *,
        first_index: int = 0,
        batch_size: int | None = None,
        report: Callable[[float], object] = lambda amount: None,
        **options,
    ) -> Images:
        """Draw one image per label.

        Args:
            class_labels: ids or names, one or more.
            num_inference_steps: of the sampler.
            guidance_scale: 1 is none. None is 4 for a model that can be guided, else 1.
            seed: of every draw.
            first_index: number of the first image among those of the seed.
            batch_size: images drawn together; the engine's largest by default, and at most.
            report: is told after each step by how many images the work has grown.
            options: the rest of :class:`~paddle_dit.diffusion.options.SamplingOptions`: sampler, guidance_channels,
                guidance_interval, timestep_spacing, eta.

        Raises:
            ConfigError: a class that there is not, or options that cannot be.
        """
        if "precision" in options:
            raise ConfigError(
                f"precision is the engine's, {self.info.precision}; leave it out, or export another engine"
            )
        labels = self.info.classes.resolve(_checked_labels(class_labels))
        asked = {**self.info.sampling, **options}
        sampling = SamplingOptions(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed, **asked
        )
        latents = self.draw_latents(labels, sampling, first_index=first_index, batch_size=batch_size, report=report)
        pixels = self.decode(latents)
        return Images([Image.fromarray(image) for image in pixels], pixels, latents)

    def draw_latents(
        self,
        labels: Sequence[int],
        options: SamplingOptions,
        *,
        first_index: int = 0,
        batch_size: int | None = None,
        report: Callable[[float], object] = lambda amount: None,
    ) -> np.ndarray:
        """Return latents ``[N, C, h, w]`` for label ids; the null class draws without a class.

        Args:
            labels: ids of classes.
            options: sampler, steps, guidance and seed.
            first_index: see :meth:`__call__`.
            batch_size: likewise.
            report: likewise.

        Raises:
            ConfigError: see :meth:`__call__`.
        """
        config, most = self.info.config, self.info.max_batch_size
        size = most if batch_size is None else min(batch_size, most)
        for name, value in (("batch_size", size), ("first_index", first_index)):
            if not isinstance(value, Integral):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
        check_first_index(first_index)
        labels, options = check_draw(config, labels, size), options.for_model(config)
        indices = first_index + np.arange(len(labels))
        parts = [slice(start, start + size) for start in range(0, len(labels), size)]
        drawn = [draw_latents(self.programs, config, labels[part], indices[part], options, report) for part in parts]
        return np.concatenate(drawn) if drawn else np.zeros((0, *config.sample_shape), np.float32)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Turn latents ``[N, C, h, w]`` into images, uint8 ``[N, H, W, 3]``."""
        program, vae = self.programs[DECODER], self.info.vae
        return decode_batches(
            lambda part: program.run({"latents": part})["pixels"],
            latents,
            scaling_factor=vae["scaling_factor"],
            factor=vae["factor"],
            batch_size=self.info.max_batch_size,
            tile=LARGEST_TILE,
        )


def _checked_labels(class_labels: Sequence[int | str]) -> list[int | str]:
    labels = [] if isinstance(class_labels, str) or not isinstance(class_labels, Iterable) else list(class_labels)
    if not labels or not all(isinstance(label, str | Integral) for label in labels):
        raise ConfigError(f"class_labels must be a list of one or more class ids or names, got {class_labels!r}")
    return labels
