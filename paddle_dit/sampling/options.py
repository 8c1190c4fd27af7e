"""What the two sampling commands are told, and what can be refused before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from paddle_dit.config import PRESETS, DiTConfig, Dtype, Weights
from paddle_dit.diffusion.options import Sampler, TimestepSpacing, check_first_index
from paddle_dit.errors import ConfigError

PUBLISHED_VAES = {name: f"stabilityai/sd-vae-ft-{name}" for name in ("mse", "ema")}
# Keys of others' recipes, and what they stand for here.
SWITCHES = {"ddim_sampling": ("sampler", "ddim", "ddpm"), "use_fp16": ("precision", "fp16", "fp32")}


@dataclass
class DrawingOptions:
    """With what to draw, and how. The defaults are the paper's."""

    config: Annotated[Path | None, arg(aliases=["-c"])] = None
    """YAML file of the options below; the command line overrides it."""
    ckpt: Path | None = None
    """Checkpoint folder, run folder (its newest whole checkpoint), weights file, or DiTPipeline folder."""
    model: str | None = None
    """Name of the architecture (DiT-XL/2, ...), with which the weights are compared; or, without --ckpt, these."""
    vae: str | None = None
    """VAE folder or hub name; mse and ema are the two of the paper's code. Default: the pipeline folder's own, or the
    one that made the training latents."""
    weights: Weights = "ema"
    """Averaged or raw weights of a checkpoint."""
    image_size: int | None = None
    """Pixels of an image's side (256, 512), with which the model is compared."""
    num_classes: int | None = None
    """Number of classes, with which the model is compared."""
    sampler: Sampler = "ddpm"
    """ddpm uses the learned variance; ddim and dpm-solver++ (of second order) are deterministic."""
    num_inference_steps: Annotated[int, arg(aliases=["--num-sampling-steps", "--sampling-steps"])] = 250
    """Steps of the sampler."""
    timestep_spacing: TimestepSpacing | None = None
    """Which timesteps the steps are. Default: as published: leading for ddim where the steps divide 1000, else
    linspace."""
    eta: float = 0.0
    """Share of ddpm's noise that ddim adds: 0 is none."""
    guidance_scale: Annotated[float | None, arg(aliases=["--cfg-scale"])] = None
    """Strength of classifier-free guidance; 1 is none. Default: 4, or 1 for a model that cannot be guided."""
    guidance_channels: int = 3
    """Latent channels that are guided: 3 as the paper's code, 4 as ppdiffusers."""
    guidance_interval: tuple[int, int] | None = None
    """Guide between these timesteps only: LOW HIGH. Elsewhere just the conditional half is computed."""
    seed: Annotated[int, arg(aliases=["--global-seed"])] = 0
    """Image i of a seed is always the same; 0 to 2**56 - 1."""
    precision: Dtype = "fp32"
    """Of the model. bf16 and fp16 need a GPU, where they have not been run yet."""

    @property
    def path(self) -> Path:
        """Where the weights are.

        Raises:
            ConfigError: it was not said, or the architecture besides it is unknown.
        """
        if self.ckpt is not None:
            if self._named is not None:
                DiTConfig.from_preset(self._named)
            return self.ckpt
        if self.model is None:
            raise ConfigError("say which weights to draw with: --ckpt and a run, checkpoint or DiTPipeline folder")
        if self.model in PRESETS:
            raise ConfigError(f"--model {self.model} names an architecture; give its weights with --ckpt")
        return Path(self.model)

    @property
    def _named(self) -> str | None:
        """The architecture's name, if it was given besides the weights."""
        return None if self.model is None or self.ckpt in (None, Path(self.model)) else self.model

    @property
    def vae_name(self) -> str | None:
        """Folder or hub name of the VAE, or None for the default."""
        return PUBLISHED_VAES.get(self.vae, self.vae)

    def check_model(self, config: DiTConfig, factor: int) -> None:
        """Compare the weights with what was said of them.

        Args:
            config: of the weights.
            factor: by which their VAE shrinks images.

        Raises:
            ConfigError: they differ.
        """
        for name, asked in PRESETS.get(self._named, {}).items():
            found = getattr(config, name)
            if asked != found:
                raise ConfigError(
                    f"{self._named} has {name} {asked}, the weights in {self.ckpt} {found}; correct --model or --ckpt"
                )
        height, width = (side * factor for side in config.height_width)
        if self.image_size is not None and (height, width) != (self.image_size, self.image_size):
            raise ConfigError(
                f"--image-size {self.image_size}, but {self.path} draws images of {height}x{width}; leave the option "
                "out or give other weights"
            )
        if self.num_classes is not None and self.num_classes != config.num_classes:
            raise ConfigError(
                f"--num-classes {self.num_classes}, but {self.path} has {config.num_classes}; leave the option out or "
                "give other weights"
            )


@dataclass
class SampleOptions(DrawingOptions):
    """A few images to look at."""

    class_labels: tuple[str, ...] = ()
    """Class ids or names. Default: the paper's eight for 1000 classes, else the first eight."""
    first_index: int = 0
    """Number of the first image among those of the seed."""
    output: Path | None = None
    """Folder to write into. Default: outputs/samples, or outputs/samples-2, -3, ... where earlier images are."""
    overwrite: bool = False
    """Replace earlier images in the output."""
    batch_size: int = 32
    """Images drawn together."""
    again: Path | None = None
    """Draw the images of this samples.json, or of this one PNG, again; options given besides win."""

    def check(self) -> None:
        """Raise ConfigError for numbers that cannot be."""
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be 1 or more, got {self.batch_size}")
        check_first_index(self.first_index, "--first-index")


@dataclass
class ManyOptions(DrawingOptions):
    """Many images to evaluate a model by."""

    guidance_scale: Annotated[float | None, arg(aliases=["--cfg-scale"])] = 1.5
    """Strength of classifier-free guidance; 1 is none."""
    num_fid_samples: Annotated[int, arg(aliases=["--num-samples"])] = 50_000
    """Images to draw."""
    per_proc_batch_size: Annotated[int, arg(aliases=["--batch-size"])] = 32
    """Images that a process draws together; at most these are lost by a stop."""
    labels: Literal["uniform", "balanced"] = "uniform"
    """Classes drawn at random, as published, or each in turn."""
    sample_dir: Annotated[Path, arg(aliases=["--output"])] = Path("samples")
    """Folder of the result; made if need be. The same command again continues what is found here."""
    output_format: Literal["both", "npz", "png"] = "both"
    """PNG files, samples.npz as the ADM suite reads it, or both."""

    def check(self) -> None:
        """Raise ConfigError for numbers that cannot be."""
        for name in ("num_fid_samples", "per_proc_batch_size"):
            if not 1 <= getattr(self, name) < 10**9:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
