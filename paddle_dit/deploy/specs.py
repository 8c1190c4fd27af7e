"""What the programs of an engine take and give, for every backend alike; nothing here imports Paddle.

Dimensions that a call chooses have names: ``images`` of a batch, ``copies`` of each (2 where it is guided: with its
class and without; else 1), ``rows`` of a modulation table, ``steps`` and ``labels`` that such a table is made for.
"""

from dataclasses import dataclass

from paddle_dit.config import DiTConfig
from paddle_dit.diffusion.schedule import NUM_TRAIN_TIMESTEPS
from paddle_dit.models.tiling import LARGEST_TILE, cut

MODEL, STEP, CACHED_STEP, CONDITIONING, DECODER = "model", "step", "cached_step", "conditioning", "decoder"
# What the input "coefficients" of a step holds, in this order; see diffusion.schedule.SamplerSteps. The deviation of
# the noise is ``sigma + learned * (what the model's variance says)``.
COEFFICIENTS = (
    "on_x",
    "on_eps",
    "on_previous_x0",
    "sigma",
    "learned",
    "min_log_variance",
    "max_log_variance",
    "x0_on_x",
    "x0_on_eps",
)
TABLE_BYTES = 2**28  # of modulations, at most, that are computed before they are used
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class ProgramSpec:
    """The inputs and outputs of a program.

    Attributes:
        inputs: name -> (dtype, shape); a dimension is a number, or the name of one that a call chooses.
        outputs: their names, in order; all float32.
        largest: name of an integer input -> its largest value, which some compilers want to know; 0 of others.
        sizes: name of a dimension -> its largest size; the smallest is 1.
    """

    inputs: dict[str, tuple[str, Shape]]
    outputs: tuple[str, ...]
    largest: dict[str, int]
    sizes: dict[str, int]

    def shape_of(self, name: str, largest: bool) -> tuple[int, ...]:
        """Return an input's shape at the largest sizes, or at the smallest."""
        dimensions = self.inputs[name][1]
        return tuple(size if isinstance(size, int) else (self.sizes[size] if largest else 1) for size in dimensions)


def modulation_width(config: DiTConfig) -> int:
    """Return how many numbers the conditioning makes of one timestep and label, for all blocks and the final layer."""
    return (6 * config.depth + 2) * config.hidden_size


def table_steps(config: DiTConfig, labels: int) -> int:
    """Return for how many timesteps the modulations of so many labels are computed at once."""
    return max(1, TABLE_BYTES // (4 * modulation_width(config) * labels))


def largest_sizes(config: DiTConfig, max_batch_size: int) -> dict[str, int]:
    """Return the largest size of every dimension that a call chooses; the smallest is always 1."""
    labels = min(max_batch_size + 1, config.label_rows)
    return {
        "images": max_batch_size,
        "copies": 2,
        "labels": labels,
        "steps": min(NUM_TRAIN_TIMESTEPS, table_steps(config, 1)),
        "rows": max(labels, table_steps(config, 1)),
    }


def tile_shape(config: DiTConfig) -> tuple[int, int]:
    """Return height and width of the latents that the decoder takes: all of an image's, or a tile's of large ones."""
    height, width = (stop - start for start, stop in (cut(side, LARGEST_TILE)[0] for side in config.height_width))
    return height, width


def program_specs(config: DiTConfig, max_batch_size: int) -> dict[str, ProgramSpec]:
    """Return every program of a model by name.

    ``model`` is the transformer alone, and ``step`` a whole step of any sampler around it: guidance, transformer and
    update. ``cached_step`` is the same given the rows of a table that ``conditioning`` made before. ``decoder`` turns
    latents, divided by the VAE's scaling factor, into pixels in [-1, 1].
    """
    latents = ("images", *config.sample_shape)
    pairs = ("copies", "images")
    update = {
        "x": ("float32", latents),
        "combination": ("float32", ("copies", config.in_channels)),
        "coefficients": ("float32", (len(COEFFICIENTS),)),
        "previous_x0": ("float32", latents),
        "noise": ("float32", latents),
    }
    table = ("float32", ("rows", modulation_width(config)))
    last, label = NUM_TRAIN_TIMESTEPS - 1, config.label_rows - 1
    ranges = {"timesteps": last, "class_labels": label}

    def integers(shape: Shape) -> dict:
        return {"timesteps": ("int64", shape), "class_labels": ("int64", shape)}

    inputs = {
        MODEL: {"x": ("float32", latents), **integers(("images",))},
        STEP: {**update, **integers(pairs)},
        CACHED_STEP: {**update, "modulation": table, "rows": ("int64", pairs)},
        CONDITIONING: {"timesteps": ("int64", ("steps",)), "class_labels": ("int64", ("labels",))},
        DECODER: {"latents": ("float32", ("images", config.in_channels, *tile_shape(config)))},
    }
    outputs = {
        MODEL: ("prediction",),
        STEP: ("next_x", "x0"),
        CACHED_STEP: ("next_x", "x0"),
        CONDITIONING: ("modulation",),
        DECODER: ("pixels",),
    }
    sizes = largest_sizes(config, max_batch_size)
    return {name: ProgramSpec(inputs[name], outputs[name], ranges, sizes) for name in inputs}
