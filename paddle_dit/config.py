"""What a model is and how it is trained: dataclasses and the table of presets. Nothing here imports Paddle."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from paddle_dit.errors import ConfigError, nearest
from paddle_dit.files import read_json, write_json

Dtype = Literal["fp32", "bf16", "fp16"]  # of matrix products
Weights = Literal["ema", "model"]  # of a checkpoint: averaged, or raw

#                     depth  hidden_size  num_heads     (DiT paper, table 1)
_WIDTHS = {
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}
_PATCHES = (2, 4, 8)
_DIGITS = "DiT-Digits/2"
_LARGEST, _DEEPEST = 2**31 - 1, 10_000  # far beyond what can be trained; a damaged file may say anything

PRESETS = {
    **{
        f"{name}/{patch}": {"patch_size": patch, "depth": depth, "hidden_size": width, "num_heads": heads}
        for name, (depth, width, heads) in _WIDTHS.items()
        for patch in _PATCHES
    },
    # For the embedded digits: small enough to learn them in minutes on two cores.
    _DIGITS: {"patch_size": 2, "depth": 3, "hidden_size": 96, "num_heads": 4, "sample_size": 8, "num_classes": 10},
}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value <= _LARGEST


@dataclass(frozen=True)
class DiTConfig:
    """Architecture of a diffusion transformer.

    Attributes:
        sample_size: height and width of the latents, one int or ``(height, width)``.
        patch_size: side of a square patch, in latent pixels.
        in_channels: channels of the latents.
        hidden_size: width of the transformer.
        depth: number of blocks.
        num_heads: attention heads; divides ``hidden_size``.
        mlp_ratio: width of the MLP over ``hidden_size``.
        num_classes: labels ``0 .. num_classes-1``; the null class is ``num_classes``. 0 makes an unconditional model,
            whose only label is the null class.
        class_dropout_prob: share of labels that training replaces by the null class. 0 leaves no null class, and so
            no classifier-free guidance.
        learn_sigma: predict the variance too; the output then has ``2 * in_channels`` channels.
        frequency_shift: the timestep frequencies are ``10000 ** (-i / (half - frequency_shift))``. The paper's code
            has 0, diffusers and ppdiffusers have 1.
        norm_eps: epsilon of every LayerNorm.
    """

    sample_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    frequency_shift: int = 1
    norm_eps: float = 1e-6

    def __post_init__(self):
        if isinstance(self.sample_size, list):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
        self._check()

    def _check(self) -> None:
        size = self.sample_size
        sides = size if isinstance(size, tuple) else (size, size)
        if len(sides) != 2 or not all(_is_count(side) for side in sides):
            raise ConfigError(f"sample_size must be one int or two, at most {_LARGEST}, got {size!r}")
        for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            value, most = getattr(self, name), _DEEPEST if name == "depth" else _LARGEST
            if not _is_count(value) or not 1 <= value <= most:
                raise ConfigError(f"{name} must be a positive int, at most {most}, got {value!r}")
        if any(side < 1 or side % self.patch_size for side in sides):
            raise ConfigError(f"sample_size {size} must be a positive multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ConfigError(f"hidden_size {self.hidden_size} must be a multiple of 4 (sin-cos position table)")
        if not _is_count(self.num_classes) or self.num_classes < 0:
            raise ConfigError(f"num_classes must be 0 (unconditional) to {_LARGEST}, got {self.num_classes!r}")
        for name in ("mlp_ratio", "class_dropout_prob", "norm_eps"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise ConfigError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("mlp_ratio", "norm_eps"):
            if not 0 < getattr(self, name) <= _LARGEST:
                raise ConfigError(f"{name} must be positive and at most {_LARGEST}, got {getattr(self, name)}")
        if not isinstance(self.learn_sigma, bool):
            raise ConfigError(f"learn_sigma must be true or false, got {self.learn_sigma!r}")
        if not 0 <= self.class_dropout_prob < 1:
            raise ConfigError(f"class_dropout_prob must be in [0, 1), got {self.class_dropout_prob}")
        if not _is_count(self.frequency_shift) or self.frequency_shift not in (0, 1):
            raise ConfigError(
                f"frequency_shift must be 0 (the paper's code) or 1 (ppdiffusers), got {self.frequency_shift}"
            )

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DiTConfig":
        """Return the preset ``name`` ("DiT-XL/2", ...) with some fields replaced.

        Raises:
            ConfigError: no such preset; the nearest name is given.
        """
        if name not in PRESETS:
            raise ConfigError(f"unknown model '{name}'.{nearest(name, PRESETS)} Known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict) -> "DiTConfig":
        """Build a configuration from the fields of :meth:`to_dict`; unknown keys are refused."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown key '{key}' in the model configuration.{nearest(key, known)}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "DiTConfig":
        """Read a JSON file of these fields."""
        return cls.from_dict(read_json(Path(path), ConfigError))

    def to_dict(self) -> dict:
        """Return the fields as plain values, ready for JSON."""
        return asdict(self)

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the latents."""
        size = self.sample_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, ``(C, H, W)``."""
        return (self.in_channels, *self.height_width)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        height, width = self.height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def out_channels(self) -> int:
        """Channels of the model's output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_class(self) -> int:
        """Label that means "no class"."""
        return self.num_classes

    @property
    def has_null_class(self) -> bool:
        """Whether the label table has a row for the null class."""
        return self.class_dropout_prob > 0 or self.num_classes == 0

    @property
    def label_rows(self) -> int:
        """Rows of the label table."""
        return self.num_classes + self.has_null_class

    def num_parameters(self) -> int:
        """Count the parameters, the fixed position table included, without building the model."""
        width, tokens = self.hidden_size, math.prod(self.grid)
        mlp, patch = int(width * self.mlp_ratio), self.patch_size**2
        embedders = (self.in_channels * patch + 1) * width + (256 + 1 + width + 1) * width + self.label_rows * width
        block = (width + 1) * 4 * width + (width + 1) * mlp + (mlp + 1) * width + (width + 1) * 6 * width
        final = (width + 1) * (2 * width + patch * self.out_channels)
        return tokens * width + embedders + self.depth * block + final

    def multiply_adds(self) -> int:
        """Count the multiply-adds of one forward pass of one sample (the paper's "Gflops")."""
        width, tokens = self.hidden_size, math.prod(self.grid)
        mlp, patch = int(width * self.mlp_ratio), self.patch_size**2
        per_token = 4 * width * width + 2 * mlp * width + 2 * tokens * width
        block = tokens * per_token + 6 * width * width
        embedders = tokens * self.in_channels * patch * width + (256 + width) * width
        final = 2 * width * width + tokens * width * patch * self.out_channels
        return embedders + self.depth * block + final


@dataclass(frozen=True)
class ModelInfo:
    """What travels with the weights, so that converting or sampling needs the artefact's folder and nothing else.

    Attributes:
        config: the architecture.
        label_names: class id -> name, or None where the classes have none.
        vae: name, scaling factor and so on of the VAE that made the latents, as the latents' store states it, or None.
    """

    config: DiTConfig
    label_names: dict[int, str] | None = None
    vae: dict | None = None

    def save(self, path: str | Path) -> None:
        """Write this as JSON."""
        values = {
            "format": "paddle_dit",
            "model": self.config.to_dict(),
            "label_names": self.label_names,
            "vae": self.vae,
        }
        write_json(Path(path), values)

    @classmethod
    def load(cls, path: str | Path) -> "ModelInfo":
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: the file is missing, not JSON, or not of this kind.
        """
        values = read_json(Path(path), ConfigError)
        if values.get("format") != "paddle_dit" or not isinstance(values.get("model"), dict):
            raise ConfigError(f"{path} does not describe a paddle_dit model")
        names, vae = values.get("label_names"), values.get("vae")
        if not isinstance(names, dict | None) or not all(key.isdecimal() and len(key) < 20 for key in names or ()):
            raise ConfigError(f"{path}: 'label_names' must be class ids with their names")
        if not isinstance(vae, dict | None):
            raise ConfigError(f"{path}: 'vae' must be what is known of the VAE")
        names = None if names is None else {int(key): str(name) for key, name in names.items()}
        return cls(DiTConfig.from_dict(values["model"]), names, vae)
