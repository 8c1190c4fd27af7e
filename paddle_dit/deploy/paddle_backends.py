"""Programs in Paddle: as they are (dygraph), traced in memory (static), or by Paddle Inference from files."""

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import paddle

from paddle_dit.deploy.backends import Settings, explained, first_line
from paddle_dit.deploy.specs import ProgramSpec
from paddle_dit.deploy.tracing import save_traced, trace
from paddle_dit.errors import ConfigError, DeployError
from paddle_dit.half_precision import check_precision
from paddle_dit.runtime import has_gpu


def check_device(settings: Settings) -> None:
    """Refuse a GPU where Paddle sees none, and half precision on the CPU."""
    if settings.device != "cpu" and not has_gpu():
        raise DeployError(
            f"{settings.device}: this Paddle sees no GPU; install a GPU build, or export with --device cpu"
        )
    check_precision(settings.precision)


class PaddleProgram:
    """A function of Paddle tensors. Calls wait for each other: one of them has all of the machine's threads.

    Args:
        call: takes the inputs in the specification's order, and returns the outputs, one alone or several.
        spec: names them.
        layer: of which the function is a part, so that it lives as long.
    """

    def __init__(self, call, spec: ProgramSpec, layer: paddle.nn.Layer | None = None):
        self._call, self._spec, self._layer, self._turn = call, spec, layer, threading.Lock()

    def run(self, inputs: Mapping, *, keep: bool = False) -> dict:
        """See :class:`~paddle_dit.deploy.backends.Program`."""
        with self._turn, explained(), paddle.no_grad():
            values = (inputs[name] for name in self._spec.inputs)
            tensors = [paddle.to_tensor(value) if isinstance(value, np.ndarray) else value for value in values]
            outputs = self._call(*tensors)
            outputs = [outputs] if isinstance(outputs, paddle.Tensor) else outputs
            named = dict(zip(self._spec.outputs, outputs, strict=True))
            return named if keep else {name: value.numpy() for name, value in named.items()}


class Dygraph:
    """The layers as they are."""

    name, in_memory, bound = "dygraph", True, False

    def check(self, settings: Settings) -> None:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        if settings.precision != "fp32":
            raise ConfigError(f"programs in memory run in fp32; for {settings.precision} export an engine")
        check_device(settings)

    def wrap(self, layer: paddle.nn.Layer, spec: ProgramSpec, settings: Settings) -> PaddleProgram:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        return PaddleProgram(lambda *inputs: layer(**dict(zip(spec.inputs, inputs, strict=True))), spec)

    def versions(self) -> dict[str, str]:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        return {"paddle": paddle.__version__}


class Static(Dygraph):
    """Programs traced from the layers, and run by Paddle's executor."""

    name = "static"

    def wrap(self, layer: paddle.nn.Layer, spec: ProgramSpec, settings: Settings) -> PaddleProgram:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        return PaddleProgram(trace(layer, spec), spec, layer)


class PaddleInference:
    """Programs in files, run by Paddle Inference.

    Its oneDNN kernels are off: on Paddle 3.3 they give wrong numbers for what the timesteps are embedded by.
    """

    name, in_memory, bound = "paddle", False, True

    def check(self, settings: Settings) -> None:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        check_device(settings)
        if settings.cuda_graph:
            raise ConfigError("Paddle Inference replays no CUDA graphs; leave --cuda-graph out")

    def save(self, layer: paddle.nn.Layer, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> None:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        save_traced(layer, spec, folder / name)

    def open(self, spec: ProgramSpec, folder: Path, name: str, settings: Settings) -> PaddleProgram:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        return self.load(folder / name, spec, settings)

    def load(self, stem: Path, spec: ProgramSpec, settings: Settings) -> PaddleProgram:
        """Load the program in ``<stem>.json`` and ``<stem>.pdiparams``."""
        from paddle import inference

        try:
            predictor = inference.create_predictor(self.configure(stem, settings))
        except (RuntimeError, ValueError) as error:
            raise DeployError(
                f"Paddle Inference cannot open {stem}.json ({first_line(error)}); export it again"
            ) from None
        order = [list(spec.inputs).index(input_name) for input_name in predictor.get_input_names()]

        def call(*inputs):
            # Copied, because the predictor's outputs lie in its own memory, which its next call overwrites.
            return [output.clone() for output in predictor.run([inputs[index] for index in order])]

        return PaddleProgram(call, spec)

    def configure(self, stem: Path, settings: Settings):
        """Return Paddle Inference's configuration; on a GPU it has not been run yet."""
        from paddle import inference

        config = inference.Config(f"{stem}.json", f"{stem}.pdiparams")
        config.enable_new_executor()
        config.enable_new_ir(True)
        config.disable_glog_info()
        if settings.device == "cpu":
            config.disable_gpu()
            config.disable_mkldnn()
            config.set_cpu_math_library_num_threads(settings.thread_count)
        else:
            kinds = inference.PrecisionType
            kind = {"fp32": kinds.Float32, "fp16": kinds.Half, "bf16": kinds.Bfloat16}[settings.precision]
            config.enable_use_gpu(256, settings.device_number, kind)
        return config

    def versions(self) -> dict[str, str]:
        """See :class:`~paddle_dit.deploy.backends.Backend`."""
        return {"paddle": paddle.__version__}
