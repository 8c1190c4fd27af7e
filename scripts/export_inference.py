"""Export a DiTPipeline folder or a checkpoint as an engine that draws fast, proven equal before its folder appears.

    python scripts/export_inference.py --pipeline DiT_XL_2_256 --output deploy/DiT_XL_2_256 --backend onnxruntime
    python scripts/export_inference.py --pipeline results --output deploy/mine --backend paddle --max-batch-size 16

Step program, decoder and a whole sample are compared with the model in float32; the figures stay in deploy.json.
"""

from dataclasses import dataclass
from pathlib import Path

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.config import Dtype, Weights
from paddle_dit.deploy.backends import ExportBackend, Settings, find_backend
from paddle_dit.deploy.engine import check_output
from paddle_dit.errors import entry_point


@dataclass
class Options:
    """What to export, and for what."""

    pipeline: Path
    """DiTPipeline folder, checkpoint, run folder or weights file."""
    output: Path
    """Folder to make."""
    backend: ExportBackend = "onnxruntime"
    """What runs the engine. The two of TensorRT need a GPU, where they have not been run yet."""
    precision: Dtype = "fp32"
    """Of the engine. On the CPU fp32 is the fastest."""
    max_batch_size: int = 8
    """Images drawn together at most; more are drawn in parts."""
    vae: str | None = None
    """VAE folder or hub name. Default: the pipeline's own, or the one that made the training latents."""
    weights: Weights = "ema"
    """Averaged or raw weights of a checkpoint."""
    device: str | None = None
    """cpu, or gpu:0 and so on, which has not been run yet. Default: gpu:0 for TensorRT, else cpu."""
    cuda_graph: bool = False
    """Let the GPU replay the step as one graph."""


@entry_point
def main() -> None:
    """Load, export, report."""
    options = parse(Options, description=__doc__)
    runtime.prepare()
    device = options.device or ("gpu:0" if options.backend.endswith("tensorrt") else "cpu")
    settings = Settings(options.precision, options.max_batch_size, (device,), options.cuda_graph)
    check_output(options.output)
    find_backend(options.backend).check(settings)
    from paddle_dit.deploy.export import export
    from paddle_dit.generation import load_generator

    source = load_generator(options.pipeline, options.vae, options.weights)
    info = export(source, str(options.pipeline), options.output, options.backend, settings, report=print)
    print(f"{len(info.parity)} comparisons with the model are within their limits")
    print(f"engine: {options.output} ({info.backend}, {info.precision})")
    print(f"use it: python scripts/infer.py --model {options.output}")


if __name__ == "__main__":
    main()
