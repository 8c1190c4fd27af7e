"""Programs in ONNX Runtime, which needs no Paddle to run them."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from paddle_dit.deploy.backends import Settings
from paddle_dit.deploy.specs import ProgramSpec
from paddle_dit.errors import DeployError


class OnnxRuntimeProgram:
    """A program in a session of its own; sessions may be called by several threads at once."""

    def __init__(self, path: Path, settings: Settings):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.thread_count
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping, *, keep: bool = False) -> dict:
        """See :class:`~paddle_dit.deploy.backends.Program`."""
        binding = self._session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        return values if keep else {name: value.numpy() for name, value in values.items()}


class OnnxRuntime:
    """The backend."""

    name = "onnxruntime"

    def save(self, layer, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> None:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        from paddle_dit.deploy.tracing import save_traced

        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            traced = save_traced(layer, spec, Path(scratch) / name)
            command = [sys.executable, "-m", "paddle_dit.deploy.onnx_export", str(traced), str(folder / f"{name}.onnx")]
            done = subprocess.run([*command, *spec.outputs], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = ([line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
            raise DeployError(f"paddle2onnx could not write the program '{name}' (exit {done.returncode}): {reason}")

    def open(self, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> OnnxRuntimeProgram:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        return OnnxRuntimeProgram(folder / f"{name}.onnx", settings)

    def versions(self) -> dict[str, str]:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}
