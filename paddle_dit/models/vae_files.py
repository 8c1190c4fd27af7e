"""Where a VAE's files are: a folder, a pipeline's, this project's own, or the hub's; and what its config.json says."""

import contextlib
import fcntl
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from paddle_dit.errors import ConfigError, ConversionError
from paddle_dit.hub import fetch, is_hub_name
from paddle_dit.models.vae_names import SCALING
from paddle_dit.models.vae_weights import described
from paddle_dit.readers import STOCK_WEIGHTS

_ROOT = Path(__file__).resolve().parents[2]
_FILES = f"config.json and {STOCK_WEIGHTS['safetensors']} or diffusion_pytorch_model.safetensors"
_WEIGHTS = (*STOCK_WEIGHTS.values(), "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def find_place(name: str) -> Path:
    """Return the folder that holds a VAE's config.json, or the file of its weights; a hub's is downloaded once.

    Raises:
        ConversionError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    for folder in (folder for place in _places(name) for folder in (place, place / "vae")):
        if (folder / "config.json").is_file():
            return folder
    if is_here(name):
        raise ConversionError(f"{name} holds no VAE; place {_FILES} there")
    if name.startswith("data/") or not is_hub_name(name):  # data/ is this project's own folder
        raise ConversionError(f"no such VAE folder: {name}; give a folder with {_FILES}, or a hub name")
    return _download(name)


def is_here(name: str) -> bool:
    """Whether a name is of a folder on this machine, so that nothing would be downloaded for it."""
    return any(place.exists() for place in _places(name))


def _places(name: str) -> list[Path]:
    return [Path(name), _ROOT / name] if name.startswith("data/") else [Path(name)]


def read_config(place: Path) -> dict:
    """Return the configuration of an AutoencoderKL that encodes RGB images and decodes them in their own size.

    Args:
        place: its folder, or the file of its weights.

    Returns:
        what :func:`~paddle_dit.models.vae_weights.described` says, with ``block_out_channels``, ``latent_channels`` and
        ``scaling_factor`` in any case.

    Raises:
        ConversionError: it describes no such VAE.
    """
    config = described(place)
    blocks = config.get("block_out_channels", [64])
    config |= {
        "block_out_channels": blocks,
        "latent_channels": config.get("latent_channels", 4),
        "scaling_factor": config.get("scaling_factor", SCALING),
    }
    halves = {
        "encoder": (config.get("down_block_out_channels") or blocks, config.get("down_block_types", ["one"])),
        "decoder": (config.get("up_block_out_channels") or blocks, config.get("up_block_types", ["one"])),
    }
    good = all(isinstance(values, list) and values for half in halves.values() for values in half)
    good = good and isinstance(config["latent_channels"], int) and config["latent_channels"] > 0
    if not good or not is_scaling_factor(config["scaling_factor"]):
        raise ConversionError(f"the config.json of {place} does not describe an AutoencoderKL; restore it")
    for name in ("in_channels", "out_channels"):
        if config.get(name, 3) != 3:
            verb = "takes" if name == "in_channels" else "makes"
            raise ConversionError(f"{place} {verb} images of {config[name]} channels; give a VAE for RGB images")
    counts = {name: len(types) for name, (_, types) in halves.items()}
    if counts["encoder"] != counts["decoder"]:
        raise ConversionError(
            f"{place} is asymmetric: its encoder has {counts['encoder']} blocks and its decoder {counts['decoder']}, "
            "so images would come back in another size; give a VAE that has as many in both"
        )
    if any(len(channels) != len(types) for channels, types in halves.values()):
        raise ConversionError(
            f"the config.json of {place} does not describe an AutoencoderKL (channels and blocks differ); restore it"
        )
    return config


def is_scaling_factor(value: object) -> bool:
    """Whether latents can be multiplied by it, and divided again."""
    return isinstance(value, int | float) and 0 < value <= 1e6


def check_scaling_factor(value: float, name: str = "the scaling factor") -> None:
    """Raise ConfigError for a factor that was asked for and that latents cannot be multiplied by."""
    if not is_scaling_factor(value):
        raise ConfigError(f"{name} must be above 0 and at most 1,000,000, got {value}")


@contextlib.contextmanager
def same_signal_handlers() -> Iterator[None]:
    """Make Paddle's switch do nothing, which PaddleNLP turns on import: a stop signal would end a run unsaved."""
    import paddle

    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # there is none to keep, and Paddle's own would be noisy
        yield
        return
    switch, paddle.disable_signal_handler = paddle.disable_signal_handler, lambda: None
    try:
        yield
    finally:
        paddle.disable_signal_handler = switch


def _download(name: str) -> Path:
    """Return the folder that holds a hub's model: Paddle's hub has VAEs in its own format, the other all of them."""
    # ppdiffusers' own from_pretrained would unpickle what it downloads, so only its download is used.
    with same_signal_handlers():
        from ppdiffusers.utils import PPDIFFUSERS_CACHE, _get_model_file

    folder = Path(PPDIFFUSERS_CACHE) / name
    with _one_at_a_time(Path(PPDIFFUSERS_CACHE)):
        for choices in (["config.json"], list(STOCK_WEIGHTS.values())):
            if not any((folder / file).is_file() or _fetched(_get_model_file, name, file) for file in choices):
                folder = fetch(name, _wanted, _FILES)
                return next(place for place in (folder, folder / "vae") if (place / "config.json").is_file())
    return folder


def _wanted(files: Sequence[str]) -> list[str]:
    """Return which of a hub model's files are its VAE's, in one form."""
    for folder in ("", "vae/"):
        weights = [folder + name for name in _WEIGHTS if folder + name in files]
        if f"{folder}config.json" in files and weights:
            return [f"{folder}config.json", weights[0]]
    raise ConversionError("the hub's model holds no VAE")


@contextlib.contextmanager
def _one_at_a_time(cache: Path) -> Iterator[None]:
    """Let the ranks of a machine look for a model one after another: the first downloads, the others find it."""
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(OSError):  # of a cache that cannot be written: nothing is downloaded into it
            cache.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context((cache / ".paddle_dit.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _fetched(get_model_file, name: str, file: str) -> bool:
    try:
        get_model_file(name, weights_name=file, resume_download=True)
    except OSError:  # ppdiffusers turns "not there" and "no network" alike into this
        return False
    return True
