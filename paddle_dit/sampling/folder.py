"""A folder of many images that grows part by part, whichever process writes a part, and ends the same after any kill.

::

    samples.json       all settings; first. At the end also the parts' hashes, and that the set is complete
    000000.png ...     the images, each of which says how it was drawn
    .parts/00012.json  the hash of part 12; after its images, and gone at the end
    samples.npz        arr_0 uint8 [N, H, W, 3], arr_1 int64 [N]: made of the PNG files at the end
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from paddle_dit.data.store_index import index_text, read_signed, write_file
from paddle_dit.errors import DataError
from paddle_dit.files import PARTIAL, describe, digest_of, read_json, write_json
from paddle_dit.pictures import RECORD, earlier_set, png_name, write_png
from paddle_dit.sampling.npz import write_npz

PARTS, NPZ = ".parts", "samples.npz"
_FILLED_IN = ("complete", "parts", "npz")  # of the record, at the end
_ELSEWHERE = ("model", "vae", "output_format")  # where weights lie (what they are, their hashes say), and what is kept
_MEND = "choose another --sample-dir, or remove it"


class SampleFolder:
    """The images of one set as parts that processes share; a :class:`paddle_dit.meeting.Work`.

    Args:
        folder: made by :meth:`begin`.
        settings: all that decides the images, as plain JSON values, with "num_samples", "batch_size", "image_size" and
            "output_format".
        labels: int64 ``[N]``, of the images.
    """

    flag = "--sample-dir"

    def __init__(self, folder: Path, settings: dict, labels: np.ndarray) -> None:
        self.folder, self._settings, self._labels = folder, settings, labels

    @property
    def name(self) -> str:
        """Hash of the settings."""
        return digest_of(_deciding(self._settings))

    @property
    def num_parts(self) -> int:
        """How many parts there are: a batch each."""
        return -(-len(self._labels) // self._settings["batch_size"])

    def span(self, number: int) -> range:
        """Return the images of a part."""
        size = self._settings["batch_size"]
        return range(number * size, min((number + 1) * size, len(self._labels)))

    def is_whole(self) -> bool:
        """Say whether the whole set is there already, as it was written.

        Raises:
            DataError: a set of other settings is.
        """
        former = self._former()
        if not former.get("complete"):
            return False
        self._check_same(former)
        try:
            if self._has_npz and describe(self.folder / NPZ) != former["npz"]:
                return False
            parts = range(self.num_parts if self._keeps_png else 0)
            return all(self._describe(number) == former["parts"][number] for number in parts)
        except (OSError, KeyError, IndexError, TypeError):
            return False

    def begin(self) -> bool:
        """Claim the folder; False, as there is always something to do.

        Raises:
            DataError: it holds samples of other settings or of none, or cannot be written.
        """
        former, left = self._former(), [path for path in earlier_set(self.folder) if path.name != RECORD]
        if former and (left or any(self.sidecars())):
            self._check_same(former)
        elif left or (not former and (self.folder / RECORD).exists()):
            raise DataError(f"{self.folder} holds samples of which no {RECORD} says how they were drawn; {_MEND}")
        self._check_space()
        (self.folder / PARTS).mkdir(exist_ok=True)
        for number, part in enumerate(former.get("parts") or ()):  # of a set that was complete once
            if isinstance(part, dict):
                self._write_sidecar(number, part)
        for path in (*self.folder.glob(f"samples.*{PARTIAL}"), *(self.folder / PARTS).glob(f"*{PARTIAL}")):
            path.unlink()
        write_json(self.folder / RECORD, self._settings)
        return False

    def finished(self) -> set[int]:
        """Return the numbers of the parts whose images are as they were written."""
        return {number for number, path in self.sidecars() if self._is_good(number, path)}

    def sidecars(self) -> Iterator[tuple[int, Path]]:
        """Yield number and path of the file that is there once a part is finished."""
        named = {int(path.stem): path for path in (self.folder / PARTS).glob("*.json") if path.stem.isdecimal()}
        yield from sorted(named.items())

    def write_part(self, number: int, images: np.ndarray, records: Sequence[dict]) -> None:
        """Write a part; when this returns it is finished, and a kill before leaves it unfinished.

        Args:
            number: of the part.
            images: uint8 ``[n, H, W, 3]``.
            records: how each was drawn.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        try:
            for path, image, record in zip(self._images(number), images, records, strict=True):
                write_png(path, image, record)
        except OSError as error:
            raise DataError(
                f"cannot write {self.folder}: {error.strerror or error}; free some space, then run the same command "
                "again"
            ) from None
        self._write_sidecar(number, self._describe(number))

    def finish(self) -> None:
        """Make the npz file if it is asked for, say that the set is complete, and remove what only the writing needed.

        Raises:
            DataError: an image cannot be read.
        """
        parts = [read_signed(path) for _, path in self.sidecars()]
        if len(parts) != self.num_parts or None in parts:
            raise DataError(f"{self.folder / PARTS} has been damaged since it was written; run the same command again")
        record = {**self._settings, "complete": True}
        record["parts"] = [{key: part[key] for key in ("bytes", "sha256_of_images")} for part in parts]
        if self._has_npz:
            shape = (len(self._labels), *self._settings["image_size"], 3)
            write_npz(self.folder / NPZ, shape, self._read_all(shape[1:]), self._labels)
            record["npz"] = describe(self.folder / NPZ)
        write_json(self.folder / RECORD, record)

    def clean(self) -> None:
        """Remove what a whole set does not need; may be called again."""
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        if not self._keeps_png:
            for number in range(self.num_parts):
                for path in self._images(number):
                    path.unlink(missing_ok=True)

    @property
    def _has_npz(self) -> bool:
        return self._settings["output_format"] != "png"

    @property
    def _keeps_png(self) -> bool:
        return self._settings["output_format"] != "npz"

    def _images(self, number: int) -> list[Path]:
        return [self.folder / png_name(index) for index in self.span(number)]

    def _describe(self, number: int) -> dict:
        digest, size = hashlib.sha256(), 0
        for path in self._images(number):
            content = path.read_bytes()
            digest.update(content)
            size += len(content)
        return {"bytes": size, "sha256_of_images": digest.hexdigest()}

    def _is_good(self, number: int, sidecar: Path) -> bool:
        values = read_signed(sidecar)
        try:
            return values is not None and number < self.num_parts and values == self._describe(number)
        except OSError:
            return False

    def _write_sidecar(self, number: int, values: dict) -> None:
        text = index_text(values)
        write_file(self.folder / PARTS / f"{number:05d}.json", lambda file: file.write(text))

    def _read_all(self, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        for number in range(self.num_parts):
            for path in self._images(number):
                try:
                    with Image.open(path) as image:
                        pixels = np.asarray(image)
                except (OSError, SyntaxError, ValueError):
                    pixels = np.zeros(0)
                if pixels.shape != shape:
                    raise DataError(f"{path} has been damaged since it was written; run the same command again")
                yield pixels

    def _former(self) -> dict:
        try:
            return read_json(self.folder / RECORD, DataError)
        except DataError:
            return {}

    def _check_same(self, former: dict) -> None:
        before, now = (_deciding(settings) for settings in (former, self._settings))
        different = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if different:
            raise DataError(f"{self.folder} holds samples of other settings ({'; '.join(different)}); {_MEND}")

    def _check_space(self) -> None:
        height, width = self._settings["image_size"]
        needed, free = len(self._labels) * height * width * 3, shutil.disk_usage(self.folder).free
        if self._has_npz and free < needed:
            raise DataError(
                f"{self.folder / NPZ} will take {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there; "
                "free some space, or choose another --sample-dir or --output-format png"
            )


def _deciding(settings: dict) -> dict:
    """Return what decides the images, flat."""
    own = {key: value for key, value in settings.items() if key not in (*_FILLED_IN, *_ELSEWHERE)}
    environment = own.pop("environment", {})
    return own | (environment if isinstance(environment, dict) else {})
