"""What an evaluation says: a table in which every figure states what it is, ``metrics.json``, VisualDL."""

import re
from pathlib import Path

from paddle_dit.errors import ConfigError, DataError
from paddle_dit.evaluation.features import Features
from paddle_dit.evaluation.suite import Evaluation, Measured
from paddle_dit.files import check_writable, read_json, write_json
from paddle_dit.pictures import RECORD
from paddle_dit.runtime import environment

FILE = "metrics.json"
# Of the record beside drawn images; the names are those of scripts/sample.py.
_DRAWN = (
    "sampler",
    "num_inference_steps",
    "timestep_spacing",
    "guidance_scale",
    "guidance_channels",
    "guidance_interval",
    "precision",
    "seed",
    "model",
    "weights",
    "vae",
)
_OF_EACH = ("class_labels", "parts")  # of the record: as long as the samples
_PRECISION = {"precision": 3, "recall": 3}


def drawn_with(samples: Path) -> dict:
    """Return the record of how samples were drawn: ``samples.json`` in their folder, or ``NAME.json`` beside NAME.npz.

    Returns:
        Its values without what is said of each image; empty where there is none, or it cannot be read.
    """
    return {key: value for key, value in _record(_record_file(samples)).items() if key not in _OF_EACH}


def check_drawn(samples: Path, count: int) -> None:
    """Refuse a set that ``scripts/sample_ddp.py`` has not finished, or of which images have gone or come since.

    Args:
        samples: its folder or its ``samples.npz``; anything else passes.
        count: images that are there.

    Raises:
        DataError: its ``samples.json`` plans another number of images, or does not say that it is complete.
    """
    file = _record_file(samples)
    record = _record(file) if file.name == RECORD else {}
    planned, complete = record.get("num_samples"), record.get("complete") is True
    if planned is None or (complete and count == planned):
        return
    state = (
        f"has other than the {planned} images of its {RECORD}" if complete else f"is unfinished, of {planned} images"
    )
    raise DataError(
        f"{samples} {state}: {count} are there; finish it with the same scripts/sample_ddp.py command, or move the "
        "images to a folder of their own to measure them as they are"
    )


def _record_file(samples: Path) -> Path:
    return samples / RECORD if samples.is_dir() else samples.with_suffix(".json")


def _record(file: Path) -> dict:
    try:
        return read_json(file, DataError)
    except DataError:
        return {}


def choose_file(samples: Path, output: Path | None, overwrite: bool) -> Path:
    """Return the file for the figures, as :func:`write` takes it; called before they are computed.

    Args:
        samples: what is evaluated: the file goes into its folder, or for NAME.npz beside it, as NAME.metrics.json.
        output: the file asked for instead, or None.
        overwrite: an earlier file may be replaced.

    Raises:
        ConfigError: it cannot be written, or is there and may not be replaced.
    """
    file = output or (samples / FILE if samples.is_dir() else samples.with_name(f"{samples.stem}.{FILE}"))
    check_writable(file.parent, "--output")
    if file.is_dir() or (output and output.exists() and not overwrite):
        raise ConfigError(f"{file} is there already; choose another --output or pass --overwrite")
    return file


def lines(
    evaluation: Evaluation, samples: Measured, reference: Measured | None, features: Features, drawn: dict
) -> list[str]:
    """Return the table: what was compared, each figure with what it is, the warnings."""
    about = features.about
    rows = [("samples", _told(samples.record)), ("drawn with", _drawn(drawn))]
    rows += [("reference", _told(reference.record))] if reference else []
    rows += [("features", f"{about['name']}, weights {about['weights'][:16]}"), ("resize", about["resize"])]
    table = [f"{name:<18}{text}" for name, text in rows] + [""]
    for key, figure in evaluation.figures.items():
        table.append(f"{figure.name:<18}{figure.value:<12,.{_PRECISION.get(key, 2)}f}{figure.meaning}")
    return [*table, *(f"warning: {line}" for line in evaluation.warnings)]


def _told(record: dict) -> str:
    """Return what a set is, in a line."""
    shape, told = record.get("image_shape"), [record["name"]]
    if record.get("count"):
        told.append(f"{record['count']:,} images" + (f" {shape[1]} x {shape[0]}" if shape else ""))
    if record["kind"] == "stored statistics":
        told.append("stored statistics" + (f" of {record['source']}" if record.get("source") else ""))
    if "statistics" in record:
        told.append(f"and stored statistics {record['statistics']['sha256'][:16]}, used for FID and sFID")
    return f"{', '.join(told)}, sha256 {record['sha256'][:16]}"


def _drawn(drawn: dict) -> str:
    """Return how samples were drawn, in a line."""
    told = [f"{key.replace('_', ' ')} {drawn[key]}" for key in _DRAWN if drawn.get(key) is not None]
    return ", ".join(told) or "not on record: no JSON beside the samples says sampler, steps or guidance"


def write(
    file: Path,
    evaluation: Evaluation,
    samples: Measured,
    reference: Measured | None,
    features: Features,
    drawn: dict,
    overwrite: bool,
) -> Path:
    """Write the figures and all that they depend on as JSON, and return the file.

    It is ``file``, unless that is there and may not be replaced: then a follower with -2, -3, ..., also where another
    evaluation writes at the same time.
    """
    figures = {key: {"value": figure.value, "of": figure.meaning} for key, figure in evaluation.figures.items()}
    values = {"figures": figures, "warnings": evaluation.warnings, "samples": samples.record, "drawn_with": drawn}
    values |= {"reference": reference.record if reference else None, "features": features.about}
    file.parent.mkdir(parents=True, exist_ok=True)
    values["environment"] = environment()
    if overwrite:
        write_json(file, values)
        return file
    file = _claim(file)
    try:
        write_json(file, values)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return file


def _claim(first: Path) -> Path:
    """Make an empty file that nobody else has: the first, or a follower."""
    file, number = first, 1
    while True:
        try:
            file.touch(exist_ok=False)
            return file
        except FileExistsError:
            number += 1
            file = first.with_stem(f"{first.stem}-{number}")


def log_to(folder: Path, evaluation: Evaluation, step: int) -> None:
    """Write the figures as VisualDL scalars ``evaluation/<key>`` of a step."""
    from visualdl import LogWriter

    with LogWriter(logdir=str(folder)) as log:
        for key, value in evaluation.values().items():
            log.add_scalar(tag=f"evaluation/{key}", value=value, step=step)


def step_of(drawn: dict) -> int:
    """Return the training step in the record of how samples were drawn, or that a checkpoint's name ends with, or 0."""
    if isinstance(drawn.get("step"), int):
        return drawn["step"]
    found = re.search(r"checkpoint-(\d+)/?$", str(drawn.get("model", "")))
    return int(found[1]) if found else 0
