"""What a model gives for fixed inputs, in float32 and by the code that draws without an engine."""

import numpy as np
import paddle

from paddle_dit.deploy.parity import CHANNELS, COEFFICIENTS, SCALE, TIMESTEPS, modes, probe_coefficients, sample_options
from paddle_dit.deploy.specs import tile_shape
from paddle_dit.diffusion.guidance import guided
from paddle_dit.generation import Generator, generate_latents
from paddle_dit.models.vae import decode


@paddle.no_grad()
def make_reference(source: Generator, max_batch_size: int) -> dict[str, np.ndarray]:
    """Return fixed inputs and what a model and its VAE make of them.

    Args:
        source: model and VAE in evaluation mode.
        max_batch_size: images of the largest step.

    Returns:
        ``x, previous_x0, noise [B, C, H, W]``, ``labels [B]`` and, for every kind of step and timestep,
        ``<mode>/<timestep>/x0`` and ``/next_x``; ``latents`` and their ``pixels`` for the decoder; ``sample_latents``
        and ``sample_image`` of one image drawn whole.
    """
    config, random = source.info.config, np.random.default_rng(0)
    shape = (max_batch_size, *config.sample_shape)
    arrays = {name: random.standard_normal(shape, np.float32) for name in ("x", "previous_x0", "noise")}
    arrays["labels"] = np.arange(max_batch_size) % max(1, config.num_classes)
    for mode in modes(config):
        for timestep in TIMESTEPS:
            outputs = _step(source.model, arrays, mode, timestep)
            arrays |= {f"{mode}/{timestep}/{name}": value for name, value in outputs.items()}
    drawn = generate_latents(source.model, arrays["labels"][:1], sample_options(config))
    arrays |= {"sample_latents": drawn, "sample_image": decode(source.vae, drawn)}
    height, width = tile_shape(config)
    latents = np.concatenate([drawn / np.float32(source.vae.config.scaling_factor), arrays["x"][:1]])
    arrays["latents"] = np.ascontiguousarray(latents[:max_batch_size, :, :height, :width])
    arrays["pixels"] = source.vae.decode(paddle.to_tensor(arrays["latents"])).sample.numpy()
    return arrays


def _step(model, arrays: dict[str, np.ndarray], mode: str, timestep: int) -> dict[str, np.ndarray]:
    """Return the results of one step, with the update computed in NumPy."""
    config = model.config
    scale, channels = (SCALE if mode == "guided" else 1.0), min(CHANNELS, config.in_channels)
    denoise = guided(model, paddle.to_tensor(arrays["labels"]), guidance_scale=scale, guidance_channels=channels)
    x = paddle.to_tensor(arrays["x"])
    eps, variance = denoise(x, paddle.full([len(x)], timestep, dtype="int64"))
    weights = dict(zip(COEFFICIENTS, probe_coefficients(config), strict=True))
    deviation = weights["sigma"]
    if variance is not None:
        low, high = weights["min_log_variance"], weights["max_log_variance"]
        deviation = deviation + np.exp(0.5 * (low + 0.5 * (variance.numpy() + 1) * (high - low)))
    eps = eps.numpy()
    terms = (
        weights["on_x"] * arrays["x"],
        weights["on_eps"] * eps,
        weights["on_previous_x0"] * arrays["previous_x0"],
        deviation * arrays["noise"],
    )
    x0 = weights["x0_on_x"] * arrays["x"] + weights["x0_on_eps"] * eps
    return {"x0": x0, "next_x": sum(terms)}
