"""Paddle's programs compiled by TensorRT. Not run on a GPU yet: Paddle's CPU build has no ``paddle.tensorrt``."""

import importlib.util
from pathlib import Path

import numpy as np
import paddle

from paddle_dit.deploy.backends import Settings, first_line
from paddle_dit.deploy.paddle_backends import PaddleInference, PaddleProgram
from paddle_dit.deploy.specs import ProgramSpec
from paddle_dit.errors import DeployError
from paddle_dit.files import appears_whole, describe, digest_of, read_json, sha256, write_json

# Kept out of TensorRT, and so in float32: the sinusoids of the timesteps, which reach 999, and LayerNorm's sums.
DELICATE = ("pd_op.cos", "pd_op.sin", "pd_op.exp", "pd_op.layer_norm")
WORKSPACE = 2**32
HASHES = "hashes.json"  # of what was compiled, beside it


def warm_up(spec: ProgramSpec, name: str) -> tuple[np.ndarray, ...]:
    """Return examples of an input at its smallest, its most usual and its largest size, which is also the usual one."""
    random, dtype = np.random.default_rng(0), spec.inputs[name][0]
    shapes = [spec.shape_of(name, largest) for largest in (False, True, True)]
    if dtype == "float32":
        return tuple(random.standard_normal(shape, np.float32) for shape in shapes)
    return tuple(random.integers(0, spec.largest.get(name, 0) + 1, shape) for shape in shapes)


def hashes(folder: Path) -> dict[str, dict]:
    """Return size and hash of every file in a folder of compiled programs, by its name there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != HASHES)
    return {path.relative_to(folder).as_posix(): describe(path) for path in files}


def check_compiled(folder: Path) -> None:
    """Raise DeployError unless a folder holds what was compiled into it; what a library added later is no fault."""
    try:
        written, found = read_json(folder / HASHES, DeployError), hashes(folder)
        sound = all(found.get(name) == entry for name, entry in written.items())
    except DeployError:
        sound = False
    if not sound:
        raise DeployError(f"{folder} does not hold what TensorRT made there; remove it, and it will be made again")


class PaddleTensorRT(PaddleInference):
    """The backend. The portable program is what is exported; what TensorRT makes of it here lies in a cache beside."""

    name = "paddle-tensorrt"

    def check(self, settings: Settings) -> None:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        if importlib.util.find_spec("paddle.tensorrt") is None:
            raise DeployError(
                "this Paddle has no TensorRT; install a GPU build of it and TensorRT, or export with --backend paddle"
            )
        super().check(settings)

    def open(self, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> PaddleProgram:
        """See :class:`~paddle_dit.deploy.backends.Backend`; converts what is not in the cache yet."""
        stem = folder / name
        compiled = folder.parent / "tensorrt" / self._key(stem, spec, settings) / name
        if not compiled.parent.is_dir():
            with appears_whole(compiled.parent) as partial:
                partial.mkdir()
                self._convert(stem, spec, settings, partial / name)
                write_json(partial / HASHES, hashes(partial))
        check_compiled(compiled.parent)
        return self.load(compiled, spec, settings)

    def _key(self, stem: Path, spec: ProgramSpec, settings: Settings) -> str:
        """Return a hash of all that a compiled program depends on."""
        parts = {
            "program": sha256(stem.with_name(f"{stem.name}.json")),
            "weights": sha256(stem.with_name(f"{stem.name}.pdiparams")),
            "shapes": {name: spec.shape_of(name, largest=True) for name in spec.inputs},
            "precision": settings.precision,
            "versions": self.versions(),
            "device": paddle.device.cuda.get_device_name(),
        }
        return digest_of(parts)[:32]

    def _convert(self, stem: Path, spec: ProgramSpec, settings: Settings, target: Path) -> None:
        try:
            self._compile(stem, spec, settings, target)
        except Exception as error:  # of many classes, of Paddle, of TensorRT and of the import of either
            raise DeployError(
                f"TensorRT could not convert the program '{stem.name}' ({first_line(error)}); export with another "
                "--precision, or with --backend paddle"
            ) from error

    def _compile(self, stem: Path, spec: ProgramSpec, settings: Settings, target: Path) -> None:
        from paddle.tensorrt import Input, PrecisionMode, TensorRTConfig, convert

        # Inputs are given, because the ranges that integers are drawn from would otherwise not know their tables.
        inputs = [Input(warmup_data=warm_up(spec, name), name=name) for name in spec.inputs]
        config = TensorRTConfig(
            inputs,
            save_model_dir=str(target),
            precision_mode=PrecisionMode[settings.precision.upper()],
            disable_ops=list(DELICATE),
            workspace_size=WORKSPACE,
        )
        convert(str(stem), config)

    def versions(self) -> dict[str, str]:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        from paddle.base import core

        return {"paddle": paddle.__version__, "tensorrt": ".".join(map(str, core.get_trt_compile_version()))}
