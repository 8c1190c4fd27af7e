"""Draw images from a checkpoint, a run folder or a DiTPipeline folder.

    python scripts/sample.py --model DiT_XL_2_256 --class-labels "golden retriever" 88
    python scripts/sample.py --model results --vae stabilityai/sd-vae-ft-mse --sampler ddim --num-inference-steps 50

Writes a labelled grid, one PNG per image, and a JSON with everything needed to draw them again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point


@dataclass
class Options:
    """What to draw, and how."""

    model: Annotated[Path, arg(aliases=["--ckpt"])]
    """Checkpoint folder, run folder (its newest whole checkpoint), weights file, or DiTPipeline folder."""
    vae: str | None = None
    """VAE folder or hub name. Default: the pipeline folder's own, or the one that made the training latents."""
    class_labels: tuple[str, ...] = ()
    """Class ids or names. Default: the paper's eight for 1000 classes, else the first eight."""
    output: Path | None = None
    """Folder to write into. Default: outputs/samples, or outputs/samples-2, -3, ... where earlier images are."""
    overwrite: bool = False
    """Replace earlier images in the output."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm uses the learned variance; ddim is deterministic."""
    num_inference_steps: int = 250
    """Steps of the sampler."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance; 1 is none. Default: 4, or 1 for a model that cannot be guided."""
    guidance_channels: int = 3
    """Latent channels that are guided: 3 as the paper's code, 4 as ppdiffusers."""
    guidance_interval: tuple[int, int] | None = None
    """Guide between these timesteps only: LOW HIGH."""
    seed: int = 0
    """Image i of a seed is always the same; 0 to 2**56 - 1."""
    weights: Literal["ema", "model"] = "ema"
    """Averaged or raw weights of a checkpoint."""
    batch_size: int = 32
    """Images drawn together."""


@entry_point
def main() -> None:
    """Draw and write."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    from paddle_dit.generation import SamplingOptions, draw_images, load_generator
    from paddle_dit.pictures import choose_folder, save_images

    sampling = SamplingOptions(
        options.sampler,
        options.num_inference_steps,
        options.guidance_scale,
        options.guidance_channels,
        options.guidance_interval,
        options.seed,
    )
    folder = choose_folder(options.output, options.overwrite)
    source = load_generator(options.model, options.vae, options.weights)
    sampling = sampling.for_model(source.info.config)
    labels = source.resolve(options.class_labels) if options.class_labels else source.default_labels()
    images = draw_images(source, labels, sampling, batch_size=options.batch_size)
    captions = [source.name_of(label) for label in labels]
    chosen = {"model": str(options.model), "vae": options.vae, "weights": options.weights, "class_labels": labels}
    print(f"wrote {save_images(folder, images, captions, {**chosen, **sampling.to_dict()})}")


if __name__ == "__main__":
    main()
