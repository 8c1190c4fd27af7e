"""A few images to look at: a grid, a PNG each, and what it takes to draw them again."""

import time
from collections.abc import Callable
from pathlib import Path

from paddle_dit.errors import ConfigError
from paddle_dit.generation import draw_images
from paddle_dit.pictures import hold_folder, save_images
from paddle_dit.sampling.drawing import Drawing, closing_line
from paddle_dit.sampling.options import SampleOptions

_WEIGHTS = {"weights_sha256": "--ckpt", "vae_sha256": "--vae"}  # of a record; and the option that mends a difference


def draw_few(options: SampleOptions, former: dict, report: Callable[[str], None] = print) -> None:
    """Draw and write a set of images.

    Args:
        options: see there.
        former: the record of images that are drawn again, or an empty one. Of a PNG's record only that image is
            written, though its whole batch is drawn, on which its last bits depend.
        report: is told, in a line each, what may make a difference to the former images, and what was written.

    Raises:
        ConfigError: options that cannot be used, or weights other than the record's. Nothing has been overwritten.
        CheckpointError, ConversionError: weights or VAE that are missing, damaged or cannot be read.
    """
    options.check()
    with hold_folder(options.output, options.overwrite) as folder:
        drawing = Drawing.open(options, options.batch_size)
        _compare(former, drawing.record, options, report)
        _draw(folder, drawing, options, former.get("index"), report)


def _draw(
    folder: Path, drawing: Drawing, options: SampleOptions, again: int | None, report: Callable[[str], None]
) -> None:
    """Draw all images, and write them, or of those that are drawn again the one of this number."""
    classes, first = drawing.source.classes, options.first_index
    labels = classes.resolve(options.class_labels) if options.class_labels else classes.default_labels()
    started = time.perf_counter()
    images = draw_images(drawing.source, labels, drawing.sampling, options.batch_size, first)
    seconds = time.perf_counter() - started
    one = [position for position in range(len(labels)) if first + position == again]
    kept = one or list(range(len(labels)))
    records = [drawing.record_of(position, labels, first) for position in kept]
    whole = {**drawing.record, "first_index": first, "class_labels": labels}
    captions = [classes.name_of(labels[position]) for position in kept]
    grid = save_images(folder, images[kept], captions, records[0] if one else whole, records)
    report(closing_line(grid, len(images), seconds))


def _compare(former: dict, present: dict, options: SampleOptions, report: Callable[[str], None]) -> None:
    for name, mend in _WEIGHTS.items():
        if name in former and former[name] != present[name]:
            raise ConfigError(f"{options.again} was drawn with other weights; give those with {mend}")
    before, now = (_conditions(record) for record in (former, present))
    told = [f"{name} {before[name]}, here {value}" for name, value in now.items() if before.get(name, value) != value]
    if former and told:
        report(f"{options.again} was drawn with {'; '.join(told)}: the last bits may differ")


def _conditions(record: dict) -> dict:
    """Return what the last bits depend on besides the options."""
    environment = record.get("environment")
    return {"device": record.get("device"), **(environment if isinstance(environment, dict) else {})}
