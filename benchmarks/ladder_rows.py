"""The rows of latency_ladder.py that are ours, and the process of each.

    python benchmarks/ladder_rows.py cached job.json

A row is a way to draw the same latents. Each step of the ladder names the row that it starts from.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from turns import serve

from paddle_dit import runtime
from paddle_dit.deploy.specs import CACHED_STEP, CONDITIONING, DECODER, MODEL, STEP
from paddle_dit.diffusion.options import SamplingOptions


@dataclass(frozen=True)
class Row:
    """A way to draw.

    Attributes:
        title: in the table.
        after: the row that this one is a step away from.
        peer: another library's pipeline.
        engine: a folder of scripts/export_inference.py is what runs; else programs in memory.
        backend: what runs the programs, or the engine.
        programs: in memory; none is the model as generation.py draws with it.
        decoder: backend of the decoder where the programs have none; None is the VAE as it is.
        precision: of the engine.
        on_gpu: only there.
        cuda_graph: the step is replayed as one.
        interval: guided at some timesteps alone, so that other latents are drawn.
    """

    title: str
    after: str | None = None
    peer: bool = False
    engine: bool = False
    backend: str = "dygraph"
    programs: tuple[str, ...] = ()
    decoder: str | None = None
    precision: str = "fp32"
    on_gpu: bool = False
    cuda_graph: bool = False
    interval: bool = False

    @property
    def exact(self) -> bool:
        """Whether its latents must be those of every other such row."""
        return self.precision == "fp32" and not self.interval

    @property
    def engine_backend(self) -> str | None:
        """Backend of the engine that it needs, if any."""
        return self.backend if self.engine else self.decoder

    def engine_folder(self) -> str:
        """Return the name of that engine's folder."""
        return "-".join(["engine", self.engine_backend, self.precision, *(["graph"] if self.cuda_graph else [])])


_ENGINE = {"engine": True}
_GPU = {"engine": True, "on_gpu": True}
ROWS = {
    "ppdiffusers": Row("ppdiffusers DiTPipeline, as users run it", peer=True),
    "ppdiffusers-settings": Row("ppdiffusers DiTPipeline, our process settings", "ppdiffusers", peer=True),
    "diffusers": Row("diffusers DiTPipeline (PyTorch)", "ppdiffusers", peer=True),
    "dygraph": Row("ours: dygraph", "ppdiffusers-settings"),
    "static": Row("static", "dygraph", backend="static", programs=(MODEL,)),
    "fused": Row("+ fused step", "static", backend="static", programs=(STEP,)),
    "cached": Row("+ cached conditioning", "fused", backend="static", programs=(CONDITIONING, CACHED_STEP)),
    "decoder": Row(
        "+ engine decoder", "cached", backend="static", programs=(CONDITIONING, CACHED_STEP), decoder="onnxruntime"
    ),
    "paddle": Row("Paddle Inference", "cached", backend="paddle", **_ENGINE),
    "onnxruntime": Row("ONNX Runtime", "cached", backend="onnxruntime", **_ENGINE),
    "interval": Row("ONNX Runtime, guidance interval", "onnxruntime", backend="onnxruntime", interval=True, **_ENGINE),
    "fp16": Row("Paddle Inference fp16", "paddle", backend="paddle", precision="fp16", **_GPU),
    "bf16": Row("Paddle Inference bf16", "paddle", backend="paddle", precision="bf16", **_GPU),
    "tensorrt": Row("TensorRT", "paddle", backend="paddle-tensorrt", **_GPU),
    "tensorrt-fp16": Row("TensorRT fp16", "tensorrt", backend="paddle-tensorrt", precision="fp16", **_GPU),
    "onnxruntime-tensorrt": Row("ONNX Runtime TensorRT", "onnxruntime", backend="onnxruntime-tensorrt", **_GPU),
    "onnxruntime-tensorrt-fp16": Row(
        "ONNX Runtime TensorRT fp16",
        "onnxruntime-tensorrt",
        backend="onnxruntime-tensorrt",
        precision="fp16",
        **_GPU,
    ),
    "cuda-graph": Row(
        "+ CUDA graph",
        "onnxruntime-tensorrt-fp16",
        backend="onnxruntime-tensorrt",
        precision="fp16",
        cuda_graph=True,
        **_GPU,
    ),
}


@dataclass(frozen=True)
class Job:
    """What every row's process is told.

    Attributes:
        folder: in which the files of peers and engines are.
        source: the model, as ``load_generator`` takes it.
        vae: its VAE, or None for its own.
        sampling: fields of ``SamplingOptions``; the guidance scale is a number.
        interval: of guidance, in the rows that have one.
        labels: one for each image of the largest batch.
        device: "cpu" or "gpu:0".
        threads: of the CPU.
    """

    folder: str
    source: str
    vae: str | None
    sampling: dict
    interval: tuple[int, int]
    labels: list[int]
    device: str
    threads: int

    @classmethod
    def load(cls, path: str) -> "Job":
        """Read a file of :func:`json.dump`."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def drawing(row: Row, job: Job) -> tuple[Callable, Callable]:
    """Return what draws latents for labels, and what decodes them. Paddle is imported where the row needs it alone."""
    from paddle_dit.deploy.backends import Settings, find_backend
    from paddle_dit.deploy.engine import PROGRAMS
    from paddle_dit.deploy.pipeline import InferencePipeline

    options = SamplingOptions(**job.sampling, guidance_interval=tuple(job.interval) if row.interval else None)
    engine = Path(job.folder) / row.engine_folder() if row.engine_backend else None

    def by_pipeline(pipeline: InferencePipeline) -> Callable:
        return lambda labels: pipeline.draw_latents(labels, options, batch_size=len(labels))

    if row.engine:
        pipeline = InferencePipeline.from_pretrained(engine, threads=job.threads)
        return by_pipeline(pipeline), pipeline.decode

    from paddle_dit.deploy.export import build_pipeline
    from paddle_dit.deploy.predictor import as_predictor
    from paddle_dit.generation import generate_latents, load_generator
    from paddle_dit.models.vae import decode

    if job.device != "cpu":
        runtime.choose_device()
    source = load_generator(job.source, job.vae)
    settings = Settings(max_batch_size=len(job.labels), devices=(job.device,), threads=job.threads)
    pipeline = build_pipeline(source, row.backend, row.programs, settings)
    draw = by_pipeline(pipeline)
    if not row.programs or MODEL in row.programs:
        model = as_predictor(pipeline.programs[MODEL], source.info.config) if row.programs else source.model
        draw = lambda labels: generate_latents(model, labels, options, batch_size=len(labels))  # noqa: E731
    if row.decoder is None:
        return draw, lambda latents: decode(source.vae, latents, batch_size=len(latents))
    from paddle_dit.deploy.specs import program_specs

    spec = program_specs(source.info.config, len(job.labels))[DECODER]
    program = find_backend(row.decoder).open(spec, engine / PROGRAMS, DECODER, settings)
    return draw, InferencePipeline(pipeline.info, {DECODER: program}).decode


def build(row: Row, job: Job) -> tuple[Callable[..., dict], dict]:
    """Return what :func:`turns.serve` wants."""
    draw, decode = drawing(row, job)

    def answer(batch_size: int, save: str | None = None) -> dict:
        started = time.perf_counter()
        latents = draw(job.labels[:batch_size])
        drawn = time.perf_counter()
        pixels = decode(latents)
        ended = time.perf_counter()
        if save is not None:
            np.savez(save, latents=latents, pixels=pixels)
        return {"loop": drawn - started, "decoder": ended - drawn, "mebibytes": runtime.peak_rss() / 2**20}

    return answer, {}


if __name__ == "__main__":
    runtime.prepare()
    serve(lambda: build(ROWS[sys.argv[1]], Job.load(sys.argv[2])))
