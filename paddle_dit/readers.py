"""Reading weight files without running anything that they say.

PyTorch's files are read without PyTorch: they are zips of a pickle and, as they lie in memory, the numbers it names;
before PyTorch 1.6 they were a row of pickles with the numbers behind it.
"""

import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from paddle_dit.errors import ConversionError
from paddle_dit.pickles import as_numbers, bfloat16_to_float32, shown, unpickle

# Names of the weight files in a folder of ppdiffusers, in the order in which it looks for them.
STOCK_WEIGHTS = {"safetensors": "diffusion_paddle_model.safetensors", "pdparams": "model_state.pdparams"}
_PYTORCH = (".pt", ".pth", ".ckpt", ".bin")
_ZIP = b"PK\x03\x04"
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."  # a mark and 1001, the format's version
_PARAMETER_NAMES = "StructuredToParameterName@@"  # Paddle's record of its generated names, among the tensors


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read a ``.safetensors``, ``.pdparams`` or PyTorch file: name -> array.

    bfloat16, which NumPy lacks, becomes float32. Arrays of a pickled file may be read-only: see :func:`read_pickled`.

    Raises:
        ConversionError: the file is missing, cut short, of another kind, its pickle asks for more than arrays, or it is
            a training checkpoint of several tables.
    """
    path = _checked(path, ".safetensors", ".pdparams", *_PYTORCH)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _table(path, read_pickled(path))


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


def read_stock_weights(folder: Path) -> dict[str, np.ndarray]:
    """Read the weights in a folder that ppdiffusers' ``save_pretrained`` wrote.

    Raises:
        ConversionError: there are none, they cannot be read, or they have PyTorch's layout.
    """
    for path in (folder / name for name in STOCK_WEIGHTS.values()):
        if path.is_file():
            # ppdiffusers' rule: anything but "pd" or "np" has PyTorch's transposed linear layers.
            if path.suffix == ".safetensors" and _metadata(path).get("format", "pt") == "pt":
                raise ConversionError(f"{path} has PyTorch's layout; save it again with ppdiffusers' save_pretrained")
            return read_tensors(path)
    raise ConversionError(f"{folder} holds no weights; place {' or '.join(STOCK_WEIGHTS.values())} there")


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ConversionError(f"{path} is cut short or no safetensors file ({error})") from None


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            brain = {name for name in names if file.get_slice(name).get_dtype() == "BF16"}
            tensors = {name: file.get_tensor(name) for name in names if name not in brain}
        entries = dict(deserialize(path.read_bytes())) if brain else {}
    except SafetensorError as error:
        raise ConversionError(f"{path} is cut short or no safetensors file ({error})") from None
    except (TypeError, AttributeError) as error:  # a number format that NumPy has not
        raise ConversionError(f"{path} holds numbers that NumPy cannot read ({error}); save it as float32") from None
    for name in brain:
        bits = np.frombuffer(entries[name]["data"], np.uint16)
        tensors[name] = bfloat16_to_float32(bits.reshape(entries[name]["shape"]))
    return tensors


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
    values.pop(_PARAMETER_NAMES, None)
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
