"""The rows of latency_ladder.py that are others': the DiTPipeline of ppdiffusers, and of diffusers in PyTorch.

    python benchmarks/ladder_peers.py diffusers job.json

The pipelines run whole and unchanged but for two things: the noise that they start from is handed in, so that every row
draws the same latents, and the call of their VAE is where the loop's time ends and the decoder's begins.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ladder_rows import Job
from turns import serve

from paddle_dit import runtime
from paddle_dit.config import ModelInfo
from paddle_dit.conversion import exact_frequencies
from paddle_dit.conversion.formats import OWN_INFO
from paddle_dit.randomness import ImageNoise

PIPELINE, TRANSFORMER, VAE = "pipeline", "diffusers", "diffusers_vae"  # in the job's folder


def load_ppdiffusers(folder: Path, device: str):
    """Return the pipeline, and what makes a tensor of an array."""
    import paddle
    from ppdiffusers import DiTPipeline

    if device != "cpu":
        runtime.choose_device()
    return DiTPipeline.from_pretrained(str(folder / PIPELINE)), paddle.to_tensor


def load_diffusers(folder: Path, device: str):
    """Return the pipeline, and what makes a tensor of an array."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    parts = {
        "transformer": DiTTransformer2DModel.from_pretrained(folder / TRANSFORMER),
        "vae": AutoencoderKL.from_pretrained(folder / VAE),
        "scheduler": DDIMScheduler.from_pretrained(folder / PIPELINE / "scheduler"),
    }
    place = device.replace("gpu", "cuda")
    return DiTPipeline(**parts).to(place), lambda array: torch.from_numpy(array).to(place)


def build(name: str, job: Job) -> tuple[Callable[..., dict], dict]:
    """Return what :func:`turns.serve` wants."""
    folder = Path(job.folder)
    pipe, as_tensor = (load_diffusers if name == "diffusers" else load_ppdiffusers)(folder, job.device)
    pipe.set_progress_bar_config(disable=True)
    config = ModelInfo.load(folder / PIPELINE / OWN_INFO).config
    if config.frequency_shift == 0:
        exact_frequencies(pipe)
    module, decode, seen = sys.modules[type(pipe).__module__], pipe.vae.decode, SimpleNamespace()

    def seen_decode(latents, *arguments, **named):
        seen.latents = latents.cpu().numpy() * np.float32(pipe.vae.config.scaling_factor)
        seen.drawn = time.perf_counter()
        return decode(latents, *arguments, **named)

    pipe.vae.decode = seen_decode

    def answer(batch_size: int, save: str | None = None) -> dict:
        noise = as_tensor(ImageNoise(job.sampling["seed"], np.arange(batch_size), config.sample_shape)())
        module.randn_tensor = lambda *arguments, **named: noise
        scale, steps = job.sampling["guidance_scale"], job.sampling["num_inference_steps"]
        started = time.perf_counter()
        images = pipe(job.labels[:batch_size], scale, num_inference_steps=steps, output_type="np").images
        ended = time.perf_counter()
        if save is not None:
            np.savez(save, latents=seen.latents, pixels=np.round(255 * images).astype(np.uint8))
        seconds = {"loop": seen.drawn - started, "decoder": ended - seen.drawn}
        return {**seconds, "mebibytes": runtime.peak_rss() / 2**20}

    return answer, {}


if __name__ == "__main__":
    if sys.argv[1] == "ppdiffusers-settings":
        runtime.prepare()
    serve(lambda: build(sys.argv[1], Job.load(sys.argv[2])))
