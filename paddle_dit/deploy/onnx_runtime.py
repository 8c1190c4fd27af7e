"""Programs in ONNX Runtime, which needs no Paddle to run them. On a GPU nothing of this has been run yet."""

import math
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime

from paddle_dit.deploy.backends import Settings, explained
from paddle_dit.deploy.specs import CONDITIONING, ProgramSpec
from paddle_dit.errors import ConfigError, DeployError
from paddle_dit.runtime import child_environment

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class OnnxRuntimeProgram:
    """A program in a session of its own; sessions may be called by several threads at once."""

    def __init__(self, path: Path, settings: Settings, providers: list):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.thread_count
        options.log_severity_level = 3
        # Threads that wait busily for more after a call would slow the start of the next program, which has its own.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:  # without its own fallback to other providers, which it would take unasked
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
        except Exception as error:  # of many classes, none of which says more than its text
            needs = "" if settings.device == "cpu" else " and the CUDA, cuDNN and TensorRT that it is built for"
            reason = " ".join(str(error).split())[-160:]  # which begins with places in ONNX Runtime's sources
            raise DeployError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {path} (... {reason}); install the version "
                f"that the engine's deploy.json names{needs}, or export it again with this one"
            ) from None
        check_providers(self._session, [name for name, _ in providers])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._place = ("cpu", 0) if settings.device == "cpu" else ("cuda", settings.device_number)

    def run(self, inputs: Mapping, *, keep: bool = False) -> dict:
        """See :class:`~paddle_dit.deploy.backends.Program`."""
        inputs = {name: in_a_row(value) for name, value in inputs.items()}
        binding = self._bound(inputs)
        for name in self._outputs:
            binding.bind_output(name, *self._place)
        with explained():
            self._session.run_with_iobinding(binding)
        values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        return values if keep else {name: value.numpy() for name, value in values.items()}

    def _bound(self, inputs: Mapping) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for name, value in inputs.items():  # whose memory is used as it is, not copied
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        return binding

    def _empty(self, shape: tuple[int, ...], dtype: type) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *self._place)


class TableProgram(OnnxRuntimeProgram):
    """The conditioning, whose tables all have one size, so that one captured step serves all; their first rows count.

    Args:
        rows: of a table.
    """

    def __init__(self, path: Path, settings: Settings, providers: list, rows: int):
        super().__init__(path, settings, providers)
        self._rows, self._width = rows, self._session.get_outputs()[0].shape[1]

    def run(self, inputs: Mapping, *, keep: bool = False) -> dict:
        """See :class:`~paddle_dit.deploy.backends.Program`; rows past those of the inputs hold anything."""
        if not keep:
            return super().run(inputs)
        inputs = {name: in_a_row(value) for name, value in inputs.items()}
        binding, (name,) = self._bound(inputs), self._outputs
        with explained():
            table, count = self._empty((self._rows, self._width), np.float32), math.prod(map(len, inputs.values()))
            binding.bind_output(name, *self._place, np.float32, (count, self._width), table.data_ptr())
            self._session.run_with_iobinding(binding)
        return {name: table}


class ReplayedProgram(OnnxRuntimeProgram):
    """The same from and to fixed addresses, one set for all inputs of the same shapes, as a captured CUDA graph wants.

    Calls take turns in a thread of its own, because ONNX Runtime allows a session with CUDA graphs no other. What is
    kept is copied from one place of the device to another.
    """

    def __init__(self, path: Path, settings: Settings, providers: list):
        super().__init__(path, settings, providers)
        self._captured, self._fixed, self._written, self._thread = {}, {}, {}, ThreadPoolExecutor(1)

    def run(self, inputs: Mapping, *, keep: bool = False) -> dict:
        """See :class:`~paddle_dit.deploy.backends.Program`."""
        return self._thread.submit(self._run, inputs, keep).result()

    def _run(self, inputs: Mapping, keep: bool) -> dict:
        shapes = tuple((name, shape_of(value)) for name, value in inputs.items())
        with explained():
            for place, value in zip(shapes, inputs.values(), strict=True):
                self._write(place, value)
            if shapes not in self._captured:
                self._captured[shapes] = self._capture(shapes)
            binding, options = self._captured[shapes]
            self._session.run_with_iobinding(binding, options)
            found = dict(zip(self._outputs, binding.get_outputs(), strict=True))
            return {name: self._copy(value) if keep else value.numpy().copy() for name, value in found.items()}

    def _write(self, place: tuple[str, tuple[int, ...]], value) -> None:
        """Put an input where all of its name and shape go, but not again what was put there last: a table, say."""
        last = self._written.pop(place, None)
        if last is None or last() is not value:
            if place not in self._fixed:
                dtype = value.dtype.type if isinstance(value, np.ndarray) else np.float32
                self._fixed[place] = self._empty(place[1], dtype)
            copy_into(self._fixed[place], in_a_row(value))
        if not isinstance(value, np.ndarray):  # which its owner may change
            self._written[place] = weakref.ref(value)

    def _capture(self, shapes: tuple) -> tuple:
        binding, (once, always) = self._session.io_binding(), (onnxruntime.RunOptions() for _ in range(2))
        once.add_run_config_entry("gpu_graph_id", "-1")  # captures nothing
        always.add_run_config_entry("gpu_graph_id", str(len(self._captured) + 1))
        for name, shape in shapes:
            binding.bind_ortvalue_input(name, self._fixed[name, shape])
        for name in self._outputs:
            binding.bind_output(name, *self._place)
        self._session.run_with_iobinding(binding, once)  # which makes the outputs, whose addresses are fixed then
        for name, value in zip(self._outputs, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
        return binding, always

    def _copy(self, value: onnxruntime.OrtValue) -> onnxruntime.OrtValue:
        copy = self._empty(value.shape(), np.float32)
        copy_into(copy, value)
        return copy


def copy_into(target: onnxruntime.OrtValue, value) -> None:
    """Copy an array or a kept value to another's place."""
    try:
        target.update_inplace(value)
    except TypeError:  # of ONNX Runtime 1.23, which copies from the host alone
        target.update_inplace(value.numpy())


def check_providers(session: onnxruntime.InferenceSession, asked: list[str]) -> None:
    """Raise DeployError unless a session has the execution providers that it was to have, before any other.

    ONNX Runtime only warns of one that it was built with and cannot load, and goes on with the rest.
    """
    found = session.get_providers()
    if found[: len(asked)] != asked:
        missing = next((name for name in asked if name not in found), asked[0])
        raise DeployError(
            f"ONNX Runtime could not load {missing}, and would run on {found[0]}; install the CUDA, cuDNN and TensorRT "
            "that this onnxruntime-gpu is built for, or export with --backend onnxruntime --device cpu"
        )


def shape_of(value) -> tuple[int, ...]:
    """Return the shape of an array or of a kept value."""
    return tuple(value.shape if isinstance(value, np.ndarray) else value.shape())


def in_a_row(value):
    """Return an array whose numbers lie in a row, or a kept value as it is."""
    return np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value


class OnnxRuntime:
    """The backend, with ONNX Runtime's own kernels."""

    name, in_memory, bound = "onnxruntime", False, False

    def check(self, settings: Settings) -> None:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        if settings.precision == "bf16":
            raise ConfigError("ONNX Runtime has few kernels for bf16; take --precision fp32 or fp16")
        if settings.cuda_graph and settings.device == "cpu":
            raise ConfigError("--cuda-graph needs a GPU; leave it out, or take --device gpu:0")
        names = [name for name, _ in self.providers(settings, None)]
        missing = [name for name in names if name not in onnxruntime.get_available_providers()]
        if missing:
            raise DeployError(
                f"this ONNX Runtime has no {missing[0]}; install onnxruntime-gpu and what it needs, or export with "
                "--backend onnxruntime --device cpu"
            )

    def providers(self, settings: Settings, spec: ProgramSpec | None, cache: Path | None = None) -> list:
        """Return ONNX Runtime's execution providers with their options.

        Args:
            settings: device, precision and so on.
            spec: of the program, or None where the options do not matter.
            cache: folder for what a compiler made.
        """
        if settings.device == "cpu":
            return [(_PROVIDERS["cpu"], {})]
        options = {"device_id": settings.device_number, "enable_cuda_graph": int(settings.cuda_graph)}
        return [(_PROVIDERS["cuda"], options)]

    def save(self, layer, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> None:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        from paddle_dit.deploy.tracing import save_traced

        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            traced = save_traced(layer, spec, Path(scratch) / name)
            command = [sys.executable, "-m", "paddle_dit.deploy.onnx_export", str(traced), str(folder / f"{name}.onnx")]
            done = subprocess.run(
                [*command, settings.precision, *spec.outputs],
                env=child_environment(),
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        if done.returncode != 0:
            told = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
            reason = told[0].strip() if told else "it said nothing"
            raise DeployError(f"paddle2onnx could not write the program '{name}' (exit {done.returncode}): {reason}")

    def open(self, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> OnnxRuntimeProgram:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        path, cache = folder / f"{name}.onnx", folder.parent / "tensorrt"
        if settings.cuda_graph and name == CONDITIONING:  # runs once an image, with inputs of too many shapes
            settings = replace(settings, cuda_graph=False)
            return TableProgram(path, settings, self.providers(settings, spec, cache), spec.sizes["rows"])
        kind = ReplayedProgram if settings.cuda_graph else OnnxRuntimeProgram
        return kind(path, settings, self.providers(settings, spec, cache))

    def versions(self) -> dict[str, str]:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        return {"onnxruntime": onnxruntime.__version__}


class OnnxRuntimeTensorRT(OnnxRuntime):
    """The same programs compiled by TensorRT where they are opened; ONNX Runtime keeps what it compiled in a cache."""

    name = "onnxruntime-tensorrt"

    def providers(self, settings: Settings, spec: ProgramSpec | None, cache: Path | None = None) -> list:
        """See :class:`OnnxRuntime`; what TensorRT cannot take runs by ONNX Runtime's CUDA kernels."""
        if settings.device == "cpu":
            raise ConfigError("TensorRT needs a GPU; take --device gpu:0, or --backend onnxruntime")
        options = {
            "device_id": settings.device_number,
            "trt_cuda_graph_enable": settings.cuda_graph,
            "trt_fp16_enable": settings.precision == "fp16",
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": True,
        }
        for largest, kinds in ((False, ("min",)), (True, ("opt", "max"))):
            shapes = {name: spec.shape_of(name, largest) for name in spec.inputs} if spec else {}
            text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            options |= {f"trt_profile_{kind}_shapes": text for kind in kinds}
        return [(_PROVIDERS["tensorrt"], options), *super().providers(settings, spec)]
