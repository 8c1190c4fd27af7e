"""Everything that can run a program, behind one interface: named arrays in, named arrays out.

A backend is chosen by name; its own module, and with it Paddle or ONNX Runtime, is imported when it is first asked for.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from paddle_dit.deploy.specs import ProgramSpec
from paddle_dit.errors import ConfigError, nearest

PRECISIONS = ("fp32", "fp16", "bf16")


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
        devices: a mesh of devices, "cpu" or "gpu:0"; one today.
        cuda_graph: capture the step on a GPU once for each batch size, and replay it.
        threads: of the CPU; None takes all that this process may have.
    """

    precision: str = "fp32"
    max_batch_size: int = 8
    devices: tuple[str, ...] = ("cpu",)
    cuda_graph: bool = False
    threads: int | None = None

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be {', '.join(PRECISIONS)}, got '{self.precision}'")
        if self.max_batch_size < 1:
            raise ConfigError(f"max_batch_size must be 1 or more, got {self.max_batch_size}")
        if len(self.devices) != 1:
            raise ConfigError(f"an engine runs on one device, got {len(self.devices)}: {', '.join(self.devices)}")

    @property
    def device(self) -> str:
        """The device."""
        return self.devices[0]

    @property
    def thread_count(self) -> int:
        """Threads of the CPU."""
        return self.threads or len(os.sched_getaffinity(0))


class Backend(Protocol):
    """A way to compile, keep and run programs."""

    name: str

    def save(self, layer, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> None:
        """Compile a Paddle layer into files of ``folder`` whose names begin with ``name``."""

    def open(self, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> Program:
        """Load what :meth:`save` wrote."""

    def versions(self) -> dict[str, str]:
        """Return the versions of what runs the programs."""


BACKENDS = {
    "onnxruntime": ("paddle_dit.deploy.onnx_runtime", "OnnxRuntime"),
}


def find_backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        ConfigError: no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend '{name}'.{nearest(name, BACKENDS)} Known: {', '.join(BACKENDS)}")
    module, backend = BACKENDS[name]
    return getattr(import_module(module), backend)()
