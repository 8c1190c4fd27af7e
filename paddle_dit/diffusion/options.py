"""How images are drawn: sampler, steps, guidance and seed, checked without Paddle, for models and engines alike."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Literal

import numpy as np

from paddle_dit.config import DiTConfig
from paddle_dit.diffusion.schedule import NUM_TRAIN_TIMESTEPS, SAMPLER_STEPS, SamplerSteps, Schedule, spaced_timesteps
from paddle_dit.errors import ConfigError, nearest
from paddle_dit.half_precision import PADDLE_NAMES
from paddle_dit.randomness import MAX_SEED

Sampler = Literal["ddpm", "ddim", "dpm-solver++"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]
PAPER_GUIDANCE = 4.0
_INDICES = 2**62  # numbers of images, from 0


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
        if self.sampler not in SAMPLER_STEPS:
            known = ", ".join(SAMPLER_STEPS)
            raise ConfigError(f"unknown sampler '{self.sampler}'.{nearest(self.sampler, SAMPLER_STEPS)} Known: {known}")
        for name in ("num_inference_steps", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise ConfigError(f"{name} must be an integer, got {getattr(self, name)!r}")
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

    def guides_at(self, timestep: int) -> bool:
        """Whether there is guidance at a timestep."""
        low, high = self.guidance_interval or (0, math.inf)
        return self.guidance_scale != 1.0 and low <= timestep < high

    def steps(self) -> SamplerSteps:
        """Return the sampler's coefficients."""
        table = SAMPLER_STEPS[self.sampler]
        return table(self.schedule(), self.eta) if self.eta else table(self.schedule())

    def to_dict(self) -> dict:
        """Return plain values, to be kept with the images; the spacing has its name."""
        return {**asdict(self), "timestep_spacing": self.spacing}


def can_guide(config: DiTConfig) -> bool:
    """Return whether a model has both classes and the null class to guide away from."""
    return config.num_classes > 0 and config.has_null_class


def check_first_index(first_index: int, name: str = "first_index") -> None:
    """Raise ConfigError for a number of an image that cannot be; ``name`` is what the user calls it."""
    if not 0 <= first_index < _INDICES:
        raise ConfigError(f"{name} must be 0 to 2**62 - 1, got {first_index}")


def check_guidance(config: DiTConfig, scale: float, channels: int, interval: tuple[int, int] | None) -> None:
    """Raise ConfigError for guidance that cannot be, or that a model of this configuration cannot have."""
    if not 1.0 <= scale < math.inf:
        raise ConfigError(f"guidance_scale must be 1 (none) or more, got {scale}")
    if scale > 1.0 and config.num_classes == 0:
        raise ConfigError("an unconditional model has nothing to guide towards; use --guidance-scale 1")
    if scale > 1.0 and not can_guide(config):
        raise ConfigError("this model was trained without label dropout and cannot be guided; use --guidance-scale 1")
    if not 1 <= channels <= config.in_channels:
        raise ConfigError(f"guidance_channels must be 1 to {config.in_channels}, got {channels}")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ConfigError(f"guidance_interval {interval} is empty; give LOW HIGH with 0 <= LOW < HIGH <= 1000")


def check_draw(config: DiTConfig, class_labels: Sequence[int], batch_size: int) -> np.ndarray:
    """Return labels as int64 ``[N]``, or raise ConfigError for those of no class of a model, or for a batch of none."""
    labels, last = np.asarray(class_labels, dtype=np.int64), config.label_rows - 1
    if labels.size and not 0 <= labels.min() <= labels.max() <= last:
        raise ConfigError(f"class labels must be 0 to {last}, got {labels.min()} to {labels.max()}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, got {batch_size}")
    return labels
