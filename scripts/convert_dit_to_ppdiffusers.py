"""Turn a checkpoint into a folder for ppdiffusers' DiTPipeline, and check that it computes the same.

    python scripts/convert_dit_to_ppdiffusers.py --checkpoint results --vae stabilityai/sd-vae-ft-mse --output DiT_XL_2

The folder appears only after it was loaded with the stock classes and its outputs agreed with the checkpoint's to 1e-5.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.config import Weights
from paddle_dit.errors import entry_point


@dataclass
class Options:
    """What to convert, and into what."""

    checkpoint: Path
    """Checkpoint, run folder (its newest whole checkpoint), or a weights file of ours with config.json beside it."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """VAE that decodes the latents: a folder or a hub name."""
    scheduler: Literal["ddim", "dpm-solver", "ddpm"] = "ddim"
    """Sampler that the pipeline starts with; it can be changed after loading."""
    output: Path = Path("DiT_XL_2_256")
    """Folder to make."""
    weights: Weights = "ema"
    """Averaged or raw weights of a checkpoint."""
    id2label: Path | None = None
    """JSON file, class id -> name. Default: the checkpoint's names, else ImageNet's for 1000 classes, else numbers."""
    format: Literal["safetensors", "pdparams"] = "safetensors"
    """Format of the weights; pdparams writes Paddle's model_state.pdparams."""
    overwrite: bool = False
    """Replace the output if it is a DiTPipeline folder."""


def usage(output: Path, id2label: dict[int, str], can_guide: bool) -> str:
    """Return three lines of Python that draw an image with the folder."""
    name = next(iter(id2label.values()), "").split(",")[0]
    guidance = "" if can_guide else ", guidance_scale=1"
    labels = f"pipe.get_label_ids([{json.dumps(name, ensure_ascii=False)}])" if name else "[0]"
    return (
        "    from ppdiffusers import DiTPipeline\n"
        f"    pipe = DiTPipeline.from_pretrained({json.dumps(str(output))})\n"
        f'    pipe({labels}, num_inference_steps=25{guidance}).images[0].save("image.png")'
    )


@entry_point
def main() -> None:
    """Read, convert, verify, report."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    from paddle_dit.conversion.loading import class_names, read_weights
    from paddle_dit.conversion.ppdiffusers_pipeline import check_output, write_pipeline
    from paddle_dit.data.labels import read_label_names
    from paddle_dit.models.vae import load_vae

    check_output(options.output, options.overwrite)
    tensors, info = read_weights(options.checkpoint, options.weights)
    names = options.id2label
    id2label = read_label_names(names, info.config.num_classes) if names else class_names(info)
    import paddle

    paddle.set_device("cpu")  # outputs are compared to 1e-5, and a GPU may round its products to TF32
    report = write_pipeline(
        tensors,
        info,
        load_vae(options.vae),
        options.output,
        id2label=id2label,
        scheduler=options.scheduler,
        weights_format=options.format,
        overwrite=options.overwrite,
    )
    for note in report.notes:
        print(f"note: {note}")
    print(f"the stock pipeline's transformer agrees to {report.max_error:.1e} (largest output {report.largest:.3g})")
    print(f"DiTPipeline folder: {report.folder}\nUse it:\n{usage(report.folder, id2label, report.can_guide)}")


if __name__ == "__main__":
    main()
