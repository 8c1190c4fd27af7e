"""Images to be evaluated, read in a stream: an ``.npz``, a folder, or an array."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from paddle_dit.data.images import EXTENSIONS, read_image
from paddle_dit.errors import DataError
from paddle_dit.files import sha256

IMAGES = "arr_0"  # of an .npz, as the ADM suite names it
_GRID = "grid.png"  # beside the images that scripts/sample.py writes
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
_LOSSY = {".jpg", ".jpeg", ".webp"}
_MODES = {"L": "grayscale", "1": "black and white", "LA": "grayscale", "I;16": "grayscale", "P": "of a palette"}
_AT_ONCE = 4096  # files handed to the threads
_READERS = max(2, min(8, os.cpu_count() or 1))


class ArrayImages:
    """Images in memory.

    Args:
        images: uint8 ``[N, *shape]``.
        name: what they are called.
    """

    kind, sha256, warnings = "array", None, ()

    def __init__(self, images: np.ndarray, name: str):
        if images.dtype != np.uint8 or not len(images):
            raise DataError(f"{name} holds {images.dtype} {list(images.shape)}; give one uint8 image or more")
        self._images, self.name, self.shape = images, name, images.shape[1:]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield uint8 ``[up to size, *shape]``, in order."""
        for start in range(0, len(self), size):
            yield self._images[start : start + size]


class NpzImages:
    """``arr_0`` of an ``.npz``, uint8 ``[N, H, W, 3]``, never in memory as a whole.

    Raises:
        DataError: it is no ``.npz``, or has no such array of this kind.
    """

    kind, warnings = "npz", ()

    def __init__(self, path: Path):
        self._path, self.name = path, path.name
        with _explained(path), self._array() as array:
            shape, columns_first, dtype = _header(array)
        if dtype != np.uint8:
            raise DataError(f"{IMAGES} of {path} is {dtype}; save uint8: clip(127.5 x + 128, 0, 255) of x in -1..1")
        if columns_first or len(shape) < 2 or not all(shape):
            raise DataError(f"{IMAGES} of {path} has shape {list(shape)}, or columns first; save uint8 [N, H, W, 3]")
        self._count, self.shape = shape[0], tuple(shape[1:])

    @contextmanager
    def _array(self) -> Iterator[BinaryIO]:
        with zipfile.ZipFile(self._path) as file, file.open(f"{IMAGES}.npy") as array:
            yield array

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file."""
        return sha256(self._path)

    def __len__(self) -> int:
        """Return the number of images."""
        return self._count

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield uint8 ``[up to size, *shape]``, in order; DataError where the file is damaged."""
        length = math.prod(self.shape)
        with _explained(self._path), self._array() as array:
            _header(array)
            for start in range(0, self._count, size):
                count = min(size, self._count - start)
                raw = array.read(count * length)
                if len(raw) < count * length:
                    raise EOFError("it has fewer images than its header says")
                yield np.frombuffer(raw, np.uint8).reshape(count, *self.shape)
            if array.read(1):  # at its end the checksum is compared
                raise EOFError("it has more bytes than its header says")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say of a file that cannot be read what is wrong with it."""
    try:
        yield
    except KeyError:
        raise DataError(
            f"{path} has no array '{IMAGES}'; save the images as uint8 [N, H, W, 3] under this name"
        ) from None
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or no .npz ({error}); make or copy it again") from None


def _header(array: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the head of an ``.npy`` in a stream."""
    version = np.lib.format.read_magic(array)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise DataError(f"{IMAGES} has version {version} of the .npy format; save uint8 [N, H, W, 3]")
    return read(array)


class FolderImages:
    """The images anywhere below a folder, sorted by path; all of one size, RGB.

    Args:
        path: the folder.
        crop: scale each image and cut out its middle square of this side, as for training, whatever its size and mode;
            None takes them as they are.

    Attributes:
        files: paths, in order.
        warnings: what may spoil figures of them, a line each.

    Raises:
        DataError: there are none, or without ``crop`` one is not RGB or has another size than the first.
    """

    kind, sha256 = "folder", None

    def __init__(self, path: Path, crop: int | None = None):
        self.name, self.files, self._crop = path.name or str(path), _image_files(path), crop
        if not self.files:
            raise DataError(f"{path} holds no images; give a folder with PNG files, or an .npz with '{IMAGES}'")
        self.shape = (crop, crop, 3) if crop else self._common_shape()
        self.warnings = self._oddities()

    def _oddities(self) -> list[str]:
        lossy = [file for file in self.files if Path(file).suffix.lower() in _LOSSY]
        folders = {os.path.dirname(file) for file in self.files}
        found = []
        if lossy:
            found.append(f"{len(lossy):,} of the images of {self.name} are compressed with loss, which FID notices")
        if len(folders) > 1:
            found.append(
                f"the images of {self.name} lie in {len(folders):,} folders, taken one after the other: if these are "
                "classes, an Inception Score of them is too small"
            )
        return found

    def _common_shape(self) -> tuple[int, int, int]:
        first = _shape_of(self.files[0])
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(self.files), _AT_ONCE):
                some = self.files[start : start + _AT_ONCE]
                for file, shape in zip(some, pool.map(_shape_of, some), strict=True):
                    if shape != first:
                        sizes = f"{file} has {shape[1]} x {shape[0]} pixels, the first one {first[1]} x {first[0]}"
                        raise DataError(f"{sizes}; give images of one size, or crop them with --crop SIZE")
        return first

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield uint8 ``[up to size, H, W, 3]``, in order; threads read the next batch meanwhile."""

        def read(file: str) -> np.ndarray:
            return read_image(file, self._crop) if self._crop else _pixels(file)

        with ThreadPoolExecutor(_READERS) as pool:
            following = [pool.submit(read, file) for file in self.files[:size]]
            for start in range(size, len(self.files) + size, size):
                reading = following
                following = [pool.submit(read, file) for file in self.files[start : start + size]]
                yield np.stack([future.result() for future in reading])


def _image_files(folder: Path) -> list[str]:
    """Return the paths of the images below a folder; hidden ones, and the grid beside drawn ones, are left out."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in names if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")]
        found += [os.path.join(place, name) for name in images if name != _GRID]
    return sorted(found)


def _open(file: str) -> Image.Image:
    """Open an image that is RGB; its pixels are not read yet."""
    try:
        image = Image.open(file, formats=_FORMATS)
    except Exception as error:  # a broken file can fail in any operation
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"cannot read the image {file}: {reason}; replace or remove it") from None
    if image.mode != "RGB":
        kind = _MODES.get(image.mode, f"of mode {image.mode}")
        raise DataError(f"{file} is {kind}, not RGB; save it as RGB, or crop all with --crop SIZE, which converts them")
    return image


def _shape_of(file: str) -> tuple[int, int, int]:
    with _open(file) as image:
        return image.height, image.width, 3


def _pixels(file: str) -> np.ndarray:
    with _open(file) as image:
        try:
            return np.asarray(image)
        except Exception as error:  # the same
            raise DataError(f"cannot read the image {file}: {error}; replace or remove it") from None


Images = ArrayImages | NpzImages | FolderImages


def has_images(path: Path) -> bool:
    """Whether an ``.npz`` has an array of images."""
    with _explained(path), zipfile.ZipFile(path) as file:
        return f"{IMAGES}.npy" in file.namelist()
