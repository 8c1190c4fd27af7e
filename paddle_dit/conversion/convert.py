"""One command from any format to any other: find, check, write, verify, and say what was done."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
from tqdm import tqdm

from paddle_dit.checkpoint import INFO
from paddle_dit.config import PRESETS, DiTConfig
from paddle_dit.conversion.architecture import Hints, preset_heads
from paddle_dit.conversion.formats import DIFFUSERS, STOCK_NAMES
from paddle_dit.conversion.keymaps import foreign_shapes, ppdiffusers_rules
from paddle_dit.conversion.loading import class_names, known_names
from paddle_dit.conversion.outputs import TARGETS, check_output, write_model, write_vae
from paddle_dit.conversion.ppdiffusers_pipeline import write_pipeline
from paddle_dit.conversion.sources import Source, VaeSource, open_source
from paddle_dit.data.labels import read_label_names
from paddle_dit.errors import ConversionError
from paddle_dit.files import read_json
from paddle_dit.models.refit import parameter_shapes
from paddle_dit.weight_files import read_table

Rows = list[tuple[str, str]]
DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
_NOT_COMPARED = ("outputs", "not compared (--no-verify)")
_STOCK = "against ppdiffusers' transformer"


@dataclass(frozen=True)
class Request:
    """What is to be converted.

    Attributes:
        path: what :func:`~paddle_dit.conversion.loading.read_weights` takes, or a VAE.
        output: what is to be made; must not exist.
        target: "paddle_dit", "facebook", "diffusers" or "ppdiffusers"; None is ours for a DiT, ppdiffusers for a VAE.
        weights: "ema" or "model".
        hints: what the files leave open.
        vae: folder, file or hub name, for a DiTPipeline; None takes the source's own.
        id2label: JSON file, class id -> name; None takes the source's own names, or ImageNet's for 1000 classes.
        verify: build models and compare their outputs.
    """

    path: Path
    output: Path
    target: str | None = None
    weights: str = "ema"
    hints: Hints = field(default_factory=Hints)
    vae: str | None = None
    id2label: Path | None = None
    verify: bool = True


def convert(request: Request) -> Rows:
    """Convert, and return the rows of a table that says what was found, written and verified.

    Raises:
        PaddleDiTError: something that a user can mend; nothing is left of the output.
    """
    if request.verify:
        import paddle

        paddle.set_device("cpu")  # a GPU's TF32 would fail comparisons that should pass
    check_output(request.output, request.target or "paddle_dit")
    source = open_source(request.path, request.weights, request.hints)
    if isinstance(source, VaeSource):
        return _to_vae(source, request)
    info = replace(source.info, label_names=_names(source, request))
    source = replace(source, info=info)
    rows = [("found", source.kind), ("in", str(source.path)), *_describe(source.info.config)]
    rows += [("class names", f"{len(info.label_names):,}")] if info.label_names else []
    rows += [("note", line) for line in source.notes]
    if request.target == "ppdiffusers":
        return [*rows, *_to_pipeline(source, request)]
    return [*rows, *_to_files(source, request)]


def _names(source: Source, request: Request) -> dict[int, str] | None:
    if request.id2label:
        return read_label_names(request.id2label, source.info.config.num_classes)
    return known_names(source.info)


def _describe(config: DiTConfig) -> Rows:
    keys = ("patch_size", "depth", "hidden_size")
    same = (name for name, preset in PRESETS.items() if all(preset[key] == getattr(config, key) for key in keys))
    name = next(same, "")
    height, width = config.height_width
    parts = [
        f"{config.depth} blocks",
        f"width {config.hidden_size}",
        f"{config.num_heads} heads",
        f"patch {config.patch_size}",
        f"latents {config.in_channels}x{height}x{width}",
        f"{config.num_classes} classes",
        "learned variance" if config.learn_sigma else "no learned variance",
        f"frequency_shift {config.frequency_shift}",
    ]
    told = ", ".join(parts)
    return [("architecture", f"{name}: {told}" if name else told), ("parameters", f"{config.num_parameters():,}")]


def _to_files(source: Source, request: Request) -> Rows:
    target, config, rows = request.target or "paddle_dit", source.info.config, []
    rules = TARGETS[target].rules(config)
    size = 4 * sum(map(prod, [*foreign_shapes(rules, config).values(), *parameter_shapes(config).values()]))

    def check(file: Path) -> None:
        bar.close()
        if request.verify:
            rows.extend(_compare(source, file if target == "diffusers" else None))

    with _bar(size, "write, read back", "B") as bar:
        file = write_model(source.tensors, source.info, request.output, target, report=bar.update, check=check)
    rows += _unsaid(config, target, request.verify)
    written = [("written", f"{target}: {request.output}"), ("weights", f"{file.stat().st_size:,} bytes of float32")]
    return [*written, *_numbers(source), *rows, *([] if request.verify else [_NOT_COMPARED])]


def _unsaid(config: DiTConfig, target: str, verified: bool) -> Rows:
    """Return what the written format cannot say of a model, and its program would compute otherwise."""
    rows = []
    if target == "facebook" and config.frequency_shift != 0:
        rows.append(
            "the paper's code computes frequency_shift 0, this model was trained with 1: its outputs will differ"
        )
        rows.append("there; read it here with --frequency-shift 1, which is exact")
    if target == "facebook" and config.num_heads != preset_heads(config.hidden_size):
        rows.append(f"a state dict does not tell the {config.num_heads} heads: build the model with num_heads so")
    if target == "diffusers" and config.frequency_shift == 0 and not verified:
        rows.append("diffusers computes frequency_shift 1, the model was trained with 0; on the loaded pipeline,")
        rows.append("paddle_dit.conversion.exact_frequencies(pipe) mends it")
    return [("note", line) for line in rows]


def _numbers(source: Source) -> Rows:
    foreign = len(source.foreign.keys() - {source.format.names.positions})
    ours = len(source.tensors)
    return [("tensors", f"{foreign} of the source used once each; {ours} of ours read back and equal bit for bit")]


def _compare(source: Source, written: Path | None) -> Rows:
    """Compare outputs where another implementation of a format runs here."""
    from paddle_dit.conversion.stock_parity import TIMESTEPS, build_stock, compare_outputs

    config, sides = source.info.config, {}
    if source.format.names is STOCK_NAMES:
        sides["the source"] = (source.foreign, source.format is DIFFUSERS)
    if written is not None:
        sides["what was written"] = (read_table(written), True)
    rows = []
    for what, (tensors, turned) in sides.items():
        with _bar(len(TIMESTEPS), f"compare with {what}", "timestep") as bar:
            found = compare_outputs(build_stock(tensors, config, turned), source.tensors, config, report=bar.update)
        rows.append(("outputs", f"{_STOCK} on {what}: error {found.max_error:.1e}, largest {found.largest:.3g}"))
        if written is not None and what == "what was written" and config.frequency_shift == 0:
            rows += deviation_rows(found.deviations, found.largest, "diffusers")
    return rows or [("outputs", _run_ours(source))]


def _run_ours(source: Source) -> str:
    """Run our model once, where there is nothing to compare it with."""
    import paddle

    from paddle_dit.conversion.loading import build_dit

    config = source.info.config
    model = build_dit(source.tensors, config, source.path)
    rng = np.random.default_rng(0)
    with paddle.no_grad():
        x = paddle.to_tensor(rng.standard_normal((1, *config.sample_shape), dtype=np.float32))
        out = model(x, paddle.to_tensor([500]), paddle.to_tensor([config.label_rows - 1])).numpy()
    if not np.isfinite(out).all():
        raise ConversionError(f"{source.path}: the model's output is not finite; the weights are damaged")
    return f"ours runs (largest {np.abs(out).max():.3g}); {source.format.name} itself does not run here to compare with"


def deviation_rows(deviations: Mapping[int, float], largest: float, program: str) -> Rows:
    """Return what another frequency_shift than the trained one does to the outputs, by timestep."""
    told = ", ".join(f"{timestep}: {value:.2g}" for timestep, value in deviations.items())
    return [
        ("frequencies", f"{program} computes frequency_shift 1, the model was trained with 0; outputs move by up to"),
        ("", f"{told} at these timesteps (largest output {largest:.3g});"),
        ("", "paddle_dit.conversion.exact_frequencies(pipe) on the loaded pipeline mends it"),
    ]


def _to_pipeline(source: Source, request: Request) -> Rows:
    from paddle_dit.models.vae import load_vae

    vae = request.vae or (str(source.vae) if source.vae else None) or (source.info.vae or {}).get("name") or DEFAULT_VAE
    config = source.info.config
    size = 4 * sum(map(prod, foreign_shapes(ppdiffusers_rules(config), config).values()))
    with _bar(size, "write", "B") as bar:
        found = write_pipeline(
            source.tensors,
            source.info,
            load_vae(vae),
            request.output,
            id2label=class_names(source.info),
            verify=request.verify,
            report=bar.update,
        )
    rows = [("written", f"ppdiffusers DiTPipeline: {request.output}"), ("vae", vae), *_numbers(source)]
    rows += [("note", line) for line in found.notes]
    if not request.verify:
        return [*rows, _NOT_COMPARED]
    rows.append(("outputs", f"{_STOCK}: error {found.max_error:.1e}, largest {found.largest:.3g}"))
    if source.info.config.frequency_shift == 0:
        rows += deviation_rows(found.deviations, found.largest, "DiTPipeline")
    return rows


@contextmanager
def _bar(total: int, what: str, unit: str) -> Iterator[tqdm]:
    quiet = not sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=10.0 if quiet else 0.2,
        dynamic_ncols=not quiet,
    ) as bar:
        yield bar


def _to_vae(source: VaeSource, request: Request) -> Rows:
    if request.target not in (None, "ppdiffusers"):
        raise ConversionError(f"{source.path} is a VAE, which becomes a folder of ppdiffusers; leave --to out")
    rows = []

    def check(vae) -> None:
        from paddle_dit.models.vae import decode, encode

        side = 2 ** (len(vae.config.block_out_channels) + 2)
        images = np.random.default_rng(0).uniform(-1, 1, (1, vae.config.in_channels, side, side)).astype(np.float32)
        latents = encode(vae, images)
        if not np.isfinite(latents).all():
            raise ConversionError(f"{source.path}: the latents of an image are not finite; the weights are damaged")
        shape = decode(vae, latents).shape
        rows.append(
            ("outputs", f"an image of {side}x{side} becomes latents {latents.shape[1:]} and again {shape[1:3]}")
        )

    place = request.path if request.path.is_file() else source.path.parent
    config, count = write_vae(place, request.output, check if request.verify else lambda vae: None)
    beside = (place if place.is_dir() else place.parent) / INFO
    is_said = beside.is_file() and "scaling_factor" in read_json(beside, ConversionError)
    left = len(source.tensors) - count
    return [
        ("found", "VAE of Stable Diffusion (AutoencoderKL)"),
        ("in", str(source.path)),
        ("architecture", f"widths {config['block_out_channels']}, {config['latent_channels']} channels"),
        ("scale", f"{config['scaling_factor']:g}" + ("" if is_said else ": Stable Diffusion's; no file says it")),
        *(("note", line) for line in source.notes),
        ("written", f"ppdiffusers AutoencoderKL: {request.output}"),
        ("tensors", f"{count} used once each, read back and equal bit for bit"),
        *([("left out", f"{left} of the source, which only its training needs")] if left else []),
        *(rows or [_NOT_COMPARED]),
    ]
