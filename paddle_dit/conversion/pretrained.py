"""The DiT that users of a library meet: the transformer, with the loading and saving that diffusers' users expect."""

from pathlib import Path

from paddle_dit.checkpoint import load_weights
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.loading import read_weights
from paddle_dit.conversion.outputs import write_model
from paddle_dit.models import dit


class DiT(dit.DiT):
    """A :class:`paddle_dit.models.dit.DiT` that is read from and written to folders.

    Attributes:
        info: configuration, names of the classes and VAE; they travel with the weights.

    Example:
        >>> model = DiT.from_pretrained("DiT-XL-2-256x256.pt")
        >>> model.save_pretrained("mine")
    """

    def __init__(self, config: DiTConfig, recompute_every: int = 0, info: ModelInfo | None = None):
        super().__init__(config, recompute_every)
        self.info = info or ModelInfo(config)

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = "ema", **hints) -> "DiT":
        """Return a model in evaluation mode.

        Args:
            path: a folder of :meth:`save_pretrained`, or any other place that
                :func:`~paddle_dit.conversion.loading.read_weights` takes, which also explains the rest.
            weights: "ema" or "model".
            hints: ``num_heads``, ``sample_size``, ``frequency_shift``, ``drop_trained_positions``.

        Raises:
            CheckpointError, ConversionError, ConfigError: as there.
        """
        tensors, info = read_weights(path, weights, **hints)
        model = cls(info.config, info=info)
        load_weights(model, tensors, path)
        model.eval()
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (float32); the folder appears whole.

        Args:
            folder: one that this has written is replaced.

        Raises:
            ConfigError: something else is there, or it cannot be made.
            ConversionError: a weight is NaN or infinite.
        """
        tensors = {name: tensor.astype("float32").numpy() for name, tensor in self.state_dict().items()}
        write_model(tensors, self.info, Path(folder), "paddle_dit", replace_own=True)
