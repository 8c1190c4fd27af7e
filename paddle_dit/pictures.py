"""Pictures for people: labelled grids of images and curves of a run."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from paddle_dit.errors import ConfigError
from paddle_dit.files import check_writable, read_json, write_json
from paddle_dit.folder_lock import LOCK, FolderLock

DEFAULT_FOLDER = Path("outputs/samples")
RECORD = "samples.json"
_SET = re.compile(r"\d{6,}\.png|grid\.png|samples\.(json|npz)")  # what save_images and scripts/sample_ddp.py write
_CHUNK = "paddle_dit"  # keyword of the PNG files' text chunk
BACKGROUND, INK = (24, 26, 31), (222, 226, 233)


def labelled_grid(images: np.ndarray, captions: Sequence[str], columns: int, cell: int | None = None) -> Image.Image:
    """Arrange images in a grid with a caption under each.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        captions: one per image; an empty one leaves its line blank. Lines are left out if all are empty.
        columns: images in a row.
        cell: width of an image in the grid, in pixels, its own by default; the height keeps its proportions.
    """
    cell = cell or images.shape[2]
    height = max(1, round(cell * images.shape[1] / images.shape[2]))
    gap, line = max(4, cell // 16), 18 if any(captions) else 0
    rows = -(-len(images) // columns)
    size = (columns * (cell + gap) + gap, rows * (height + gap + line) + gap)
    grid = Image.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(index, columns)
        left, top = gap + column * (cell + gap), gap + row * (height + gap + line)
        grid.paste(Image.fromarray(image).resize((cell, height), Image.Resampling.LANCZOS), (left, top))
        draw.text((left + cell / 2, top + height + 2), _fit(caption, font, cell), INK, font, anchor="ma")
    return grid


def stacked(sections: Mapping[str, Image.Image]) -> Image.Image:
    """Put pictures below each other, each under its title."""
    margin, line = 6, 26
    width = max(image.width for image in sections.values())
    page = Image.new("RGB", (width, sum(line + image.height for image in sections.values())), BACKGROUND)
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(16), 0
    for title, image in sections.items():
        draw.text((margin, top + margin), _fit(title, font, width - 2 * margin), INK, font)
        page.paste(image, (0, top + line))
        top += line + image.height
    return page


def _fit(caption: str, font, width: int) -> str:
    """Shorten a caption to ``width`` pixels."""
    if font.getlength(caption) <= width:
        return caption
    while caption and font.getlength(f"{caption}…") > width:
        caption = caption[:-1]
    return f"{caption}…"


@contextmanager
def hold_folder(output: Path | None, overwrite: bool) -> Iterator[Path]:
    """Have a folder for a set of images, from before they are drawn until they have been written.

    Args:
        output: the folder asked for, or None: then ``outputs/samples``, with -2, -3, ... where an earlier set is there
            or another process is about to write one.
        overwrite: an earlier set may be replaced.

    Raises:
        ConfigError: the folder cannot be written, is in use, or holds an earlier set that may not be replaced.
    """
    with ExitStack() as held:
        yield _claim(output, overwrite, held)


def _claim(output: Path | None, overwrite: bool, held: ExitStack) -> Path:
    number, names_one = 0, output is not None or overwrite
    while True:
        number += 1
        folder = output or DEFAULT_FOLDER.with_name(DEFAULT_FOLDER.name + (f"-{number}" if number > 1 else ""))
        check_writable(folder, "--output")
        with ExitStack() as attempt:
            try:
                attempt.enter_context(_locked(folder))
            except ConfigError:
                if names_one:
                    raise
                continue
            if overwrite or not earlier_set(folder):
                held.push(attempt.pop_all())
                return folder
        if names_one:
            raise ConfigError(f"{folder} holds an earlier set of images; choose another --output or pass --overwrite")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder, making it if need be; what was made goes at the end, unless something was written."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(folder, "--output")
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()


def earlier_set(folder: Path) -> list[Path]:
    """Return the files of an earlier set of images in a folder, if there are any."""
    return [path for path in folder.iterdir() if _SET.fullmatch(path.name)] if folder.is_dir() else []


def save_images(
    folder: Path, images: np.ndarray, captions: Sequence[str], record: dict, records: Sequence[dict]
) -> Path:
    """Write ``grid.png``, one PNG per image, and ``samples.json``; return the grid's path.

    An earlier set in the folder is removed first, so that none of its images stays among the new ones.

    Args:
        folder: of :func:`hold_folder`.
        images: uint8 ``[N, H, W, 3]``.
        captions: one per image, for the grid.
        record: how they were drawn, for the JSON.
        records: the same of each image, for its PNG, which is named by its number, ``index``.
    """
    for path in earlier_set(folder):
        path.unlink()
    for image, own in zip(images, records, strict=True):
        write_png(folder / png_name(own["index"]), image, own)
    grid = folder / "grid.png"
    picture = labelled_grid(images, captions, columns=min(len(images), 8), cell=max(64, images.shape[2]))
    picture.save(grid, pnginfo=_as_chunk(record))
    write_json(folder / RECORD, record)
    return grid


def png_name(index: int) -> str:
    """Return the file name of an image's number."""
    return f"{index:06d}.png"


def write_png(path: Path, image: np.ndarray, record: dict) -> None:
    """Write an image, uint8 ``[H, W, 3]``, with a text chunk that says as JSON how it was drawn."""
    Image.fromarray(image).save(path, pnginfo=_as_chunk(record))


def _as_chunk(record: dict) -> PngInfo:
    chunk = PngInfo()
    chunk.add_itxt(_CHUNK, json.dumps(record, ensure_ascii=False))
    return chunk


def read_record(path: Path) -> dict:
    """Return how images were drawn, from their ``samples.json`` or from one of their PNG files.

    Raises:
        ConfigError: the file cannot be read, or says nothing of it.
    """
    if path.suffix.lower() != ".png":
        return read_json(path, ConfigError)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.text[_CHUNK])
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}; give a PNG or samples.json of earlier images") from None
    except (OSError, ValueError, SyntaxError, KeyError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ConfigError(f"{path} does not say how it was drawn; give a PNG or samples.json of this project's scripts")
    return record


def loss_curve(log: Path, output: Path) -> None:
    """Draw the losses written in a run's ``log.jsonl`` to a PNG, those on held-out samples too where there are any."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (
        ("loss", "loss (mse + vb)"),
        ("mse", "mse of the noise"),
        ("eval_loss", "held out"),
        ("eval_loss_ema", "held out, averaged weights"),
    ):
        lines = log_lines(log, name)
        if lines:
            style = {"marker": "o"} if name.startswith("eval") else {}
            axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=label, **style)
    axes.set(xlabel="step", ylabel="mean since the last line of the log", yscale="log", title="Training loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(output, dpi=130)


def log_lines(log: Path, name: str = "loss") -> list[dict]:
    """Return the lines of a run's ``log.jsonl`` that hold the figure ``name``."""
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if name in line]
