"""Plain ``.npy`` files, read without pickle: every way in which a file can be broken becomes one :class:`DataError`."""

import functools
import io
import os
from pathlib import Path

import numpy as np

from paddle_dit.errors import DataError

_MAGIC_1_0 = b"\x93NUMPY\x01\x00"
_EXPONENT_16 = np.uint16(0x7C00)  # all ones in infinities and NaN


def read_npy(path: str | Path) -> np.ndarray:
    """Read one small array; about five times as fast as ``np.load`` when many files share a header.

    Raises:
        DataError: the file is missing, cut short, holds Python objects or is no ``.npy`` file.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            raw = file.read()
        if not raw.startswith(_MAGIC_1_0):
            return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)  # np.load would also open a zip
        start = 10 + int.from_bytes(raw[8:10], "little")
        shape, fortran_order, dtype = _parse_header(raw[:start])
        return np.frombuffer(raw, dtype, offset=start).reshape(shape, order="F" if fortran_order else "C")
    except Exception as error:  # NumPy answers a broken header with many types of exception
        raise _broken(path, error) from None


def map_npy(path: str | Path) -> np.ndarray:
    """Map one large array into memory, read-only; errors as in :func:`read_npy`."""
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
        surplus = os.path.getsize(path) - mapped.offset - mapped.nbytes
        if surplus:  # a damaged header may state a shorter one, and every value would be shifted
            raise ValueError(f"{surplus} bytes more than its header says")
        return np.asarray(mapped)  # a plain array over the map: indexing np.memmap itself is slower
    except Exception as error:
        raise _broken(path, error) from None


def non_finite_rows(latents: np.ndarray) -> np.ndarray:
    """Return which rows of ``latents [B,C,h,w]`` hold NaN or infinity: int64 indices, usually none."""
    if latents.dtype == np.float16:  # NumPy's isfinite takes ten times as long for it as a look at the exponents
        finite = (latents.view(np.uint16) & _EXPONENT_16) != _EXPONENT_16
    else:
        finite = np.isfinite(latents)
    return np.flatnonzero([]) if finite.all() else np.flatnonzero(~finite.all(axis=(1, 2, 3)))


@functools.lru_cache(maxsize=256)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parsing the header is most of the cost of reading a small file, and a folder's files share one or two."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


def _broken(path: str | Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} is missing; restore it or extract the features again")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path} is not a readable plain .npy array ({reason}); restore it or extract it again")
