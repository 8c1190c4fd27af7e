"""Classifier-free guidance (Ho and Salimans 2022): from a model to the ``denoise`` callable of the samplers."""

import paddle

from paddle_dit.diffusion.options import check_guidance


def guided(
    model,
    class_labels,
    *,
    guidance_scale: float = 1.0,
    guidance_channels: int = 3,
    guidance_interval: tuple[int, int] | None = None,
):
    """Return ``denoise(x, timesteps) -> (eps, variance or None)`` for fixed labels.

    Args:
        model: a :class:`~paddle_dit.models.dit.DiT` in evaluation mode.
        class_labels: int64 ``[N]``.
        guidance_scale: 1 is no guidance; above, the conditional prediction is pushed away from the unconditional one.
        guidance_channels: how many of the latent channels are guided: 3 is what the paper's code does (and its
            figures rest on), all 4 is what diffusers and ppdiffusers do. The rest keep the conditional prediction.
        guidance_interval: ``(low, high)``: guide at timesteps ``low <= t < high`` only and compute just the
            conditional half elsewhere (Kynkäänniemi et al. 2024). None guides everywhere.

    Raises:
        ConfigError: a scale below 1, an empty interval, or guidance that the model cannot have; see
            :func:`~paddle_dit.diffusion.options.can_guide`.
    """
    config = model.config
    check_guidance(config, guidance_scale, guidance_channels, guidance_interval)
    channels = config.in_channels
    null_labels = paddle.full_like(class_labels, config.null_class)

    def denoise(x, timesteps):
        low, high = guidance_interval or (0, float("inf"))
        if guidance_scale == 1.0 or not low <= int(timesteps[0]) < high:
            return _split(model(x, timesteps, class_labels), channels)
        labels = paddle.concat([class_labels, null_labels])
        out = model(paddle.concat([x, x]), paddle.concat([timesteps, timesteps]), labels)
        (eps, variance), (null_eps, _) = (_split(half, channels) for half in out.chunk(2, axis=0))
        guided_eps, kept = eps[:, :guidance_channels], eps[:, guidance_channels:]
        null_eps = null_eps[:, :guidance_channels]
        return paddle.concat([null_eps + guidance_scale * (guided_eps - null_eps), kept], axis=1), variance

    return denoise


def _split(out, channels: int):
    return out[:, :channels], (out[:, channels:] if out.shape[1] > channels else None)
