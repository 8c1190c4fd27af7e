"""The same weights for every row of latency_ladder.py: as a model, a DiTPipeline folder, PyTorch's, an engine."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ladder_peers import PIPELINE, TRANSFORMER, VAE
from ladder_rows import Row
from turns import peer_is_missing

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.deploy.backends import Settings, find_backend
from paddle_dit.errors import ConversionError, PaddleDiTError
from paddle_dit.runtime import child_environment

EXPORT = Path(__file__).resolve().parents[1] / "scripts" / "export_inference.py"
DIGITS_VAE = "data/digits_vae"


def write_random_model(preset: str, folder: Path) -> Path:
    """Write a model with random weights, none of which is zero as they are before training, and return its folder."""
    from paddle_dit.conversion.outputs import write_model
    from paddle_dit.models.refit import parameter_shapes

    config, random = DiTConfig.from_preset(preset), np.random.default_rng(0)
    tensors = {
        name: (0.03 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    write_model(tensors, ModelInfo(config, None, None), folder / "model", "paddle_dit")
    return folder / "model"


class Weights:
    """Files made when a row first needs them.

    Args:
        source: a model, as ``load_generator`` takes it.
        vae: folder of its VAE, or None for its own.
        folder: to write into.
        peer_python: interpreter with PyTorch.
    """

    def __init__(self, source: Path, vae: str | None, folder: Path, peer_python: str):
        from paddle_dit.conversion import read_weights
        from paddle_dit.models.vae import load_vae

        self.source, self.vae, self._folder, self._peer_python = source, vae, folder, peer_python
        self._tensors, self.info = read_weights(source)
        own = (self.info.vae or {}).get("name") or ""
        self._loaded = load_vae(vae or (str(source) if (source / "vae").is_dir() else own))

    def prepare(self, name: str, row: Row, max_batch_size: int, device: str) -> None:
        """Write what a row needs; each kind of file once.

        Raises:
            PaddleDiTError: the row cannot run here, and why.
        """
        if name == "diffusers" and (missing := peer_is_missing(self._peer_python)):
            raise PaddleDiTError(f"{self._peer_python} has no PyTorch with diffusers ({missing})")
        if row.on_gpu:
            device = "gpu:0" if device == "cpu" else device  # so that the backend says what is missing
            find_backend(row.backend).check(Settings(row.precision, max_batch_size, (device,), row.cuda_graph))
        if row.peer:
            self._write_once(PIPELINE, self._write_pipeline)
        if name == "diffusers":
            self._write_once(TRANSFORMER, self._write_transformer)
            self._write_once(VAE, self._write_vae)
        if row.engine_backend:
            self._write_once(row.engine_folder(), lambda path: self._export(path, row, max_batch_size, device))

    def _write_once(self, name: str, write) -> None:
        if not (self._folder / name).exists():
            write(self._folder / name)

    def _write_pipeline(self, path: Path) -> None:
        from paddle_dit.conversion import write_pipeline
        from paddle_dit.conversion.keymaps import stock_can_guide
        from paddle_dit.data.classes import Classes
        from paddle_dit.diffusion.options import can_guide

        if can_guide(self.info.config) and not stock_can_guide(self.info.config):
            raise ConversionError("DiTPipeline cannot guide this model, whose null class is not its row 1000")
        names = Classes(self.info.config.num_classes, self.info.label_names).id2label
        write_pipeline(self._tensors, self.info, self._loaded, path, id2label=names, verify=False)

    def _write_transformer(self, path: Path) -> None:
        from paddle_dit.conversion.outputs import write_model

        write_model(self._tensors, self.info, path, "diffusers")

    def _write_vae(self, path: Path) -> None:
        """Write the VAE for PyTorch, whose linear weights lie the other way."""
        from paddle_dit.writers import write_safetensors

        def turned() -> Iterator[tuple[str, np.ndarray]]:
            for name, tensor in self._loaded.state_dict().items():
                yield name, np.ascontiguousarray(tensor.numpy().T if tensor.ndim == 2 else tensor.numpy())

        self._loaded.save_config(str(path))
        shapes = {name: array.shape for name, array in turned()}
        write_safetensors(path / "diffusion_pytorch_model.safetensors", shapes, turned(), {"format": "pt"})

    def _export(self, path: Path, row: Row, max_batch_size: int, device: str) -> None:
        """Make an engine as users do, in a process of its own, which a compiler may end."""
        options = {
            "--pipeline": self.source,
            "--output": path,
            "--backend": row.engine_backend,
            "--precision": row.precision,
            "--max-batch-size": max_batch_size,
            "--device": device,
        }
        if self.vae is not None:
            options["--vae"] = self.vae
        command = [sys.executable, str(EXPORT), *(str(word) for pair in options.items() for word in pair)]
        done = subprocess.run(
            [*command, *(["--cuda-graph"] if row.cuda_graph else [])],
            env=child_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            told = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise PaddleDiTError(told[-1].strip().removeprefix("error: "))
