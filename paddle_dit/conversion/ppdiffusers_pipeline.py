"""Folders that ppdiffusers' stock DiTPipeline loads: written, verified with the stock classes, and read back.

A folder holds ``model_index.json`` (with the label names), ``scheduler/``, ``transformer/``, ``vae/``, and our own
``paddle_dit.json``, which lets our sampling see the model as it was trained.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.formats import MODEL_INDEX, OWN_INFO
from paddle_dit.conversion.keymaps import (
    STOCK_NULL_CLASS,
    Joined,
    foreign_shapes,
    our_rules,
    ppdiffusers_rules,
    split,
    stock_can_guide,
    stock_classes,
    to_ppdiffusers,
)
from paddle_dit.conversion.sources import open_model
from paddle_dit.diffusion.schedule import Schedule
from paddle_dit.errors import ConfigError, ConversionError
from paddle_dit.files import appears_whole, check_writable, write_json
from paddle_dit.models.vae import fit_vae
from paddle_dit.readers import STOCK_WEIGHTS
from paddle_dit.writers import write_safetensors

# Every scheduler's file holds all of this, whether its class uses it or not, so that a later
# `OtherScheduler.from_config(pipe.scheduler.config)` finds it: by default, DDIM would clip the latents.
# timestep_spacing is left to each class: DDIM's own is the striding for which its update is exact, another's is not.
_SCHEDULE = {
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}
_SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpm-solver": "DPMSolverMultistepScheduler"}


@dataclass(frozen=True)
class PipelineReport:
    """What a conversion found.

    Attributes:
        folder: the DiTPipeline folder.
        max_error: largest difference between the stock transformer's outputs and ours at frequency_shift 1.
        largest: largest absolute output, to see the others beside.
        frequency_deviation: largest difference between what the model was trained to compute and what it computes at
            the stock frequency_shift 1; 0 for a model of shift 1.
        can_guide: whether the stock pipeline can apply classifier-free guidance.
        notes: one line each on what the stock pipeline does otherwise than ours.
        deviations: timestep -> the same difference at it.
    """

    folder: Path
    max_error: float
    largest: float
    frequency_deviation: float
    can_guide: bool
    notes: list[str]
    deviations: dict[int, float]


def write_pipeline(
    model_tensors: Mapping[str, np.ndarray],
    info: ModelInfo,
    vae,
    output: str | Path,
    *,
    id2label: Mapping[int, str],
    scheduler: str = "ddim",
    weights_format: str = "safetensors",
    overwrite: bool = False,
    verify: bool = True,
    report: Callable[[int], object] = lambda count: None,
) -> PipelineReport:
    """Write a DiTPipeline folder, and prove that its transformer computes what ours does.

    Args:
        model_tensors: weights under our names; written as float32.
        info: their configuration, label names and VAE.
        vae: a ppdiffusers ``AutoencoderKL``; see :func:`~paddle_dit.models.vae.fit_vae` for what is changed in it.
        output: the folder to make. It appears, whole, only after verification.
        id2label: class id -> name, or several names with commas between.
        scheduler: "ddim", "ddpm" or "dpm-solver".
        weights_format: "safetensors" or "pdparams".
        overwrite: replace ``output`` if it is a DiTPipeline folder.
        verify: build both models and compare their outputs; without, the figures of the report are NaN. The numbers in
            the folder are read back and compared in any case.
        report: is told how many bytes of weights have been written since.

    Raises:
        ConfigError: the output is there already, or the VAE does not fit the model.
        ConversionError: a model that the stock class cannot compute, weights that do not fit ``info``, or outputs that
            differ. Nothing is left.
    """
    from paddle_dit.conversion.stock_parity import NOT_COMPARED, compare_outputs, load_stock

    output = Path(output)
    check_output(output, overwrite)
    check_stock_can(info.config, "DiTPipeline")
    own_factor = vae.config.scaling_factor
    fit_vae(vae, info.config.in_channels, info.vae)
    tensors = Joined(our_rules(info.config), model_tensors, info.config)
    with appears_whole(output) as partial:
        partial.mkdir()
        _write(partial, tensors, info, vae, id2label, scheduler, weights_format, report)
        _check_read_back(partial, tensors)
        found = compare_outputs(load_stock(partial), tensors, info.config) if verify else NOT_COMPARED
    notes = _notes(info.config, scheduler)
    if vae.config.scaling_factor != own_factor:
        notes.append(
            f"vae/config.json has the training latents' scaling factor {vae.config.scaling_factor:.5g}, this VAE's own "
            f"is {own_factor:.5g}"
        )
    if info.config.frequency_shift == 0:
        notes.append(
            "trained at frequency_shift 0, but DiTPipeline computes shift 1"
            + (f": outputs move by up to {found.deviation:.3g} (largest {found.largest:.3g})" if verify else "")
            + "; paddle_dit.conversion.exact_frequencies(pipe) on the loaded pipeline mends it"
        )
    guides = stock_can_guide(info.config)
    return PipelineReport(output, found.max_error, found.largest, found.deviation, guides, notes, found.deviations)


def read_pipeline(folder: str | Path) -> tuple[dict[str, np.ndarray], ModelInfo]:
    """Read a DiTPipeline folder, ours or another's: weights under our names, and the model's description.

    Where the folder has no ``paddle_dit.json``, the description comes from the tensors and ``transformer/config.json``;
    the model is then what the stock class computes: frequency_shift 1 and ``num_embeds_ada_norm`` classes.

    Raises:
        ConversionError: files that are missing or damaged, or a transformer that is no DiT.
        ConfigError: a damaged ``paddle_dit.json``.
    """
    source = open_model(folder)
    return dict(source.tensors), source.info


def exact_frequencies(pipe):
    """Make a loaded pipeline of ppdiffusers or diffusers exact for a model of frequency_shift 0, and return it.

    That is a model of the paper's code, which divides the exponents of the timestep frequencies by 128, and the stock
    classes by 127.
    """
    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return pipe


def check_output(output: Path, overwrite: bool) -> None:
    """Raise ConfigError if ``output`` cannot be made, or holds something; a DiTPipeline may be overwritten."""
    check_writable(output.resolve().parent, "--output")  # the parent, because that is where the folder is renamed
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MODEL_INDEX).is_file():
        raise ConfigError(f"{output} exists and is no DiTPipeline folder; choose another --output")
    if not overwrite:
        raise ConfigError(f"{output} exists; choose another --output or pass --overwrite")


def stock_config(config: DiTConfig) -> dict:
    """Return the arguments with which Transformer2DModel is our architecture."""
    return {
        "sample_size": config.height_width[0],
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_embeds_ada_norm": stock_classes(config),
        "norm_type": "ada_norm_zero",
        "norm_eps": config.norm_eps,
        "norm_elementwise_affine": False,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
    }


def check_stock_can(config: DiTConfig, program: str) -> None:
    """Raise ConversionError if the stock class of "DiTPipeline" (ppdiffusers) or "diffusers" has not this model."""
    height, width = config.height_width
    stretches = program == "DiTPipeline"
    obstacles = {
        f"sample_size {height}x{width} is not square": height != width,
        f"at sample_size {height} (128 or more) it stretches the position table": stretches and height >= 128,
        f"mlp_ratio is {config.mlp_ratio}, not 4": config.mlp_ratio != 4,
        f"norm_eps is {config.norm_eps}, not 1e-6": config.norm_eps != 1e-6,
    }
    for obstacle, applies in obstacles.items():
        if applies:
            raise ConversionError(
                f"{program} cannot compute this model: {obstacle}; draw with scripts/sample.py instead"
            )


def _write(folder: Path, tensors, info: ModelInfo, vae, id2label, scheduler, weights_format, report) -> None:
    from ppdiffusers import __version__

    betas = Schedule.linear().betas
    training = {"num_train_timesteps": len(betas), "beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    parts = {"scheduler": _SCHEDULERS[scheduler], "transformer": "Transformer2DModel", "vae": "AutoencoderKL"}
    index = {name: ["ppdiffusers", part] for name, part in parts.items()}
    names = {str(label): name for label, name in sorted(id2label.items())}

    def write(path: str, class_name: str, values: dict) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        write_json(folder / path, {"_class_name": class_name, "_ppdiffusers_version": __version__, **values})

    write(MODEL_INDEX, "DiTPipeline", {"id2label": names, **index})
    write("scheduler/scheduler_config.json", parts["scheduler"], {**training, **_SCHEDULE})
    write("transformer/config.json", parts["transformer"], stock_config(info.config))
    _write_weights(folder / "transformer" / STOCK_WEIGHTS[weights_format], tensors, info.config, report)
    vae.save_pretrained(str(folder / "vae"), safe_serialization=weights_format == "safetensors")
    info.save(folder / OWN_INFO)


def _write_weights(path: Path, tensors: Mapping[str, np.ndarray], config: DiTConfig, report) -> None:
    if path.suffix == ".safetensors":
        rules = ppdiffusers_rules(config)
        # Without this mark ppdiffusers takes the linear layers for PyTorch's, and transposes them.
        write_safetensors(path, foreign_shapes(rules, config), split(rules, tensors), {"format": "pd"}, report)
    else:
        import paddle

        stock = {name: np.ascontiguousarray(array) for name, array in to_ppdiffusers(tensors, config).items()}
        paddle.save(stock, str(path))


def _check_read_back(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Compare every number: layers that are still zero can hide a wrong one from the outputs."""
    written, _ = read_pipeline(folder)
    for name, array in tensors.items():
        if not np.array_equal(written[name], array):
            raise ConversionError(f"'{name}' read back differs from the model's; nothing was written")


def _notes(config: DiTConfig, scheduler: str) -> list[str]:
    notes = []
    if not config.has_null_class:
        notes.append("no null class: DiTPipeline cannot guide this model; call it with guidance_scale=1")
    elif config.num_classes > STOCK_NULL_CLASS:
        notes.append(
            f"DiTPipeline's null class is row {STOCK_NULL_CLASS}, here an ordinary class (num_embeds_ada_norm "
            f"{config.num_classes}): call it with guidance_scale=1, or guide with scripts/sample.py"
        )
    elif config.num_classes < STOCK_NULL_CLASS:
        notes.append(f"label table padded: rows {config.null_class} to {STOCK_NULL_CLASS} are the null class")
    if scheduler == "ddpm" and config.learn_sigma:
        notes.append("DiTPipeline drops the learned variance; scripts/sample.py --sampler ddpm uses it")
    return notes
