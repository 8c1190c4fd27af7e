"""What ``scripts/evaluate.py`` can be asked for. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from paddle_dit.errors import ConfigError
from paddle_dit.files import check_writable


@dataclass
class Options:
    """What to measure, and how."""

    samples: Positional[Path]
    """Drawn images. With --features digits also digits-train or digits-heldout, the real ones."""
    reference: Positional[Path | None] = None
    """Real images, or their statistics. With --features digits also digits-train or digits-heldout."""
    features: Literal["inception", "digits"] = "inception"
    """inception: the network of all published figures, downloaded once (96 MB). digits: one for handwritten digits."""
    inception: Path | None = None
    """Its weights. Default: pt_inception-2015-12-05-6726825d.pth, in $PADDLE_DIT_CACHE or ~/.cache/paddle_dit."""
    crop: int | None = None
    """Crop the images of folders to squares of this side, as training data are; needed where sizes are mixed."""
    batch_size: int | None = None
    """Images at once. Default: 8 for inception on a CPU, 64 on a GPU."""
    neighbours: int = 50_000
    """Images of each side for precision and recall, evenly spread; 0 leaves these out. The ADM suite takes all."""
    save_stats: Path | None = None
    """Write the statistics of REFERENCE, or without one of SAMPLES, to this .npz: a faster REFERENCE next time."""
    output: Path | None = None
    """JSON with the figures. Default: metrics.json in the folder SAMPLES, or SAMPLES.metrics.json beside an .npz."""
    overwrite: bool = False
    """Replace earlier files."""
    log_to: Path | None = None
    """Folder that gets the figures as VisualDL scalars too."""
    step: int | None = None
    """Training step of the scalars. Default: that of the checkpoint on record, or 0."""

    def check(self) -> None:
        """Raise ConfigError for what can be seen to be wrong before anything is read."""
        for name, low in (("crop", 8), ("batch_size", 1), ("neighbours", 0), ("step", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"--{name.replace('_', '-')} must be {low} or more, got {value}")
        if self.log_to is not None:
            check_writable(self.log_to, "--log-to")
        if self.save_stats is not None:
            check_writable(self.save_stats.parent, "--save-stats")
            if self.save_stats.suffix != ".npz":
                raise ConfigError(f"--save-stats must end in .npz, got {self.save_stats}")
            if self.save_stats.exists() and not self.overwrite:
                raise ConfigError(
                    f"{self.save_stats} is there already; choose another --save-stats or pass --overwrite"
                )
