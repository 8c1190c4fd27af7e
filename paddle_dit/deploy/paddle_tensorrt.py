"""Paddle's programs compiled by TensorRT. Not run on a GPU yet: Paddle's CPU build has no ``paddle.tensorrt``."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import paddle

from paddle_dit.deploy.backends import Settings
from paddle_dit.deploy.paddle_backends import PaddleInference, PaddleProgram
from paddle_dit.deploy.specs import ProgramSpec
from paddle_dit.errors import DeployError
from paddle_dit.files import appears_whole, sha256

# Kept out of TensorRT, and so in float32: the sinusoids of the timesteps, which reach 999, and LayerNorm's sums.
DELICATE = ("pd_op.cos", "pd_op.sin", "pd_op.exp", "pd_op.layer_norm")
WORKSPACE = 2**32


def warm_up(spec: ProgramSpec, name: str) -> tuple[np.ndarray, ...]:
    """Return examples of an input at its smallest, its most usual and its largest size, which is also the usual one."""
    random, dtype = np.random.default_rng(0), spec.inputs[name][0]
    shapes = [spec.shape_of(name, largest) for largest in (False, True, True)]
    if dtype == "float32":
        return tuple(random.standard_normal(shape, np.float32) for shape in shapes)
    return tuple(random.integers(0, spec.largest.get(name, 0) + 1, shape) for shape in shapes)


class PaddleTensorRT(PaddleInference):
    """The backend. The portable program is what is exported; what TensorRT makes of it here lies in a cache beside."""

    name = "paddle-tensorrt"

    def check(self, settings: Settings) -> None:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        if importlib.util.find_spec("paddle.tensorrt") is None:
            raise DeployError(
                "this Paddle has no TensorRT; install a GPU build of Paddle and TensorRT, or take --backend paddle"
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
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _convert(self, stem: Path, spec: ProgramSpec, settings: Settings, target: Path) -> None:
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
