"""The npz files that evaluation suites read, written image by image; nothing here imports Paddle."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from paddle_dit.files import replace_file


def write_npz(path: Path, shape: tuple[int, int, int, int], images: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write ``arr_0`` (the images) and ``arr_1`` (their labels), uncompressed, as the ADM suite reads them.

    One image at a time is in memory. The same images give the same bytes.

    Args:
        path: of the npz file; an earlier one is replaced once the new one is whole.
        shape: ``(N, H, W, 3)``.
        images: N arrays, uint8 ``[H, W, 3]``.
        labels: int64 ``[N]``.
    """

    def write(file) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
                for image in images:
                    if image.shape != shape[1:] or image.dtype != np.uint8:
                        raise ValueError(f"images are uint8 {list(shape[1:])}, got {image.dtype} {list(image.shape)}")
                    entry.write(image.tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, labels, version=(1, 0), allow_pickle=False)

    replace_file(path, write)
