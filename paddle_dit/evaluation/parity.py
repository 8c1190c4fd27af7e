"""Compare this implementation with arrays that the paper's code produced.

The arrays lie in one ``.npz``: a configuration, weights under the reference's names, and groups of inputs and outputs
(forward, cfg, schedule, respacing, loss, grad_norm, train, and one group per sampler such as ``ddpm250``). Any group
may be absent, and the model may be any. A group that is there must be whole. What is unknown is listed as not compared.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import paddle

from paddle_dit.checkpoint import load_weights
from paddle_dit.config import DiTConfig
from paddle_dit.conversion.facebook import config_from_facebook, from_facebook
from paddle_dit.diffusion.guidance import guided
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.diffusion.options import can_guide
from paddle_dit.diffusion.samplers import ddim, ddpm
from paddle_dit.diffusion.schedule import NUM_TRAIN_TIMESTEPS, Schedule
from paddle_dit.errors import ConfigError, DataError
from paddle_dit.models.dit import DiT
from paddle_dit.training.ema import ExponentialMovingAverage

PAPER_GUIDANCE_CHANNELS = 3


@dataclass(frozen=True)
class Row:
    """One array: its largest error, how that is measured, and the tolerance; ``compared`` is False for unknown ones."""

    name: str
    error: float
    tolerance: float
    measure: str
    compared: bool = True

    @property
    def passes(self) -> bool:
        """Whether the array was compared and the error is finite and within the tolerance."""
        return self.compared and bool(self.error <= self.tolerance)


def absolute(name: str, ours, reference, tolerance: float) -> Row:
    """Compare by the largest absolute difference."""
    return Row(name, _largest(ours, reference), tolerance, "absolute")


def relative(name: str, ours, reference, tolerance: float) -> Row:
    """Compare by the largest difference over the reference's largest value."""
    error = _largest(ours, reference)
    if np.isfinite(error):  # a reference that is not finite has no scale
        error /= float(np.max(np.abs(reference))) or 1.0
    return Row(name, error, tolerance, "relative")


def _largest(ours, reference) -> float:
    ours, reference = np.asarray(ours, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if ours.shape != reference.shape:
        return float("inf")
    difference = np.abs(ours - reference)
    return float(np.max(difference)) if np.isfinite(difference).all() else float("inf")


class Reference:
    """The arrays of one file, checked as they are read, and models built from its configuration and weights."""

    def __init__(self, path: str | Path):
        self.path = path
        self.arrays = _read_arrays(Path(path))
        if "config" not in self.arrays:
            raise DataError(f"{path} lacks 'config'")
        self.config = _read_config(self.arrays["config"], path)
        self.groups = sorted({key.split("/")[0] for key in self.arrays})
        self._unread = dict.fromkeys(key for key in self.arrays if key != "config")

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.arrays:
            raise DataError(f"{self.path} lacks '{key}', without which its group cannot be compared")
        array = self.arrays[key]
        if array.dtype.kind not in "biuf" or array.size == 0:
            raise DataError(f"'{key}' of {self.path} holds no numbers")
        self._unread.pop(key, None)
        return array

    def unread(self, known_groups: set[str]) -> list[str]:
        """Return the keys that nothing has asked for; a group that is not known is named once."""
        groups = ((key, key.split("/")[0]) for key in self._unread)
        return list(dict.fromkeys(key if group in known_groups else group for key, group in groups))

    def names(self, prefix: str) -> list[str]:
        """Return what follows ``prefix`` in the keys that start with it."""
        return [key[len(prefix) :] for key in self.arrays if key.startswith(prefix)]

    def scalar(self, key: str) -> float:
        """Return an array of one number."""
        if self[key].size != 1:
            raise DataError(f"'{key}' of {self.path} must be one number")
        return float(self[key].item())

    def inputs(self, group: str, *names: str, batch_axes: int = 1) -> list[paddle.Tensor]:
        """Return the named inputs of a group: labels ``y``, timesteps ``t``, and latents under any other name.

        Raises:
            DataError: one is missing, or they do not fit the model or each other.
        """
        arrays = {name: self[f"{group}/{name}"] for name in names}
        limits = {"t": NUM_TRAIN_TIMESTEPS, "y": self.config.label_rows}
        batches = set()
        for name, array in arrays.items():
            sample = () if name in limits else self.config.sample_shape
            axes = array.ndim - len(sample)
            if axes != batch_axes or array.shape[axes:] != sample:
                raise DataError(f"'{group}/{name}' of {self.path} has shape {array.shape}, which does not fit 'config'")
            if name in limits and not ((array >= 0) & (array < limits[name])).all():
                raise DataError(f"'{group}/{name}' of {self.path} holds values outside 0 to {limits[name] - 1}")
            batches.add(array.shape[:axes])
        if len(batches) > 1:
            raise DataError(f"{', '.join(names)} of group '{group}' in {self.path} differ in their number of samples")
        return [paddle.to_tensor(arrays[name].astype("int64" if name in limits else "float32")) for name in names]

    @cached_property
    def model(self) -> DiT:
        """The file's model in evaluation mode, shared by the checks that leave it as it is."""
        return self.new_model()

    def new_model(self) -> DiT:
        """Build the model with the file's weights, in evaluation mode."""
        model = DiT(self.config)
        weights = {name: self[f"weights/{name}"] for name in self.names("weights/")}
        load_weights(model, from_facebook(weights, self.config), str(self.path))
        model.eval()
        return model

    def guided(self, labels):
        """Return the guided model for these labels: by ``cfg/scale``, or unguided where the file or the model has none.

        A model without a null class cannot have been guided by the reference either.
        """
        scale = self.scalar("cfg/scale") if "cfg/scale" in self and can_guide(self.config) else 1.0
        channels = min(PAPER_GUIDANCE_CHANNELS, self.config.in_channels)
        return guided(self.model, labels, guidance_scale=scale, guidance_channels=channels)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # zip and npy damage surface as many types
        raise DataError(f"{path} is no .npz of plain arrays: {error}") from None


def _read_config(array: np.ndarray, path: str | Path) -> DiTConfig:
    """Return the configuration in the file's JSON; each value must have the type of our default."""
    try:
        values = json.loads(array.item())
    except (TypeError, ValueError):
        raise DataError(f"'config' of {path} is not JSON") from None
    if not isinstance(values, dict) or "input_size" not in values:
        raise DataError(f"'config' of {path} must be a JSON object: the reference's keyword arguments, with input_size")
    types = {field.name: type(field.default) for field in fields(DiTConfig)}
    for key, value in values.items():
        kind = types.get("sample_size" if key == "input_size" else key, type(value))
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise DataError(f"'config' of {path}: {key} must be of type {kind.__name__}, got {value!r}")
    try:
        return config_from_facebook(values)
    except ConfigError as error:
        raise DataError(f"'config' of {path}: {error}") from None


def compare(path: str | Path) -> Iterator[Row]:
    """Yield a row for each array of the file that this implementation can compute, then one for each that it cannot.

    Raises:
        DataError: the file cannot be read, or half a group is missing.
        CheckpointError: the weights are not those of the configuration's model.
    """
    reference = Reference(path)
    samplers = {group: match for group in reference.groups if (match := re.fullmatch("(ddpm|ddim)([0-9]+)", group))}
    # Gradients are those of the losses, so they need that group's inputs.
    present = {*reference.groups, "loss"} if "grad_norm" in reference.groups else {*reference.groups}
    for group, check in _CHECKS.items():
        if group in present:
            yield from check(reference)
    for group, match in samplers.items():
        yield _sampler(reference, group, match[1], match[2])
    for name in reference.unread({*_CHECKS, "grad_norm", *samplers}):
        yield Row(name, float("nan"), float("nan"), "", compared=False)


def _position_table(reference: Reference) -> Iterator[Row]:
    table = reference.model.pos_embed.numpy()  # builds the model, so weights that do not fit are told in any case
    if "weights/pos_embed" in reference:
        yield absolute("position table", table, reference["weights/pos_embed"], 1e-6)


@paddle.no_grad()
def _forward(reference: Reference) -> Iterator[Row]:
    x, t, labels = reference.inputs("forward", "x", "t", "y")
    yield absolute("forward/out", reference.model(x, t, labels).numpy(), reference["forward/out"], 1e-5)
    if "forward/out_null" in reference and reference.config.has_null_class:
        null = paddle.full_like(labels, reference.config.null_class)
        yield absolute("forward/out_null", reference.model(x, t, null).numpy(), reference["forward/out_null"], 1e-5)


@paddle.no_grad()
def _guidance(reference: Reference) -> Iterator[Row]:
    if "cfg/out_three_channels" not in reference:
        return
    reference.scalar("cfg/scale")  # needed here, while the samplers can do without
    x, t, labels = reference.inputs("forward", "x", "t", "y")
    parts = [part for part in reference.guided(labels)(x, t) if part is not None]  # noise, and variance if any
    out = paddle.concat(parts, axis=1).numpy()
    yield absolute("cfg/out_three_channels", out, reference["cfg/out_three_channels"], 1e-5)


def _schedule(reference: Reference) -> Iterator[Row]:
    for name in reference.names("schedule/"):
        table = getattr(Schedule.linear(), name, None)
        if isinstance(table, np.ndarray):
            yield relative(f"schedule/{name}", table, reference[f"schedule/{name}"], 1e-9)


def _respacing(reference: Reference) -> Iterator[Row]:
    for spacing in reference.names("respacing/"):
        try:
            kept = Schedule.linear().respaced(spacing).timesteps
        except ConfigError:  # no spacing, so an array that is not known here
            continue
        yield absolute(f"respacing/{spacing}", kept, reference[f"respacing/{spacing}"], 0)


def _losses(reference: Reference) -> Iterator[Row]:
    model, inputs = reference.new_model(), reference.inputs("loss", "x0", "y", "t", "noise")
    losses = GaussianDiffusion().training_losses(model, *inputs)
    for name, value in losses.items():
        if name == "loss" or f"loss/{name}" in reference:
            yield relative(f"loss/{name}", value.numpy(), reference[f"loss/{name}"], 1e-4)
    losses["loss"].mean().backward()
    errors = [
        relative(name, float(parameter.grad.norm()), reference[f"grad_norm/{name}"], 1e-4).error
        for name, parameter in model.named_parameters()
        if f"grad_norm/{name}" in reference
    ]
    if errors:
        yield Row(f"grad_norm ({len(errors)} parameters)", max(errors), 1e-4, "relative")


def _training(reference: Reference) -> Iterator[Row]:
    """Repeat the reference's AdamW steps (learning rate 1e-3, EMA decay 0.9)."""
    model, diffusion, losses = reference.new_model(), GaussianDiffusion(), []
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters(), weight_decay=0.0)
    ema = ExponentialMovingAverage(model, decay=0.9)
    for x0, y, t, noise in zip(*reference.inputs("train", "x0", "y", "t", "noise", batch_axes=2), strict=True):
        loss = diffusion.training_losses(model, x0, y, t, noise)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        ema.update()
        losses.append(float(loss))
    yield relative("train/loss", losses, reference["train/loss"], 1e-4)
    final = dict(model.named_parameters())
    for kind, weights in (("final", final), ("ema", ema.shadow)):
        names = [name for name in reference.names(f"train/{kind}/") if name in weights]
        arrays = from_facebook({name: reference[f"train/{kind}/{name}"] for name in names}, reference.config)
        for name, array in arrays.items():
            yield relative(f"train/{kind}/{name}", weights[name].numpy(), array, 1e-4)


_CHECKS = {
    "weights": _position_table,
    "forward": _forward,
    "cfg": _guidance,
    "schedule": _schedule,
    "respacing": _respacing,
    "loss": _losses,
    "train": _training,
}


def _sampler(reference: Reference, group: str, kind: str, steps: str) -> Row:
    z, labels = reference.inputs(group, "z", "y")
    if kind == "ddpm":
        schedule = Schedule.linear().respaced(steps)
        noise = paddle.to_tensor(reference[f"{group}/noise"].astype("float32"))
        if noise.shape != [len(schedule), *z.shape]:
            raise DataError(f"'{group}/noise' of {reference.path} must be one noise like '{group}/z' for each step")
        out = ddpm(reference.guided(labels), z, schedule, lambda i: noise[i])
    else:
        out = ddim(reference.guided(labels), z, Schedule.linear().respaced(group), lambda i: None)
    return relative(f"{group}/out", out.numpy(), reference[f"{group}/out"], 1e-3)
