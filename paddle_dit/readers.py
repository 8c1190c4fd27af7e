"""Reading weight files without running anything that they say.

PyTorch's files are read without PyTorch: they are zips of a pickle and, as they lie in memory, the numbers it names;
before PyTorch 1.6 they were a row of pickles with the numbers behind it.
"""

import json
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from paddle_dit.errors import ConversionError
from paddle_dit.pickles import as_numbers, shown, unpickle

# Names of the weight files in a folder of ppdiffusers, in the order in which it looks for them.
STOCK_WEIGHTS = {"safetensors": "diffusion_paddle_model.safetensors", "pdparams": "model_state.pdparams"}
_PYTORCH = (".pt", ".pth", ".ckpt", ".bin")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."  # a mark and 1001, the format's version
_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "b1"}
_SAFETENSORS |= {f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)}
PARAMETER_NAMES = "StructuredToParameterName@@"  # Paddle's record of its generated names, among the tensors


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read a ``.safetensors``, ``.pdparams`` or PyTorch file: name -> array.

    bfloat16, which NumPy lacks, becomes float32. Arrays of a pickled file may be read-only: see :func:`read_pickled`.

    Raises:
        ConversionError: the file is missing, cut short, of another kind, its pickle asks for more than arrays, or it is
            a training checkpoint of several tables.
    """
    path = _checked(path, ".safetensors", ".pdparams", *_PYTORCH)
    return dict(SafetensorsFile(path)) if path.suffix == ".safetensors" else _table(path, read_pickled(path))


def read_pickled(path: str | Path) -> object:
    """Read all that ``paddle.save`` (``.pdparams``) or ``torch.save`` (``.pt``, ``.pth``, ``.ckpt``, ``.bin``) wrote.

    The tensors of a PyTorch file become read-only views of it, mapped into memory: they take no memory until they are
    used, and the file must stay as it is until then. bfloat16 and bool are copied.

    Returns:
        Arrays, numbers and texts in plain containers, as of :func:`~paddle_dit.pickles.unpickle`.

    Raises:
        ConversionError: the file is missing, cut short, of another kind, or its pickle asks for more than that.
    """
    path = _checked(path, ".pdparams", *_PYTORCH)
    kind = "PyTorch file" if path.suffix in _PYTORCH else "Paddle weights"
    with _explained(path, kind), path.open("rb") as file:
        if path.suffix in _PYTORCH:
            return _load_pytorch(file)
        return unpickle(file, path.stat().st_size)


def read_by_content(path: str | Path) -> object:
    """Read a weights file of any kind that is known, whatever its name says.

    Returns:
        A :class:`SafetensorsFile`, or what :func:`read_pickled` returns.

    Raises:
        ConversionError: the file is missing, cut short or none of these, which is said, or its pickle is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"no such file: {path}")
    with _explained(path, "Paddle weights" if path.suffix == ".pdparams" else "weights file"), path.open("rb") as file:
        start, size = file.read(512), path.stat().st_size
        file.seek(0)
        # Safetensors come first: the length that they begin with may look like the mark of another kind.
        table = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size
        if not table and start.startswith((_ZIP, _BEFORE_1_6)):
            return _load_pytorch(file)
        if not table and (start.startswith(_PICKLE) or path.suffix == ".pdparams"):  # the oldest have no mark
            return unpickle(file, size)
    if start[8:9] == b"{":
        return SafetensorsFile(path)
    raise ConversionError(
        f"{path} is {_described(start)}; expected PyTorch's zip (.pt, .ckpt, .bin), Paddle's pickle (.pdparams) or "
        "safetensors"
    )


def _described(start: bytes) -> str:
    """Say what a file is that begins so and holds no weights."""
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, and the weights themselves have not been fetched (git lfs pull)"
    if start.lstrip()[:1] == b"<":
        return "a page of HTML or XML, as a failed download leaves it"
    text = start.decode("utf-8", errors="ignore")
    return "a text file" if len(text) > 0.9 * len(start) and "\0" not in text else "of no known kind"


class SafetensorsFile(Mapping):
    """A ``.safetensors`` file whose tensors are read when they are asked for, each into memory of its own.

    bfloat16, which NumPy lacks, becomes float32.

    Raises:
        ConversionError: the file is missing, cut short or of another kind; on reading, numbers that NumPy has not.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="np"):  # which checks that the header fits the file
                pass
            with self.path.open("rb") as file:
                self._start = 8 + int.from_bytes(file.read(8), "little")
                self._header = json.loads(file.read(self._start - 8))
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ConversionError(f"{path} is cut short or no safetensors file ({shown(error)})") from None
        except OSError as error:
            raise ConversionError(f"cannot read {path}: {error.strerror}") from None
        self.metadata: dict[str, str] = self._header.pop("__metadata__", {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._header[name]
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if code not in _SAFETENSORS:
            raise ConversionError(f"{self.path} holds numbers that NumPy cannot read ({code}); save it as float32")
        dtype = np.dtype(_SAFETENSORS[code])
        raw = np.fromfile(self.path, np.uint8, end - start, offset=self._start + start)
        if len(raw) != end - start:
            raise ConversionError(f"{self.path} has been cut short")
        numbers = raw.view(dtype)
        return (as_numbers(numbers) if code in ("BF16", "BOOL") else numbers).reshape(shape)


def _checked(path: str | Path, *suffixes: str) -> Path:
    path = Path(path)
    if path.suffix not in suffixes:
        raise ConversionError(f"cannot read {path}: known files end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if not path.is_file():
        raise ConversionError(f"no such file: {path}")
    return path


@contextmanager
def _explained(path: Path, kind: str) -> Iterator[None]:
    """Say of any error within the block which file it is about, in a line."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{path} is refused: {error}") from None
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a broken pickle can fail in any operation
        reason = f"{type(error).__name__}: {shown(error)}"
        raise ConversionError(f"{path} is cut short or no {kind} ({reason})") from None


def _table(path: Path, values: object) -> dict[str, np.ndarray]:
    """Return the values of a file of weights only, without Paddle's own."""
    if not isinstance(values, dict):
        raise ConversionError(f"{path} holds a {type(values).__name__}, not a table of tensors")
    values.pop(PARAMETER_NAMES, None)
    tables = [shown(name) for name, value in values.items() if _is_table(value)]
    if tables:
        raise ConversionError(
            f"{path} holds tables of tensors ({', '.join(tables[:8])}), not tensors; save one as a file of its own"
        )
    for name, array in values.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise ConversionError(f"{path}: entry '{shown(name)}' is no tensor; give a file of weights only")
    return values


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, np.ndarray) for item in value.values())


def _load_pytorch(file: BinaryIO) -> object:
    start = file.read(len(_BEFORE_1_6))
    if start == _BEFORE_1_6:
        return _load_before_1_6(file)
    if not start.startswith(_ZIP):
        raise zipfile.BadZipFile("no zip file")
    file.seek(0)
    with zipfile.ZipFile(file) as entries:
        archive = _Archive(file, entries)
    return unpickle(BytesIO(archive.pickle), len(archive.pickle), archive.storage)


def _load_before_1_6(file: BinaryIO) -> object:
    """Read the rest of PyTorch's format from before 1.6, which says where its numbers lie only after the tensors.

    So the pickle of the tensors is read twice: for the kinds and lengths of the storages, and to be filled.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(len(_BEFORE_1_6))
    system = unpickle(file, size)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ConversionError("its numbers are not said to be little-endian; save it again with PyTorch 1.6 or newer")
    start, asked = file.tell(), {}

    def note(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if asked.setdefault(key, (dtype, count)) != (dtype, count):
            raise ConversionError(f"its storage '{shown(key)}' is there as two kinds")
        return np.broadcast_to(np.zeros((), dtype), count)  # takes no memory, and none of it is read

    unpickle(file, size, note)
    keys = unpickle(file, size)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(asked):
        raise ConversionError("its storages are not those of its tensors")
    place, found, everything = file.tell(), {}, np.memmap(file, np.uint8, mode="r")  # which moves the file's place
    for key in keys:
        dtype, count = asked[key]
        raw = everything[place + 8 : place + 8 + count * dtype.itemsize]
        if everything[place : place + 8].tobytes() != struct.pack("<q", count) or len(raw) < count * dtype.itemsize:
            raise ConversionError(f"its storage '{shown(key)}' is cut short or has another length than its tensors")
        found[key] = as_numbers((raw if raw.ctypes.data % dtype.itemsize == 0 else raw.copy()).view(dtype))
        place += 8 + count * dtype.itemsize
    file.seek(start)
    return unpickle(file, size, lambda key, *_: found[key])


class _Archive:
    """PyTorch's zip, mapped into memory."""

    def __init__(self, file: BinaryIO, entries: zipfile.ZipFile):
        self._bytes = np.memmap(file, np.uint8, mode="r")
        found = entries.infolist()
        self._entries = {entry.filename: entry for entry in found}
        pickles = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(self._entries) < len(found) or len(pickles) != 1:
            raise ConversionError("it has entries of the same name, or not one data.pkl; save it again with torch.save")
        if any(entry.compress_type or entry.flag_bits & 1 or entry.file_size != entry.compress_size for entry in found):
            raise ConversionError("its entries are compressed; save it again with torch.save, which does not do that")
        if sum(entry.file_size for entry in found) > len(self._bytes):
            raise ConversionError("its entries lie on each other; save it again with torch.save")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._storages = {}
        self.pickle = entries.read(pickles[0])
        order = self._folder + "byteorder"
        if order in self._entries and entries.read(order) != b"little":
            raise ConversionError("its numbers are big-endian; save it again on a little-endian machine")

    def storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        """Return the numbers of an entry, flat; those that must be copied are copied once."""
        if (key, dtype) not in self._storages:
            name = f"{self._folder}data/{key}"
            if name not in self._entries:
                raise ConversionError(f"its entry '{shown(name)}' is missing")
            if self._entries[name].file_size != count * dtype.itemsize:
                raise ConversionError(f"its entry '{shown(name)}' has another size than its tensors")
            raw = self._data(self._entries[name])
            raw = raw if raw.ctypes.data % dtype.itemsize == 0 else raw.copy()
            self._storages[key, dtype] = as_numbers(raw.view(dtype))
        return self._storages[key, dtype]

    def _data(self, entry: zipfile.ZipInfo) -> np.ndarray:
        # The local header has lengths of its own: PyTorch pads it so that the numbers are aligned.
        mark, *lengths = struct.unpack_from("<4s22xHH", self._bytes, entry.header_offset)
        start = entry.header_offset + 30 + sum(lengths)
        data = self._bytes[start : start + entry.file_size]
        if mark != _ZIP or len(data) != entry.file_size:
            raise ConversionError(f"its entry '{shown(entry.filename)}' lies outside of it")
        return data
