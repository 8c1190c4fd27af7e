"""Everything that can run a program, behind one interface: named arrays in, named arrays out.

A backend is chosen by name; its own module, and with it Paddle or ONNX Runtime, is imported when it is first asked for.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from paddle_dit.config import Dtype
from paddle_dit.deploy.specs import ProgramSpec
from paddle_dit.errors import ConfigError, DeployError, nearest

_OUT_OF_MEMORY = ("ResourceExhausted", "Out of memory", "out of memory", "Failed to allocate memory", "bad_alloc")


class Program(Protocol):
    """A program that runs; safe to be called by several threads at once."""

    def run(self, inputs: Mapping[str, Any], *, keep: bool = False) -> dict[str, Any]:
        """Compute the outputs by name.

        Args:
            inputs: NumPy arrays by name, or values that a program of the same backend kept.
            keep: leave the outputs where the backend has them, on a GPU say, for a later program's inputs; else they
                are NumPy arrays.
        """


@dataclass(frozen=True)
class Settings:
    """How a backend is to run.

    Attributes:
        precision: "fp32", "fp16" or "bf16".
        max_batch_size: images that a program is given at most.
        devices: a mesh of devices, "cpu" or "gpu:0" and so on; one today.
        cuda_graph: capture the step on a GPU once for each batch size, and replay it.
        threads: of the CPU; None takes all that this process may have.

    Raises:
        ConfigError: any of them is something else.
    """

    precision: str = "fp32"
    max_batch_size: int = 8
    devices: tuple[str, ...] = ("cpu",)
    cuda_graph: bool = False
    threads: int | None = None

    def __post_init__(self):
        if self.precision not in get_args(Dtype):
            raise ConfigError(f"precision must be {', '.join(get_args(Dtype))}, got '{self.precision}'")
        for name in ("max_batch_size", "threads"):
            value = getattr(self, name)
            if not (name == "threads" and value is None) and not (type(value) is int and value >= 1):
                raise ConfigError(f"{name} must be an integer, 1 or more, got {value!r}")
        if len(self.devices) != 1:
            raise ConfigError(f"an engine runs on one device, got {len(self.devices)}: {', '.join(self.devices)}")
        if not re.fullmatch("cpu|gpu:[0-9]{1,3}", str(self.device)):
            raise ConfigError(f"device must be cpu, or gpu:0 and so on, got '{self.device}'")
        if type(self.cuda_graph) is not bool:
            raise ConfigError(f"cuda_graph must be true or false, got {self.cuda_graph!r}")

    @property
    def device(self) -> str:
        """The device."""
        return self.devices[0]

    @property
    def device_number(self) -> int:
        """The GPU's number, 1 of "gpu:1" say; 0 for the CPU."""
        return int(self.device.partition(":")[2] or 0)

    @property
    def thread_count(self) -> int:
        """Threads of the CPU."""
        return self.threads or len(os.sched_getaffinity(0))


class Backend(Protocol):
    """A way to run programs: from files, or from Paddle layers in memory.

    Attributes:
        name: of the backend.
        in_memory: it has :meth:`wrap`, else :meth:`save` and :meth:`open`.
        bound: its files are for the very versions that wrote them.
    """

    name: str
    in_memory: bool
    bound: bool

    def check(self, settings: Settings) -> None:
        """Raise DeployError or ConfigError if this machine cannot run programs so."""

    def wrap(self, layer, spec: ProgramSpec, settings: Settings) -> Program:
        """Make a program of a Paddle layer."""

    def save(self, layer, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> None:
        """Compile a Paddle layer into files of ``folder`` whose names begin with ``name``."""

    def open(self, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> Program:
        """Load what :meth:`save` wrote."""

    def versions(self) -> dict[str, str]:
        """Return the versions of what runs the programs."""


ExportBackend = Literal["onnxruntime", "paddle", "onnxruntime-tensorrt", "paddle-tensorrt"]  # those that have files
_ROOM = "paddle_dit.deploy"
BACKENDS = {
    "onnxruntime": (f"{_ROOM}.onnx_runtime", "OnnxRuntime", "onnxruntime"),
    "onnxruntime-tensorrt": (f"{_ROOM}.onnx_runtime", "OnnxRuntimeTensorRT", "onnxruntime"),
    "paddle": (f"{_ROOM}.paddle_backends", "PaddleInference", "paddle"),
    "paddle-tensorrt": (f"{_ROOM}.paddle_tensorrt", "PaddleTensorRT", "paddle"),
    "static": (f"{_ROOM}.paddle_backends", "Static", "paddle"),
    "dygraph": (f"{_ROOM}.paddle_backends", "Dygraph", "paddle"),
}
FALLBACKS = {"onnxruntime-tensorrt": "onnxruntime", "paddle-tensorrt": "paddle"}
_PACKAGES = {"onnxruntime": "onnxruntime", "paddle": "paddlepaddle"}


def find_backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        ConfigError: no such backend.
        DeployError: what it needs is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend '{name}'.{nearest(name, BACKENDS)} Known: {', '.join(BACKENDS)}")
    module, backend, package = BACKENDS[name]
    try:
        return getattr(import_module(module), backend)()
    except ImportError as error:
        raise DeployError(
            f"the backend '{name}' needs {package}, which cannot be imported here ({error}); pip install "
            f"{_PACKAGES[package]} of the version in requirements.txt, or export for another backend"
        ) from None


def open_programs(
    name: str, versions: Mapping[str, str], specs: Mapping[str, ProgramSpec], folder: Path, settings: Settings
) -> tuple[Backend, dict[str, Program]]:
    """Return an engine's programs, opened, and the backend that runs them.

    Args:
        name: of the backend.
        versions: with which the engine was made.
        specs: of the programs, by name.
        folder: of their files.
        settings: for the backend.

    Raises:
        DeployError, ConfigError: it cannot run here so, or cannot open them.
    """
    backend = find_backend(name)
    backend.check(settings)
    if backend.bound and (different := differences(versions, backend.versions())):
        raise DeployError(
            f"the engine was made with {different}; install those versions, or export it again with these"
        )
    return backend, {program: backend.open(spec, folder, program, settings) for program, spec in specs.items()}


def plain_backend(name: str, settings: Settings) -> tuple[str, Settings]:
    """Return the plain backend of the same kind on the CPU, and its settings.

    Files for ONNX Runtime have their precision in them; those for Paddle are in float32, as is its CPU.
    """
    precision = settings.precision if BACKENDS[name][2] == "onnxruntime" else "fp32"
    return FALLBACKS.get(name, name), replace(settings, devices=("cpu",), precision=precision, cuda_graph=False)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the versions that are not what they were, as text; empty where all are."""
    names = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name} {before[name]} (here {now[name]})" for name in names)


@contextmanager
def explained() -> Iterator[None]:
    """Turn a backend's report that memory is at an end into a DeployError."""
    try:
        yield
    except MemoryError as error:
        raise _out_of_memory(error) from error
    except Exception as error:
        if any(mark in str(error) for mark in _OUT_OF_MEMORY):
            raise _out_of_memory(error) from error
        raise


def _out_of_memory(error: Exception) -> DeployError:
    return DeployError(
        f"out of memory ({first_line(error)}); draw fewer images at once with --batch-size, or close other programs"
    )


def first_line(error: Exception) -> str:
    """Return what a backend says first, cut to what fits a line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]
