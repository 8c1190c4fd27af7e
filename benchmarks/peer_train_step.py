"""PyTorch's side of train_step.py: diffusers' DiTTransformer2DModel with the same loss, AdamW and EMA.

Runs in a process of its own, so that the two frameworks share neither threads nor memory, and answers over a pipe:

    python benchmarks/peer_train_step.py DiT-S/4 16
"""

import math
import sys
import time
from collections.abc import Callable

import numpy as np
from turns import serve

from paddle_dit.config import DiTConfig
from paddle_dit.diffusion.schedule import Schedule
from paddle_dit.runtime import peak_rss


def timed(step: Callable[[], None]) -> Callable[[], dict]:
    """Return a function that makes a step and tells its seconds, and the peak memory of this process so far."""

    def answer() -> dict:
        start = time.perf_counter()
        step()
        return {"seconds": time.perf_counter() - start, "mebibytes": peak_rss() / 2**20}

    return answer


def hybrid_loss(torch, tables: dict, x0, timesteps, noise, predict):
    """Return the mean of noise MSE and variational bound, as ``GaussianDiffusion.training_losses`` defines them."""
    at = {name: table[timesteps].reshape(-1, 1, 1, 1) for name, table in tables.items()}
    x_t = at["signal"] * x0 + at["noise"] * noise
    predicted, variance = predict(x_t).chunk(2, dim=1)
    log_variance = at["low"] + 0.5 * (variance + 1.0) * (at["high"] - at["low"])
    predicted_x0 = at["x0_from_x"] * x_t - at["x0_from_eps"] * predicted.detach()
    offset = at["mean_from_x0"] * (x0 - predicted_x0)  # the x_t terms of the two means cancel
    divergence = 0.5 * (-1.0 + log_variance - at["low"] + torch.exp(at["low"] - log_variance))
    divergence = divergence + 0.5 * offset**2 * torch.exp(-log_variance)
    centered = x0 - at["mean_from_x0"] * predicted_x0 - at["mean_from_x"] * x_t

    def normal_cdf(x):
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    inverse = torch.exp(-0.5 * log_variance)
    upper, lower = normal_cdf(inverse * (centered + 1.0 / 255.0)), normal_cdf(inverse * (centered - 1.0 / 255.0))
    inside = (upper - lower).clamp(min=1e-12).log()
    below, above = upper.clamp(min=1e-12).log(), (1.0 - lower).clamp(min=1e-12).log()
    likelihood = -torch.where(x0 < -0.999, below, torch.where(x0 > 0.999, above, inside))
    bound = torch.where(timesteps == 0, likelihood.flatten(1).mean(1), divergence.flatten(1).mean(1))
    return ((noise - predicted) ** 2).mean() + bound.mean() / math.log(2.0)


def build(name: str, batch_size: int) -> tuple[Callable[[], dict], dict]:
    """Return what :func:`turns.serve` wants."""
    import torch
    from diffusers import DiTTransformer2DModel

    config = DiTConfig.from_preset(name)
    shape = {"num_attention_heads": config.num_heads, "attention_head_dim": config.hidden_size // config.num_heads}
    shape |= {"num_layers": config.depth, "patch_size": config.patch_size, "sample_size": config.sample_size}
    shape |= {"in_channels": config.in_channels, "out_channels": config.out_channels}
    model = DiTTransformer2DModel(**shape, num_embeds_ada_norm=config.num_classes, norm_eps=config.norm_eps).train()
    weights = list(model.parameters())
    # The fastest AdamW and EMA that PyTorch has on the CPU.
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    shadow = [weight.detach().clone() for weight in weights]
    schedule = Schedule.linear()
    cumprod = schedule.alphas_cumprod
    tables = {"signal": np.sqrt(cumprod), "noise": np.sqrt(1.0 - cumprod)}
    tables |= {"x0_from_x": np.sqrt(1.0 / cumprod), "x0_from_eps": np.sqrt(1.0 / cumprod - 1.0)}
    tables |= {"mean_from_x0": schedule.posterior_mean_coef1, "mean_from_x": schedule.posterior_mean_coef2}
    tables |= {"low": schedule.posterior_log_variance_clipped, "high": np.log(schedule.betas)}
    tables = {key: torch.tensor(table, dtype=torch.float32) for key, table in tables.items()}
    labels = torch.arange(batch_size) % config.num_classes
    x0 = torch.randn(batch_size, *config.sample_shape)

    def step() -> None:
        timesteps, noise = torch.randint(1000, (batch_size,)), torch.randn_like(x0)
        loss = hybrid_loss(torch, tables, x0, timesteps, noise, lambda x_t: model(x_t, timesteps, labels).sample)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(shadow, weights, 1e-4)

    return timed(step), {"parameters": sum(weight.numel() for weight in weights)}


if __name__ == "__main__":
    serve(lambda: build(sys.argv[1], int(sys.argv[2])))
