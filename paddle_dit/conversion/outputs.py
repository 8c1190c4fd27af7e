"""Models as files of this project, of the paper's code and of diffusers: written tensor by tensor, and read back."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np

from paddle_dit.checkpoint import INFO
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.formats import DIFFUSERS, FACEBOOK, OURS, OWN, OWN_INFO, Format
from paddle_dit.conversion.keymaps import Joined, foreign_shapes, split
from paddle_dit.conversion.ppdiffusers_pipeline import check_stock_can, stock_config
from paddle_dit.conversion.tables import Renamed
from paddle_dit.errors import ConfigError, ConversionError
from paddle_dit.files import appears_whole, check_writable, read_json, write_json
from paddle_dit.models.vae_files import read_config
from paddle_dit.models.vae_weights import read_vae_weights
from paddle_dit.positions import sincos_position_table
from paddle_dit.readers import STOCK_WEIGHTS
from paddle_dit.weight_files import read_table
from paddle_dit.writers import write_safetensors

MODEL_FILE = "model.safetensors"  # in a model folder of ours
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
TARGETS = {"paddle_dit": OWN, "facebook": FACEBOOK, "diffusers": DIFFUSERS}

Report = Callable[[int], object]


def check_output(output: Path, target: str, replace_own: bool = False) -> None:
    """Refuse an output that exists, cannot be written, or has a name that its format cannot have, before any work.

    Args:
        output: what is to be made.
        target: its format.
        replace_own: a model folder of ours, or an empty one, may be there and be replaced.

    Raises:
        ConfigError: the name or place is to be changed.
    """
    check_writable(output.resolve().parent, "DST")
    if (output.exists() or output.is_symlink()) and not (replace_own and _is_own(output)):
        raise ConfigError(f"{output} exists; choose another DST, or move it away")
    if target == "facebook" and output.suffix not in (".safetensors", ".pt"):
        raise ConfigError(f"{output} will be one file of the paper's code; let its name end in .safetensors or .pt")
    if target == "facebook" and output.suffix == ".pt" and find_spec("torch") is None:
        raise ConfigError(f"{output} needs PyTorch, which is not installed here; name it .safetensors instead")


def _is_own(output: Path) -> bool:
    """Whether a folder is empty or a model folder of ours; other libraries' have files of the same names."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else {"a file"}
    if not names:
        return True
    return names == {INFO, MODEL_FILE} and read_json(output / INFO, ConversionError).get("format") == OURS


def _check_paper_can(config: DiTConfig) -> None:
    """Raise ConversionError for a model that no arguments of the paper's ``DiT`` describe."""
    height, width = config.height_width
    obstacles = {
        f"its latents are {height}x{width}, not square": height != width,
        f"norm_eps is {config.norm_eps}, not 1e-6": config.norm_eps != 1e-6,
    }
    for obstacle, applies in obstacles.items():
        if applies:
            raise ConversionError(f"the paper's code cannot compute this model: {obstacle}; choose another --to")


def write_model(
    tensors: Mapping[str, np.ndarray],
    info: ModelInfo,
    output: Path,
    target: str,
    *,
    replace_own: bool = False,
    report: Report = lambda count: None,
    check: Callable[[Path], object] = lambda path: None,
) -> Path:
    """Write a model; it appears under its name whole, after all of its numbers have been read back and compared.

    Args:
        tensors: float32 arrays under our names, each of which is asked for twice.
        info: goes into the folder; a file of the paper's code has no place for it.
        output: must not exist, but for ``replace_own``.
        target: "paddle_dit", "facebook" or "diffusers".
        replace_own: see :func:`check_output`.
        report: is told how many bytes have been written, then read back.
        check: is called with the file of weights before it gets its final place; what it raises leaves nothing behind.

    Returns:
        The file of weights.

    Raises:
        ConversionError: a model that the format cannot hold, or numbers that are wrong when read back.
        ConfigError: see :func:`check_output`.
    """
    check_output(output, target, replace_own)
    if target == "diffusers":
        check_stock_can(info.config, "diffusers")
    elif target == "facebook":
        _check_paper_can(info.config)
    form = TARGETS[target]
    with appears_whole(output) as partial:
        file = partial if target == "facebook" else partial / (MODEL_FILE if target == "paddle_dit" else DIFFUSERS_FILE)
        file.parent.mkdir(exist_ok=True)
        _write_weights(file, output.suffix, form, tensors, info.config, report)
        if target == "paddle_dit":
            info.save(partial / INFO)
        elif target == "diffusers":
            write_json(partial / INFO, {"_class_name": "DiTTransformer2DModel", **stock_config(info.config)})
            info.save(partial / OWN_INFO)
        _check_read_back(file, form, tensors, info.config, report)
        check(file)
    return output if target == "facebook" else output / file.name


def _write_weights(file: Path, suffix: str, form: Format, tensors, config: DiTConfig, report: Report) -> None:
    rules = form.rules(config)
    shapes, arrays = foreign_shapes(rules, config), split(rules, tensors)
    if form is FACEBOOK:  # whose code loads the fixed table as if it were a weight
        name, table = form.names.positions, sincos_position_table(config.hidden_size, config.grid)[None]
        shapes, arrays = {name: table.shape, **shapes}, chain([(name, table)], arrays)
    if suffix == ".pt":
        import torch

        torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays}, file)
    else:
        write_safetensors(file, shapes, arrays, {} if form is OWN else {"format": "pt"}, report)


def _check_read_back(file: Path, form: Format, tensors, config: DiTConfig, report: Report) -> None:
    """Compare every number, by the way in which the file will be read."""
    values = read_table(file)
    names = {name: name for name in values if name != form.names.positions}
    written = Joined(form.rules(config), Renamed(values, names), config)
    for name, array in written.items():
        if not np.array_equal(array, tensors[name]):
            raise ConversionError(f"'{name}' read back differs from the model's; nothing was written")
        report(array.nbytes)


def write_vae(place: Path, output: Path, check: Callable[[object], object] = lambda vae: None) -> tuple[dict, int]:
    """Write a VAE as a folder of ppdiffusers' AutoencoderKL; return its configuration and the number of its tensors.

    Args:
        place: file or folder of ppdiffusers, diffusers or CompVis.
        output: must not exist.
        check: is called with the VAE, loaded from what was written, before that gets its final name; what it raises
            leaves nothing behind.

    Raises:
        ConversionError: files that cannot be read or are no VAE's.
        CheckpointError: tensors are missing, left over or of another shape than the configuration says.
        ConfigError: see :func:`check_output`.
    """
    from paddle_dit.models.vae import load_vae

    check_output(output, "ppdiffusers")
    config, tensors = read_config(place), read_vae_weights(place)
    with appears_whole(output) as partial:
        partial.mkdir()
        write_json(partial / INFO, {**config, "_class_name": "AutoencoderKL"})
        shapes = {name: array.shape for name, array in tensors.items()}
        # Without this mark ppdiffusers takes the linear layers for PyTorch's, and transposes them.
        write_safetensors(partial / STOCK_WEIGHTS["safetensors"], shapes, tensors.items(), {"format": "pd"})
        written = read_vae_weights(partial)
        if any(not np.array_equal(written[name], array) for name, array in tensors.items()):
            raise ConversionError("the VAE's numbers read back differ; nothing was written")
        check(load_vae(partial))
    return config, len(tensors)
