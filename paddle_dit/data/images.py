"""Labelled images on disk, and the pixels that a VAE takes from one of them: the paper's classes and centre crop."""

import contextlib
import csv
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from paddle_dit.data.labels import imagenet_names_by_wnid
from paddle_dit.errors import DataError

LABELS = "labels.csv"
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# What such a file may really be, whatever its name says. Others are not tried: Pillow would start Ghostscript for some.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MOST_PIXELS = 2**27  # of a scaled image, before the crop: 1 x 100,000 pixels would become 20 GB
_SPLITS = {"train", "val", "valid", "validation", "test"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_CLASS_ID = re.compile(r"\d{1,9}", re.ASCII)
_CSV_MEND = "mend the file; it needs the columns file,label and a line for every image"


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Labelled images, in the order in which torchvision's ImageFolder, and so every DiT, numbers them.

    Attributes:
        root: the folder that holds them.
        paths: bytes ``[N]`` of one width, relative to ``root``: a third of what a list would take.
        labels: int64 ``[N]``.
        label_names: class id -> name; of an ImageNet class all its names, with commas between.
        class_folders: the folder of each class, by its id; empty where a ``labels.csv`` says the classes.
        ignored: how many files are no images by their names; hidden ones are not counted.
        fingerprint: SHA-256 of the paths and labels; not of the contents, which would mean reading every file.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    label_names: dict[int, str]
    class_folders: list[str]
    ignored: int
    fingerprint: str

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """One more than the largest class id."""
        return max(self.label_names) + 1

    def file(self, index: int) -> str:
        """Return the path of an image."""
        return os.path.join(self.root, os.fsdecode(self.paths[index]))


def find_images(root: str | Path, report: Callable[[str], None] = print) -> ImageFolder:
    """List the images below ``root`` with their labels; none is opened.

    Either every folder in ``root`` is a class, sorted by name as text, with images anywhere below it, or ``root`` holds
    a ``labels.csv`` with the columns ``file`` (relative to ``root``) and ``label``: a class id, or a name, which get
    ids in the order of their sorting. Folders that are WordNet ids of ImageNet get its names. Whatever is hidden is
    left out.

    Args:
        root: the folder.
        report: is told, in a line, what is unusual but allowed.

    Raises:
        DataError: there are no images, some have no class or two, a class has none, a folder cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give one that holds a folder of images per class")
    try:
        parts, labels, names, folders, ignored = _from_csv(root) if (root / LABELS).exists() else _from_folders(root)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; mend or remove it") from None
    if len(names) == 1:
        deeper = folders and any(entry.is_dir() for entry in _visible(root / folders[0]))
        mend = f"; if its folders are the classes, give {root / folders[0]}" if deeper else ""
        only = f"{root} has one class only, '{names[min(names)]}'"
        report(f"{only}: a model will learn no difference between classes{mend}")
    if alike := _alike(folders or sorted(names.values())):
        report(f"classes '{alike[0]}' and '{alike[1]}' of {root} differ in case alone; make them one if they are one")
    moved = [pair for pair in enumerate(folders) if str(pair[0]) != pair[1]]
    if moved and all(map(_CLASS_ID.fullmatch, folders)):
        report(f"classes are sorted as text, as in every DiT: folder '{moved[0][1]}' is class {moved[0][0]}")
    paths = np.concatenate(parts)
    return ImageFolder(root, paths, labels, names, folders, ignored, _fingerprint(paths, labels))


def _alike(spelt: list[str]) -> tuple[str, str] | None:
    """Return two names that are the same but for the case of their letters."""
    former: dict[str, str] = {}
    for name in spelt:
        if former.setdefault(name.casefold(), name) != name:
            return former[name.casefold()], name
    return None


def holds_images(root: Path) -> bool:
    """Say whether a folder looks like one for :func:`find_images`: for a cheap look at what it is."""
    if (root / LABELS).is_file():
        return True
    entries = _visible(root)
    folders = (entry for entry in entries if entry.is_dir())
    return any(map(_is_image, entries)) or any(_is_image(entry) for folder in folders for entry in _visible(folder))


def _fingerprint(paths: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(paths), 1 << 16):
        digest.update(b"".join(path + b"\0" for path in paths[start : start + (1 << 16)].tolist()))
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _from_folders(root: Path) -> tuple[list[np.ndarray], np.ndarray, dict[int, str], list[str], int]:
    """Return paths by class, labels, names, folders and the number of other files of a folder per class."""
    entries = _visible(root)
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    stray = sorted(entry.name for entry in entries if _is_image(entry))
    if stray:
        raise DataError(
            f"{root} holds {len(stray)} images outside of class folders, the first is {stray[0]}; move them into one "
            f"folder per class, or write their labels into {LABELS} there (columns file,label)"
        )
    if not folders:
        raise DataError(f"{root} holds no images; give a folder that holds a folder of images per class")
    if _SPLITS.issuperset(folders) and any(entry.is_dir() for entry in _visible(root / folders[0])):
        raise DataError(f"{root} holds {', '.join(folders)}, which are no classes; give one of them")
    parts, ignored = [], len(entries) - len(folders)
    for folder in folders:
        images, others = _walk(root, folder)
        if not images:
            raise DataError(f"class folder {root / folder} holds no images; add some or remove it")
        parts.append(np.array([os.fsencode(path) for path in images]))
        ignored += others
    labels = np.repeat(np.arange(len(folders)), [len(part) for part in parts])
    wordnet = imagenet_names_by_wnid()
    names = {label: wordnet.get(folder, folder) for label, folder in enumerate(folders)}
    return parts, labels, names, folders, ignored


def _from_csv(root: Path) -> tuple[list[np.ndarray], np.ndarray, dict[int, str], list[str], int]:
    """Return the same of a folder with a ``labels.csv``."""
    images, others = _walk(root, "")
    table = root / LABELS
    texts = _read_labels(table)
    absent = sorted(texts.keys() - set(images))
    if absent:
        raise DataError(f"{table} names {absent[0]} ({len(absent)} such), which is no image there; {_CSV_MEND}")
    bare = [image for image in images if image not in texts]
    if bare:
        raise DataError(f"{table} misses {bare[0]} ({len(bare)} such); {_CSV_MEND}")
    if not images:
        raise DataError(f"{root} holds no images, only {LABELS}; add the images")
    ids, names = _class_ids(texts, table)
    labels = np.array([ids[texts[image]] for image in images], np.int64)
    return [np.array([os.fsencode(image) for image in images])], labels, names, [], others - 1


def _read_labels(table: Path) -> dict[str, str]:
    """Return file -> label as ``labels.csv`` spells them."""
    texts: dict[str, str] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if not {"file", "label"} <= set(rows.fieldnames or ()):
                raise DataError(f"{table} does not begin with the line file,label; {_CSV_MEND}")
            for row in rows:
                place = f"{table}, line {rows.line_num}"
                if None in row or not row["file"] or not (row["label"] or "").strip():
                    raise DataError(f"{place} is not a file and a label, quoted if it has commas; {_CSV_MEND}")
                name = os.path.normpath(row["file"])
                if name in texts:
                    raise DataError(f"{place} names {name} a second time; {_CSV_MEND}")
                texts[name] = row["label"].strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is no CSV file in UTF-8 ({error}); {_CSV_MEND}") from None
    return texts


def _class_ids(texts: Mapping[str, str], table: Path) -> tuple[dict[str, int], dict[int, str]]:
    """Return label as spelt -> class id, and class id -> name."""
    spelt = sorted(set(texts.values()))
    numbers = [label for label in spelt if _NUMBER.fullmatch(label)]
    odd = [label for label in numbers if not _CLASS_ID.fullmatch(label)]
    if numbers and len(numbers) < len(spelt):
        odd = odd or [label for label in spelt if label not in set(numbers)]
    if odd:
        file = next(file for file, label in texts.items() if label == odd[0])
        raise DataError(f"{table} labels {file} '{odd[0]}'; give all images ids (0, 1, …), or all names")
    if numbers:
        return {label: int(label) for label in spelt}, {number: str(number) for number in sorted(map(int, spelt))}
    return {label: index for index, label in enumerate(spelt)}, dict(enumerate(spelt))


def _visible(folder: str | os.PathLike) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _is_image(entry: os.DirEntry) -> bool:
    """Whether a file's name says so; a dangling link counts, so that it is noticed, a pipe would wait for ever."""
    extension = os.path.splitext(entry.name)[1].lower()
    return extension in EXTENSIONS and (entry.is_file() or entry.is_symlink()) and not entry.is_dir()


def _walk(root: Path, top: str) -> tuple[list[str], int]:
    """Return the images anywhere below ``root/top``, relative to ``root``, and the number of other files.

    The order is torchvision's: folders by their whole path as text, then files by name. Links are followed.
    """
    images: dict[str, list[str]] = {}
    pending, seen, others = [top], set(), 0
    while pending:
        folder = pending.pop()
        place = os.path.join(root, folder)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            raise DataError(f"{root / top} leads to {place} twice, by a link; remove the link")
        seen.add((status.st_dev, status.st_ino))
        images[folder] = []
        for entry in _visible(place):
            if entry.is_dir():
                pending.append(os.path.join(folder, entry.name))
            elif _is_image(entry):
                images[folder].append(entry.name)
            else:
                others += 1
    return [os.path.join(folder, name) for folder in sorted(images) for name in sorted(images[folder])], others


def check_image_size(image_size: int) -> None:
    """Raise DataError unless a VAE that shrinks by 8 can encode images of this side."""
    if image_size < 8 or image_size % 8:
        fits = ", ".join(str(size) for size in (image_size // 8 * 8, (image_size // 8 + 1) * 8) if size >= 8)
        raise DataError(f"image size {image_size} is not divisible by 8, as the VAE needs it; choose {fits}")


def read_image(path: str | Path, image_size: int) -> np.ndarray:
    """Read a file and crop its centre.

    Pixels become RGB as Pillow converts them, which is the paper's way: transparency is dropped, not blended. Two
    things differ from it, where it would spoil the picture: a rotation noted in the file (EXIF) is applied, and 16 bits
    are scaled to 8 instead of cut off. Of several frames, the first is taken.

    Args:
        path: the file.
        image_size: side of the result, in pixels.

    Returns:
        uint8 ``[S, S, 3]``.

    Raises:
        DataError: the file is missing, broken, no image, too large to be one, or its pixels have no agreed range.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # broken notes about a picture do not spoil it
                ImageOps.exif_transpose(image, in_place=True)
            return centre_crop(_as_rgb(image), image_size)
    except UnidentifiedImageError:
        reason = "it is no image, or its beginning is broken"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # a broken file can fail in any operation
        reason = str(error) or type(error).__name__
    raise DataError(f"cannot read the image {path}: {reason}; replace or remove it")


def look_at(path: str | Path) -> tuple[tuple[int, int], str]:
    """Return width and height of the image in a file, and its mode in Pillow's words, without reading its pixels.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.size, image.mode
    except Exception as error:  # a broken file can fail in any operation
        raise DataError(f"cannot read the image {path}: {error}; replace or remove it") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DataError("its pixels are floats, which have no agreed range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("its pixels have more than 16 bits, which have no agreed range")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    return image.convert("RGB")


def centre_crop(image: Image.Image, image_size: int) -> np.ndarray:
    """Scale the short side of an image to ``image_size`` and cut out the middle, as the paper's code does.

    Halving by averages while that leaves enough, and only then a cubic filter, keeps large images free of aliasing.

    Args:
        image: RGB, of any size.
        image_size: side of the result, in pixels.

    Returns:
        uint8 ``[S, S, 3]``.

    Raises:
        DataError: the image is too long and thin to be scaled.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MOST_PIXELS:
        raise DataError(f"it is {image.width} x {image.height} pixels, too thin to be scaled")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return np.array(image.crop((left, top, left + image_size, top + image_size)))
