"""Say what a data set is: how many latents, of which classes, their values, their VAE, their size; and show some.

    python scripts/inspect_data.py data/imagenet256
    python scripts/inspect_data.py data/fastdit_imagenet256 --decode 16 --vae stabilityai/sd-vae-ft-mse
    python scripts/inspect_data.py imagenet/train

Values come from at most 20,000 evenly spaced latents, sizes of images from 200 of them, unless --all asks for each.
scripts/verify_data.py looks for damage.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from tyro.conf import Positional

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import ConfigError, entry_point
from paddle_dit.files import check_writable


@dataclass
class Options:
    """What to look at."""

    path: Positional[Path]
    """Folder of a packed store, or the one that holds *_features and *_labels, or images by class or labels.csv."""
    all: bool = False
    """Read every latent, not at most 20,000; open every image, not at most 200."""
    decode: int = 0
    """Decode as many latents, evenly spaced, into a picture; 0 none."""
    vae: str | None = None
    """VAE for --decode: a folder or hub name. Default: the one that the data names."""
    output: Path = Path("outputs/data.png")
    """Where the picture goes."""


def _load_vae(options: Options, source):
    """Return the VAE that decodes the source's latents."""
    name = options.vae or (source.vae or {}).get("name")
    if not name:
        raise ConfigError(f"{options.path} names no VAE; give one with --vae")
    runtime.prepare()
    from paddle_dit.data.source import latent_shape_of
    from paddle_dit.models.vae import fit_vae, load_vae

    vae = load_vae(name)
    fit_vae(vae, latent_shape_of(source)[0], source.vae)
    return vae


def _draw(options: Options, source, vae) -> None:
    import numpy as np

    from paddle_dit.data.moments import mean_latents
    from paddle_dit.data.subset import spread
    from paddle_dit.models.vae import decode
    from paddle_dit.pictures import labelled_grid

    some = spread(source, options.decode)
    samples, labels = some.gather(np.arange(len(some)))
    latents = mean_latents(samples, source.kind, vae.config.scaling_factor)
    names = source.label_names or {}
    captions = [names.get(label, str(label)).split(",")[0] for label in labels.tolist()]
    images = decode(vae, latents)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    grid = labelled_grid(images, captions, min(len(images), 8), max(64, images.shape[2]))
    grid.save(options.output, "PNG")
    print(f"wrote {options.output}: {len(images)} latents, evenly spaced, decoded")


@entry_point
def main() -> None:
    """Open, read, tell, draw."""
    options = parse(Options, description=__doc__)
    if options.decode < 0:
        raise ConfigError(f"--decode must be 0 or more, got {options.decode}")
    if options.decode:
        check_writable(options.output.parent, "--output")
    from paddle_dit.data.inspection import inspect

    inspection = inspect(options.path, options.all)
    if options.decode and inspection.source is None:
        raise ConfigError(f"{options.path} holds images; --decode shows latents, leave it out")
    vae = _load_vae(options, inspection.source) if options.decode else None
    with tqdm(
        total=inspection.total, desc="read", unit=inspection.unit, disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        inspection.read(bar.update)
    for line in inspection.lines():
        print(line)
    if vae is not None:
        _draw(options, inspection.source, vae)


if __name__ == "__main__":
    main()
