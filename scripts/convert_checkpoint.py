"""Turn a model of any known format into another, exactly and verified; what SRC is, is recognised by its content.

    python scripts/convert_checkpoint.py DiT-XL-2-256x256.pt DiT-XL-2-256
    python scripts/convert_checkpoint.py results/000-DiT-XL-2/checkpoints/0400000.pt mine --weights model
    python scripts/convert_checkpoint.py results DiT-XL-2-256.safetensors --to facebook
    python scripts/convert_checkpoint.py facebook-DiT-XL-2-256 DiT_XL_2_256 --to ppdiffusers --frequency-shift 0
    python scripts/convert_checkpoint.py sd-vae-ft-mse.ckpt sd-vae

SRC is a file or folder of this project, of the paper's code (facebook/DiT), fast-DiT, PaddleMIX, diffusers or
ppdiffusers; or the VAE of Stable Diffusion, as diffusers or CompVis have it. No PyTorch is needed, and pickles are read
without running what they say. DST appears whole, after its numbers have been read back and compared bit for bit; where
another implementation of the format runs here, outputs are compared too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.config import Weights
from paddle_dit.errors import entry_point


@dataclass
class Options:
    """What to convert, and into what."""

    src: Positional[Path]
    """Model or VAE: a weights file, a checkpoint, a run, or a folder of diffusers or ppdiffusers."""
    dst: Positional[Path]
    """What to make; it must not exist. A folder; for facebook a file, .safetensors or (where PyTorch is there) .pt."""
    to: Literal["paddle_dit", "facebook", "diffusers", "ppdiffusers"] | None = None
    """paddle_dit: for sample.py and train.py. facebook: a state dict for the paper's code and fast-DiT. diffusers: a
    folder for DiTTransformer2DModel. ppdiffusers: a whole DiTPipeline. Default: paddle_dit; for a VAE ppdiffusers."""
    weights: Weights = "ema"
    """Averaged or raw weights, where a checkpoint has both."""
    num_heads: int | None = None
    """Attention heads. Tensors do not show them; a configuration or a preset's width usually does."""
    sample_size: int | None = None
    """Side of the latents (32 for 256 pixels), where neither a position table nor a configuration tells it."""
    frequency_shift: int | None = None
    """Timestep frequencies: 0 as the paper's code, 1 as diffusers. Default: what the format's own program computes;
    weights of the paper's code that were published as a diffusers folder are exact with 0."""
    drop_trained_positions: bool = False
    """Take the fixed position table in the place of a trained one (PaddleMIX trains it); that changes the model."""
    vae: str | None = None
    """VAE of a DiTPipeline: folder, file or hub name. Default: the source's own, else stabilityai/sd-vae-ft-mse."""
    id2label: Path | None = None
    """JSON file, class id -> name. Default: the source's names, else ImageNet's for 1000 classes."""
    verify: bool = True
    """Build models and compare outputs. --no-verify skips that; numbers are read back and compared in any case."""


@entry_point
def main() -> None:
    """Convert and report."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    from paddle_dit.conversion.architecture import Hints
    from paddle_dit.conversion.convert import Request, convert

    hints = Hints(options.num_heads, options.sample_size, options.frequency_shift, options.drop_trained_positions)
    where = (options.src, options.dst, options.to, options.weights)
    rows = convert(Request(*where, hints, options.vae, options.id2label, options.verify))
    for name, text in rows:
        print(f"{name:<13} {text}")


if __name__ == "__main__":
    main()
