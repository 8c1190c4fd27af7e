"""Pack fast-DiT's npy pairs into a store for training, or write a store as npy pairs again.

    python scripts/pack_features.py data/fastdit_imagenet256 data/imagenet256 --num-classes 1000 \\
        --label-names imagenet --vae stabilityai/sd-vae-ft-mse --scaling-factor 0.18215 --verify
    python scripts/pack_features.py data/imagenet256 data/fastdit_imagenet256 --to npy

The same command again continues one that was stopped or killed; the result has the same bytes as without. A store as
SRC may also be packed anew, with another --dtype or --shard-size. --verify compares every sample with its source.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm
from tyro.conf import Positional

from paddle_dit.cli import parse
from paddle_dit.errors import ConfigError, entry_point


@dataclass
class Options:
    """What to pack."""

    source: Positional[Path]
    """Folder with *_features and *_labels, or a packed store."""
    destination: Positional[Path]
    """Folder of the result."""
    to: Literal["packed", "npy"] = "packed"
    """What to write."""
    dtype: Literal["float16", "float32"] | None = None
    """How latents are stored. Default: float16 in a packed store, float32 in npy pairs, as fast-DiT has them."""
    shard_size: int = 16_384
    """Samples per file of a packed store."""
    verify: bool = False
    """Read everything again at the end and compare every sample with its source."""
    num_classes: int | None = None
    """How many classes there are. npy pairs do not say: needed there, unless --label-names tells."""
    label_names: str | None = None
    """Names of the classes: imagenet, or a JSON file of names by id."""
    vae: str | None = None
    """The VAE that made the latents, for previews and sampling later: a folder or hub name."""
    scaling_factor: float | None = None
    """What the latents were multiplied by (0.18215 for Stable Diffusion's VAE)."""
    npy_name: str = "imagenet256"
    """With --to npy: the folders are NAME_features and NAME_labels. fast-DiT looks for imagenet256."""


def _job(options: Options):
    """Return the writing to be done; heavy imports come after the command line has been read."""
    if options.to == "npy":
        from paddle_dit.data.unpacking import Unpacking

        return Unpacking(options.source, options.destination, options.npy_name, options.dtype or "float32")
    from paddle_dit.data.packing import Packing, read_label_names

    known = {"name": options.vae, "scaling_factor": options.scaling_factor}
    return Packing(
        options.source,
        options.destination,
        dtype=options.dtype or "float16",
        shard_size=options.shard_size,
        num_classes=options.num_classes,
        label_names=read_label_names(options.label_names),
        vae={key: value for key, value in known.items() if value is not None},
    )


def _bar(title: str, total: int, done: int = 0) -> tqdm:
    quiet = not sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, desc=title, unit=" latents", unit_scale=True, mininterval=10.0 if quiet else 0.2
    )


@entry_point
def main() -> None:
    """Write, open, compare."""
    options = parse(Options, description=__doc__)
    if options.shard_size < 1:
        raise ConfigError(f"--shard-size must be 1 or more, got {options.shard_size}")
    if options.scaling_factor is not None and not 0 < options.scaling_factor < float("inf"):
        raise ConfigError(f"--scaling-factor must be positive, got {options.scaling_factor}")
    with _job(options) as job:
        if job.done:
            print(f"{job.done:,} of {job.total:,} latents are there already", flush=True)
        with _bar("write", job.total, job.done) as bar:
            result = job.run(bar.update)
        print(f"{options.destination} holds {len(result):,} {result.kind} {list(result.sample_shape)}", flush=True)
        if options.verify:
            with _bar("verify", job.total) as bar:
                job.compare(result, bar.update)
            print(f"verified: all {len(result):,} equal their source, rounded to {job.dtype}, and so do their labels")


if __name__ == "__main__":
    main()
