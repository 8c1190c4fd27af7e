"""The folder of an engine: its programs, and ``deploy.json``, which says what is needed to run and to trust them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from paddle_dit.config import DiTConfig
from paddle_dit.data.classes import Classes
from paddle_dit.deploy.backends import ExportBackend, Settings
from paddle_dit.deploy.specs import CACHED_STEP, CONDITIONING, DECODER, program_specs
from paddle_dit.diffusion.options import SamplingOptions
from paddle_dit.diffusion.schedule import Schedule
from paddle_dit.errors import ConfigError, DeployError
from paddle_dit.files import check_writable, describe, digest_of, read_json, sha256, write_json

DESCRIPTION, PROGRAMS, REFERENCE = "deploy.json", "programs", "parity.npz"
DIGEST = "description_sha256"  # in the description: of all else that it says
SAVED = (CONDITIONING, CACHED_STEP, DECODER)  # of a folder
FORMAT, FORMAT_VERSION = "paddle_dit engine", 2


def scheduler() -> dict:
    """Return the noise schedule that every model here is trained with, in the terms of diffusers' schedulers."""
    betas = Schedule.linear().betas
    return {
        "num_train_timesteps": len(betas),
        "beta_schedule": "linear",
        "beta_start": float(betas[0]),
        "beta_end": float(betas[-1]),
        "prediction_type": "epsilon",
    }


@dataclass(frozen=True)
class EngineInfo:
    """What ``deploy.json`` says.

    Attributes:
        config: of the model.
        label_names: class id -> name, or None.
        vae: scaling factor and factor of the VAE.
        backend: its name.
        precision: "fp32", "fp16" or "bf16".
        max_batch_size: images that a program takes at most.
        device: on which the programs were made: "cpu", or a GPU's number, "gpu:0" say.
        versions: of what runs the programs.
        source: where the weights came from, and their hashes.
        sampling: the options with which images are drawn where nothing is asked for.
        cuda_graph: the step is replayed as a CUDA graph.
        parity: what was measured against the model before the folder appeared.
        scheduler: see :func:`scheduler`.
    """

    config: DiTConfig
    label_names: dict[int, str] | None
    vae: dict
    backend: str
    precision: str
    max_batch_size: int
    device: str
    versions: dict[str, str]
    source: dict
    sampling: dict
    cuda_graph: bool = False
    parity: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=scheduler)

    @property
    def classes(self) -> Classes:
        """The classes that it draws."""
        return Classes(self.config.num_classes, self.label_names)

    def settings(self, threads: int | None = None) -> Settings:
        """Return how its backend is to run.

        Raises:
            ConfigError: it cannot run so anywhere.
        """
        return Settings(self.precision, self.max_batch_size, (self.device,), self.cuda_graph, threads)

    def programs(self) -> dict:
        """Return what its programs take and give, as plain values."""
        specs = program_specs(self.config, self.max_batch_size)
        return {name: vars(specs[name]) for name in SAVED}

    def save(self, folder: Path) -> None:
        """Write ``deploy.json`` into a folder whose other files are all there, with their sizes and hashes."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DESCRIPTION)
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **{name: value for name, value in vars(self).items() if name != "config"},
            "model": self.config.to_dict(),
            "programs": self.programs(),
            "files": {path.relative_to(folder).as_posix(): describe(path) for path in files},
        }
        write_json(folder / DESCRIPTION, {**values, DIGEST: digest_of(values)})

    @classmethod
    def load(cls, folder: str | Path) -> "EngineInfo":
        """Read ``deploy.json`` and compare every file with its hash.

        Raises:
            DeployError: no such folder, another format, or a file that is missing or is not what was written.
        """
        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file():
            raise DeployError(f"{folder} has no {DESCRIPTION}; make an engine with scripts/export_inference.py")
        values = read_json(folder / DESCRIPTION, DeployError)
        if (values.get("format"), values.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise DeployError(f"{folder} is no engine of this version; export it again")
        if values.pop(DIGEST, None) != digest_of(values):
            raise DeployError(
                f"{folder / DESCRIPTION} is not what was exported, it was damaged or changed; restore it from a copy, "
                "or export the engine again"
            )
        try:
            names = values["label_names"]
            fields = {name: values[name] for name in cls.__dataclass_fields__ if name not in ("config", "label_names")}
            info = cls(
                config=DiTConfig.from_dict(values["model"]),
                label_names=None if names is None else {int(label): str(name) for label, name in names.items()},
                **fields,
            )
            files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in values["files"].items()}
            info.check(values["programs"], files)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, ConfigError) as error:
            raise DeployError(f"{folder / DESCRIPTION} is damaged ({error!r}); export the engine again") from None
        if info.scheduler != scheduler():
            raise DeployError(f"{folder} was made for another noise schedule; export it again with this version")
        unlisted = [path.name for path in (folder / PROGRAMS).glob("*") if f"{PROGRAMS}/{path.name}" not in files]
        if unlisted:
            raise DeployError(f"{folder / PROGRAMS} holds {unlisted[0]}, which {DESCRIPTION} does not name; remove it")
        for name, (size, digest) in files.items():
            check_file(folder / name, size, digest)
        return info

    def check(self, programs: dict, files: dict) -> None:
        """Refuse what no export writes, though a hash agrees with it.

        Args:
            programs: what the description says of them.
            files: by name.

        Raises:
            AttributeError, ConfigError, KeyError, TypeError, ValueError: it was written by something else.
        """
        self.settings()
        SamplingOptions(**self.sampling)
        if self.backend not in get_args(ExportBackend):
            raise ValueError(f"backend {self.backend!r}")
        if programs != json.loads(json.dumps(self.programs())):
            raise ValueError("programs of another model")
        if not self.vae["scaling_factor"] > 0 or not isinstance(self.vae["factor"], int):
            raise ValueError(f"vae {self.vae}")
        if not all(isinstance(each, dict) for each in (self.versions, self.parity)):
            raise ValueError("versions or parity")
        if not {"weights_sha256", "vae_sha256"} <= self.source.keys() or REFERENCE not in files:
            raise ValueError(f"no hashes of the weights, or no {REFERENCE}")


def check_output(output: Path) -> None:
    """Raise ConfigError or DeployError unless an engine's folder can be made here."""
    check_writable(output.resolve().parent, "--output")
    if output.exists() or output.is_symlink():
        raise DeployError(f"{output} exists; choose another --output, or remove it")


def check_file(path: Path, size: int, digest: str) -> None:
    """Raise DeployError unless a file is there, of this size and SHA-256."""
    if not path.is_file():
        raise DeployError(f"{path} is missing; restore it from a copy, or export the engine again")
    if path.stat().st_size != size:
        raise DeployError(
            f"{path} has {path.stat().st_size:,} bytes, and had {size:,}: it was cut short or changed; restore it from "
            "a copy, or export the engine again"
        )
    if sha256(path) != digest:
        raise DeployError(f"{path} is not what was exported; restore it from a copy, or export the engine again")
