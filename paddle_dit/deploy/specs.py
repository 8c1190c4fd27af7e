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
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class ProgramSpec:
    """The inputs and outputs of a program.

    Attributes:
        inputs: name -> (dtype, shape); a dimension is a number, or the name of one that a call chooses.
        outputs: their names, in order; all float32.
        largest: name of an integer input -> its largest value, which some compilers want to know.
    """

    inputs: dict[str, tuple[str, Shape]]
    outputs: tuple[str, ...]
    largest: dict[str, int]


def modulation_width(config: DiTConfig) -> int:
    """Return how many numbers the conditioning makes of one timestep and label, for all blocks and the final layer."""
    return (6 * config.depth + 2) * config.hidden_size


def tile_shape(config: DiTConfig) -> tuple[int, int]:
    """Return height and width of the latents that the decoder takes: all of an image's, or a tile's of large ones."""
    height, width = (stop - start for start, stop in (cut(side, LARGEST_TILE)[0] for side in config.height_width))
    return height, width


def program_specs(config: DiTConfig) -> dict[str, ProgramSpec]:
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

    return {
        MODEL: ProgramSpec({"x": ("float32", latents), **integers(("images",))}, ("prediction",), ranges),
        STEP: ProgramSpec({**update, **integers(pairs)}, ("next_x", "x0"), ranges),
        CACHED_STEP: ProgramSpec({**update, "modulation": table, "rows": ("int64", pairs)}, ("next_x", "x0"), {}),
        CONDITIONING: ProgramSpec(
            {"timesteps": ("int64", ("steps",)), "class_labels": ("int64", ("labels",))}, ("modulation",), ranges
        ),
        DECODER: ProgramSpec(
            {"latents": ("float32", ("images", config.in_channels, *tile_shape(config)))}, ("pixels",), {}
        ),
    }
