"""What an extraction of features is asked for, and what can be refused before anything is read."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paddle_dit.config import Dtype
from paddle_dit.data.images import check_image_size
from paddle_dit.errors import ConfigError
from paddle_dit.files import check_writable
from paddle_dit.models.vae_files import check_scaling_factor
from paddle_dit.randomness import MAX_SEED

# Matrix kernels add up in another order with another number of threads, which changes the last bits of what the VAE
# gives. One thread gives the same bits in any number of processes, and more processes use more cores.
THREADS = 1
_MOST_WORKERS = 8


@dataclass(frozen=True)
class ExtractionOptions:
    """What to extract, and how."""

    data_path: Path
    """Folder that holds a folder of images per class, or images and a labels.csv (columns file,label)."""
    features_path: Path
    """Folder of the result; made if need be."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """The VAE: a folder or hub name."""
    scaling_factor: float | None = None
    """What latents are multiplied by. Default: what the VAE's config.json says."""
    image_size: int = 256
    """Side of the images in pixels: the short side is scaled to it, then the middle is cut out."""
    format: Literal["packed", "npy"] = "packed"
    """A packed store, or fast-DiT's npy pairs: these are written from a store in FEATURES_PATH/packed, which stays."""
    store: Literal["latents", "moments"] = "latents"
    """Latents drawn once, times the scaling factor; or mean and log-variance, so that training draws new ones."""
    flip: bool = False
    """Store the encoding of every mirrored image too."""
    dtype: Literal["float16", "float32"] | None = None
    """How numbers are stored. Default: float16, but float32 for moments and npy pairs."""
    batch_size: int = 32
    """Images that a process encodes at once."""
    shard_size: int = 8192
    """Images per file of the store: the unit that a process writes, and at most what a stop loses of its work."""
    num_workers: int | None = None
    """Processes that read images, for each that encodes; 0 for none. Default: its share of the cores, up to 8."""
    seed: int = 0
    """Of the noise in the latents."""
    on_error: Literal["stop", "skip"] = "stop"
    """An image that cannot be read ends all, or is left out, named at the end and in the store's index."""
    precision: Dtype = "fp32"
    """Of the VAE. Half precision needs a GPU, where it has not been run yet."""

    @property
    def folder(self) -> Path:
        """Where the packed store will be."""
        return self.features_path / "packed" if self.format == "npy" else self.features_path

    @property
    def stored_dtype(self) -> str:
        """The dtype of the stored numbers."""
        return self.dtype or ("float16" if (self.format, self.store) == ("packed", "latents") else "float32")

    @property
    def workers(self) -> int:
        """Processes that read images for this process."""
        if self.num_workers is not None:
            return self.num_workers
        ranks = int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))
        return min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) // ranks))

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            ConfigError: an option, or an output folder that cannot be written.
            DataError: an image size that no VAE takes.
        """
        check_image_size(self.image_size)
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        if self.workers < 0:
            raise ConfigError(f"--num-workers must be 0 or more, got {self.workers}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"--seed must be between 0 and {MAX_SEED}, got {self.seed}")
        if self.scaling_factor is not None:
            check_scaling_factor(self.scaling_factor, "--scaling-factor")
            if self.format == "npy":
                raise ConfigError(
                    "npy pairs do not say their scaling factor; use --format packed with --scaling-factor"
                )
        if self.format == "npy" and (self.flip or self.store != "latents"):
            asked = "--flip" if self.flip else f"--store {self.store}"
            raise ConfigError(f"npy pairs hold nothing but one latent per image; use --format packed with {asked}")
        if self.features_path.resolve().is_relative_to(self.data_path.resolve()):
            raise ConfigError(f"--features-path {self.features_path} lies in --data-path; choose a folder beside it")
        check_writable(self.features_path, "--features-path")
