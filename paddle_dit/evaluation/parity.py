"""Compare this implementation with arrays that the paper's code produced.

The arrays lie in one ``.npz``: a configuration, weights under the reference's names, and groups of inputs and outputs
(forward, cfg, schedule, respacing, loss, grad_norm, train, and one group per sampler such as ``ddpm250``). Any group
may be absent, and any model size may be used.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from paddle_dit.checkpoint import load_weights
from paddle_dit.conversion.facebook import config_from_facebook, from_facebook
from paddle_dit.diffusion.guidance import guided
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.diffusion.samplers import ddim, ddpm
from paddle_dit.diffusion.schedule import Schedule
from paddle_dit.errors import DataError
from paddle_dit.models.dit import DiT
from paddle_dit.training.ema import ExponentialMovingAverage

PAPER_GUIDANCE_CHANNELS = 3


@dataclass(frozen=True)
class Row:
    """One compared array: its largest error, how that is measured, and the tolerance."""

    name: str
    error: float
    tolerance: float
    measure: str

    @property
    def passes(self) -> bool:
        """Whether the error is finite and within the tolerance."""
        return bool(self.error <= self.tolerance)


def absolute(name: str, ours, reference, tolerance: float) -> Row:
    """Compare by the largest absolute difference."""
    return Row(name, _largest(ours, reference), tolerance, "absolute")


def relative(name: str, ours, reference, tolerance: float) -> Row:
    """Compare by the largest difference over the reference's largest value."""
    scale = float(np.max(np.abs(reference))) or 1.0
    return Row(name, _largest(ours, reference) / scale, tolerance, "relative")


def _largest(ours, reference) -> float:
    ours, reference = np.asarray(ours, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if ours.shape != reference.shape:
        return float("inf")
    difference = np.abs(ours - reference)
    return float(np.max(difference)) if np.isfinite(difference).all() else float("inf")


class Reference:
    """The arrays of one file and models built from its configuration and weights."""

    def __init__(self, path: str | Path):
        self.arrays = _read_arrays(Path(path))
        try:
            self.config = config_from_facebook(json.loads(str(self.arrays["config"])))
        except (KeyError, ValueError) as error:
            raise DataError(f"{path} has no usable 'config' entry: {error}") from None
        self.path = path

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def tensor(self, key: str) -> paddle.Tensor:
        """Return an array as a tensor."""
        return paddle.to_tensor(self.arrays[key])

    def has(self, group: str) -> bool:
        """Whether any array of the group is there."""
        return any(key.startswith(f"{group}/") for key in self.arrays)

    def names(self, prefix: str) -> list[str]:
        """Return what follows ``prefix`` in the keys that start with it."""
        return [key[len(prefix) :] for key in self.arrays if key.startswith(prefix)]

    def model(self) -> DiT:
        """Build the model with the file's weights, in evaluation mode."""
        model = DiT(self.config)
        weights = {name: self.arrays[f"weights/{name}"] for name in self.names("weights/")}
        load_weights(model, from_facebook(weights), str(self.path))
        model.eval()
        return model


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # zip and npy damage surface as many types
        raise DataError(f"{path} is no .npz of plain arrays: {error}") from None


def compare(path: str | Path) -> Iterator[Row]:
    """Yield a row for each array of the file that this implementation can compute."""
    reference = Reference(path)
    checks: dict[str, Callable[[Reference], Iterator[Row]]] = {
        "weights": _position_table,
        "forward": _forward,
        "cfg": _guidance,
        "schedule": _schedule,
        "respacing": _respacing,
        "loss": _losses,
        "train": _training,
    }
    for group, check in checks.items():
        if reference.has(group):
            yield from check(reference)
    for group in sorted({key.split("/")[0] for key in reference.arrays}):
        if match := re.fullmatch(r"(ddpm|ddim)(\d+)", group):
            yield _sampler(reference, group, match[1], match[2])


def _position_table(reference: Reference) -> Iterator[Row]:
    if "weights/pos_embed" in reference.arrays:
        yield absolute("position table", reference.model().pos_embed.numpy(), reference["weights/pos_embed"], 1e-6)


@paddle.no_grad()
def _predict(reference: Reference, labels) -> np.ndarray:
    return reference.model()(reference.tensor("forward/x"), reference.tensor("forward/t"), labels).numpy()


def _forward(reference: Reference) -> Iterator[Row]:
    labels = reference.tensor("forward/y")
    yield absolute("forward/out", _predict(reference, labels), reference["forward/out"], 1e-5)
    if "forward/out_null" in reference.arrays:
        null = paddle.full_like(labels, reference.config.null_class)
        yield absolute("forward/out_null", _predict(reference, null), reference["forward/out_null"], 1e-5)


@paddle.no_grad()
def _guidance(reference: Reference) -> Iterator[Row]:
    denoise = guided(
        reference.model(),
        reference.tensor("forward/y"),
        guidance_scale=float(reference["cfg/scale"]),
        guidance_channels=PAPER_GUIDANCE_CHANNELS,
    )
    if "cfg/out_three_channels" not in reference.arrays:
        return
    parts = _denoise_each(denoise, reference.tensor("forward/x"), reference.tensor("forward/t"))
    yield absolute("cfg/out_three_channels", parts, reference["cfg/out_three_channels"], 1e-5)


def _denoise_each(denoise, x, timesteps) -> np.ndarray:
    """Return noise and variance joined, as the reference returns them."""
    return paddle.concat([part for part in denoise(x, timesteps) if part is not None], axis=1).numpy()


def _schedule(reference: Reference) -> Iterator[Row]:
    for name in reference.names("schedule/"):
        yield relative(f"schedule/{name}", getattr(Schedule.linear(), name), reference[f"schedule/{name}"], 1e-9)


def _respacing(reference: Reference) -> Iterator[Row]:
    for spacing in reference.names("respacing/"):
        kept = Schedule.linear().respaced(spacing).timesteps
        yield absolute(f"respacing/{spacing}", kept, reference[f"respacing/{spacing}"], 0)


def _losses(reference: Reference) -> Iterator[Row]:
    model = reference.model()
    losses = GaussianDiffusion().training_losses(
        model, *(reference.tensor(f"loss/{key}") for key in ("x0", "y", "t", "noise"))
    )
    for name, value in losses.items():
        if f"loss/{name}" in reference.arrays:
            yield relative(f"loss/{name}", value.numpy(), reference[f"loss/{name}"], 1e-4)
    losses["loss"].mean().backward()
    errors = [
        relative(name, float(parameter.grad.norm()), reference[f"grad_norm/{name}"], 1e-4).error
        for name, parameter in model.named_parameters()
        if f"grad_norm/{name}" in reference.arrays
    ]
    if errors:
        yield Row(f"grad_norm ({len(errors)} parameters)", max(errors), 1e-4, "relative")


def _training(reference: Reference) -> Iterator[Row]:
    """Repeat the reference's AdamW steps (learning rate 1e-3, EMA decay 0.9)."""
    model, diffusion, losses = reference.model(), GaussianDiffusion(), []
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters(), weight_decay=0.0)
    ema = ExponentialMovingAverage(model, decay=0.9)
    for x0, y, t, noise in zip(*(reference.tensor(f"train/{key}") for key in ("x0", "y", "t", "noise")), strict=True):
        loss = diffusion.training_losses(model, x0, y, t, noise)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        ema.update()
        losses.append(float(loss))
    yield relative("train/loss", losses, reference["train/loss"], 1e-4)
    final = dict(model.named_parameters())
    for kind, weights in (("final", final), ("ema", ema.shadow)):
        arrays = from_facebook({name: reference[f"train/{kind}/{name}"] for name in reference.names(f"train/{kind}/")})
        for name, array in arrays.items():
            yield relative(f"train/{kind}/{name}", weights[name].numpy(), array, 1e-4)


def _sampler(reference: Reference, group: str, kind: str, steps: str) -> Row:
    denoise = guided(
        reference.model(),
        reference.tensor(f"{group}/y"),
        guidance_scale=float(reference["cfg/scale"]),
        guidance_channels=PAPER_GUIDANCE_CHANNELS,
    )
    schedule = Schedule.linear().respaced(steps if kind == "ddpm" else group)
    sampler = ddpm if kind == "ddpm" else ddim
    out = sampler(denoise, reference.tensor(f"{group}/z"), schedule, lambda i: reference.tensor(f"{group}/noise")[i])
    return relative(f"{group}/out", out.numpy(), reference[f"{group}/out"], 1e-3)
