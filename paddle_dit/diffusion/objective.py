"""The training objective: noise prediction with a learned variance (Nichol and Dhariwal 2021, as DiT trains)."""

import math

import numpy as np
import paddle

from paddle_dit.diffusion.schedule import Schedule


class GaussianDiffusion:
    """Losses of a model on the noising process of ``schedule``, computed in float32.

    Timesteps and noise are arguments, so that training is deterministic and can be resumed and tested.
    """

    def __init__(self, schedule: Schedule | None = None):
        self.schedule = schedule or Schedule.linear()
        cumprod = self.schedule.alphas_cumprod
        tables = {
            "signal": np.sqrt(cumprod),
            "noise": np.sqrt(1.0 - cumprod),
            "x0_from_x": np.sqrt(1.0 / cumprod),
            "x0_from_eps": np.sqrt(1.0 / cumprod - 1.0),
            "mean_from_x0": self.schedule.posterior_mean_coef1,
            "mean_from_x": self.schedule.posterior_mean_coef2,
            "min_log_variance": self.schedule.posterior_log_variance_clipped,
            "max_log_variance": np.log(self.schedule.betas),
        }
        self._tables = {name: paddle.to_tensor(table.astype(np.float32)) for name, table in tables.items()}

    def _at(self, name: str, timesteps, like):
        values = paddle.gather(self._tables[name], timesteps)
        return values.reshape([-1, 1, 1, 1]).expand_as(like)

    def add_noise(self, x0, timesteps, noise):
        """Return ``x_t`` for clean latents ``x0 [N, C, H, W]`` at int64 ``timesteps [N]`` (DDPM, equation 4)."""
        return self._at("signal", timesteps, x0) * x0 + self._at("noise", timesteps, x0) * noise

    def training_losses(self, model, x0, class_labels, timesteps, noise) -> dict:
        """Return the loss of each sample.

        Args:
            model: called as ``model(x_t, timesteps, class_labels)``.
            x0: clean latents, float32 ``[N, C, H, W]``.
            class_labels: int64 ``[N]``, already dropped out where the step wants so.
            timesteps: int64 ``[N]``, indices into the schedule.
            noise: float32, like ``x0``.

        Returns:
            ``loss [N]``, and its parts: ``mse [N]``, the mean squared error of the noise, and, where the model
            predicts a variance, ``vb [N]``, the variational bound in bits per dimension, whose gradient reaches the
            variance alone (the mean is detached; Nichol and Dhariwal 2021, section 3.1).
        """
        channels = x0.shape[1]
        x_t = self.add_noise(x0, timesteps, noise)
        out = model(x_t, timesteps, class_labels).astype("float32")
        eps = out[:, :channels]
        mse = _mean((noise - eps) ** 2)
        if out.shape[1] == channels:
            return {"loss": mse, "mse": mse}
        vb = self._variational_bound(x0, x_t, timesteps, eps.detach(), out[:, channels:])
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(self, x0, x_t, timesteps, eps, variance):
        """Return one term of the bound in bits per dimension: a KL divergence, or the likelihood at timestep 0."""
        low = self._at("min_log_variance", timesteps, x0)
        high = self._at("max_log_variance", timesteps, x0)
        log_variance = low + 0.5 * (variance + 1.0) * (high - low)
        from_x0, from_x = self._at("mean_from_x0", timesteps, x0), self._at("mean_from_x", timesteps, x0)
        predicted_x0 = self._at("x0_from_x", timesteps, x0) * x_t - self._at("x0_from_eps", timesteps, x0) * eps
        mean = from_x0 * predicted_x0 + from_x * x_t
        true_mean = from_x0 * x0 + from_x * x_t
        divergence = 0.5 * (
            -1.0
            + log_variance
            - low
            + paddle.exp(low - log_variance)
            + (true_mean - mean) ** 2 * paddle.exp(-log_variance)
        )
        likelihood = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        bound = paddle.where(timesteps == 0, _mean(likelihood), _mean(divergence))
        return bound / math.log(2.0)


def discretized_gaussian_log_likelihood(x, mean, log_deviation):
    """Return the log probability, in nats, of the 8-bit bin around ``x`` in [-1, 1] under a Gaussian (DDPM, eq. 13)."""
    centered, inverse = x - mean, paddle.exp(-log_deviation)
    upper = _normal_cdf(inverse * (centered + 1.0 / 255.0))
    lower = _normal_cdf(inverse * (centered - 1.0 / 255.0))
    floor = paddle.full_like(x, 1e-12)
    inside = paddle.log(paddle.maximum(upper - lower, floor))
    below = paddle.log(paddle.maximum(upper, floor))
    above = paddle.log(paddle.maximum(1.0 - lower, floor))
    return paddle.where(x < -0.999, below, paddle.where(x > 0.999, above, inside))


def _normal_cdf(x):
    """Approximate the standard normal distribution function by a tanh, as the reference does."""
    return 0.5 * (1.0 + paddle.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _mean(x):
    return x.reshape([x.shape[0], -1]).mean(axis=1)
