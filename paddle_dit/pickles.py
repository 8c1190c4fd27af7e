"""Reading pickles, which are programs, without running what they say.

Weights of Paddle (``.pdparams``) and of PyTorch (``.pt``) are pickles. Here one is read by a machine whose every
operation is known: a global is only a name, looked up in a table of a few; what is called is code of this module;
nothing is imported, and no attribute of anything is set. What remains is bounded: the steps, the depth, and the bytes
of arrays by those of the file. The result is copied into plain containers, so that nothing else can come out.
"""

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import NoneType
from typing import BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided

from paddle_dit.errors import ConversionError

MAX_VALUES = 2_000_000  # of a pickle's steps, and of what comes out: some forty times a training checkpoint of DiT-XL/2
MAX_DEPTH = 50
_ARRAYS = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}  # of NumPy 1 and 2: each reads both
_GLOBALS = {"collections.OrderedDict", "argparse.Namespace", "_codecs.encode", "numpy.dtype", "numpy.ndarray", *_ARRAYS}
_TUPLES = {"builtins.tuple", "__builtin__.tuple"}
_TENSORS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
_NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_STORAGES = {
    "torch.DoubleStorage": "<f8",
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": "<u2",  # its bits
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "b1",
}


class Namespace(dict):
    """What a pickled ``argparse.Namespace`` held, by name: DiT's training checkpoints keep their options in one."""

    def __setstate__(self, state: dict) -> None:
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise ConversionError("it gives an argparse.Namespace something else than its values by name")
        self.update(state)


def unpickle(
    file: BinaryIO, size: int, find_storage: Callable[[str, np.dtype, int], np.ndarray] | None = None
) -> object:
    """Read a pickle.

    Args:
        file: at the start of the pickle.
        size: bytes that it has at most.
        find_storage: returns the numbers of a storage of PyTorch, flat, by its key, dtype and number of elements; None
            for a pickle that may hold none.

    Returns:
        dict, list, tuple, OrderedDict, :class:`Namespace`, str, bytes, int, float, bool, None and ndarrays of numbers,
        nested. Arrays may be read-only. 16-bit unsigned integers are taken for the bits of bfloat16, as Paddle writes
        them, and become float32.

    Raises:
        ConversionError: it asks for more than that.
        Exception: of any kind, where it is damaged.
    """
    machine = _Unpickler(file, size) if find_storage is None else _TorchUnpickler(file, size, find_storage)
    return _plain(machine.load())


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Turn the bits of bfloat16, as unsigned integers, into float32: they are the upper half of it."""
    return np.asarray(np.left_shift(bits, 16, dtype=np.uint32)).view(np.float32)


def shown(value: object) -> str:
    """Return a foreign text so that it keeps to a line of a terminal; of a container only the kind, however deep."""
    told = isinstance(value, str | Exception | _Global)
    return repr(str(value))[1:-1][:100] if told else type(value).__name__.strip("_")


def _plain(value: object) -> object:
    """Copy containers, so that none is anything else or contains itself; each place of a shared one counts."""
    left = MAX_VALUES

    def copy(value, depth=0):
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise ConversionError(f"it holds more than {MAX_VALUES:,} values, or nests them deeper than {MAX_DEPTH}")
        kind = type(value)
        if kind in (str, bytes, float, bool, NoneType, np.ndarray):
            return value
        if kind is int and -(1 << 63) <= value < 1 << 64:  # a longer one could not even be printed
            return value
        if kind in (list, tuple):
            return kind([copy(item, depth + 1) for item in value])
        if kind in (dict, OrderedDict, Namespace):
            return kind((key, copy(item, depth + 1)) for key, item in value.items())
        if kind is _Array and value.array is not None:
            return value.array
        raise ConversionError(f"it holds a {shown(value)}, and only arrays and plain containers are admitted")

    return copy(value)


def as_numbers(array: np.ndarray) -> np.ndarray:
    """Return foreign numbers as NumPy can hold them, copied where they are bool, bfloat16 or of another byte order."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.bool_:  # NumPy relies on bytes of 0 and 1
        return np.asarray(array.view(np.uint8) != 0)
    return bfloat16_to_float32(array) if array.dtype == np.uint16 else array


def _sizes(values: object) -> tuple[int, ...]:
    if type(values) is not tuple or not all(type(size) is int and 0 <= size < 1 << 62 for size in values):
        raise ConversionError("it gives a tensor a shape, strides or a length that are none")
    return values


class _Global:
    """The name of a global; it can do nothing."""

    def __init__(self, name: str):
        self.name = name

    def __str__(self) -> str:
        return self.name


class _DType:
    """A pickled ``numpy.dtype``, whose byte order comes in its state."""

    def __init__(self, code: object, *_):
        if type(code) is not str or code not in _NUMBERS:
            raise ConversionError(f"an array of '{shown(code)}' is no tensor")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        if state not in [(3, order, None, None, None, -1, -1, 0) for order in "<>|"]:
            raise ConversionError("it gives a numpy.dtype something else than a byte order")
        self.dtype = np.dtype(state[1] + self.dtype.str[1:])


class _Array:
    """A pickled ``numpy.ndarray``, which comes in its state."""

    def __init__(self, kind: object, *_):
        if not isinstance(kind, _Global) or kind.name != "numpy.ndarray":
            raise ConversionError("it asks NumPy for something else than an array")
        self.array = None

    def __setstate__(self, state: object) -> None:
        _, shape, kind, fortran, raw = state
        if type(kind) is not _DType or type(raw) is not bytes:
            raise ConversionError("it gives an array something else than numbers")
        if math.prod(_sizes(shape)) * kind.dtype.itemsize != len(raw):
            raise ConversionError(f"an array of shape {shape} has {len(raw)} bytes")
        self.array = as_numbers(np.ndarray(shape, kind.dtype, raw, order="F" if fortran is True else "C"))


class _Bounded:
    """A file that knows its length, so that a length in it that goes beyond allocates nothing."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, size

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._left:
            raise EOFError("a length in it goes beyond its end")
        self._left -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline()
        self._left -= len(line)
        return line


class _Operations:
    """The operations by their codes, at most so many of them: a byte of some makes a hundred in memory."""

    def __init__(self, table: dict):
        self._table, self._left = table, MAX_VALUES

    def __getitem__(self, code: int):
        self._left -= 1
        if self._left < 0:
            raise ConversionError(f"it takes more than {MAX_VALUES:,} steps")
        return self._table[code]


class _Unpickler(pickle._Unpickler):  # the one in C calls what it finds, and a memo's index alone can fill its memory
    """The machine: what calls, sets or hashes is replaced, what makes other kinds of objects is refused."""

    globals = _GLOBALS | _TUPLES

    def __init__(self, file: BinaryIO, size: int):
        super().__init__(_Bounded(file, size))
        self.dispatch = _Operations(_TABLE)
        self._room = 2 * size  # for the bytes of arrays and the texts that old protocols make them from, used again

    def find_class(self, module: str, name: str) -> _Global:
        """Return the name of an admitted global; anything else is refused by its name."""
        if f"{module}.{name}" not in self.globals:
            asked = shown(f"{module}.{name}")
            raise ConversionError(f"it asks for '{asked}', and only arrays and plain containers are admitted")
        return _Global(f"{module}.{name}")

    def persistent_load(self, pid: object):
        """Refuse: Paddle's files name nothing outside of the pickle."""
        raise ConversionError(f"it asks for '{shown(pid)}' outside of itself")

    def call(self, name: str, args: tuple) -> object:
        """Return what stands for ``name(*args)``."""
        if name in ("collections.OrderedDict", "argparse.Namespace") and not args:
            return OrderedDict() if name == "collections.OrderedDict" else Namespace()
        if name == "_codecs.encode":  # by which old protocols write bytes; other codecs would be imported by name
            text, encoding = args
            if encoding != "latin1" or type(text) is not str:
                raise ConversionError(f"it encodes text as '{shown(encoding)}'")
            self._take(len(text))
            return text.encode("latin1")
        if name == "numpy.dtype":
            return _DType(*args)
        if name in _ARRAYS:
            return _Array(*args)
        # Paddle's way with a tensor in a table within a table: its name and its numbers.
        if name in _TUPLES and [type(arg) is tuple and list(map(type, arg)) for arg in args] == [[str, _Array]]:
            return args[0][1]
        raise ConversionError(f"it calls '{name}' as nobody does who saves tensors")

    def _take(self, count: int) -> None:
        self._room -= count
        if self._room < 0:
            raise ConversionError("its arrays are larger than itself")

    def _instantiate(self, function: object, args: list | tuple) -> None:
        """Put what stands for ``function(*args)`` onto the stack."""
        if not isinstance(function, _Global) or type(args) not in (list, tuple):
            raise ConversionError(f"it calls {shown(function)}")
        self.append(self.call(function.name, tuple(args)))

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self._instantiate(function, args)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedDict and type(state) is dict:
            return  # the versions of modules, which PyTorch keeps as an attribute
        if type(target) not in (_DType, _Array, Namespace):
            raise ConversionError(f"it sets the state of {shown(target)}")
        target.__setstate__(state)
        if type(target) is _Array:
            self._take(len(state[4]))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list) -> None:
        """Fill the dict on the stack. Keys are simple: the hash of nested tuples can overflow the stack of C."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, NoneType) or (type(key) is int and abs(key) >= 1 << 32):
                raise ConversionError(f"it names an entry by a {type(key).__name__}; names are texts or small numbers")
            if not isinstance(self.stack[-1], dict):
                raise ConversionError(f"it names an entry of a {shown(self.stack[-1])}")
            self.stack[-1][key] = value


def _refused(name: str):
    def refuse(unpickler: _Unpickler) -> None:
        raise ConversionError(f"it uses the pickle operation {name}, and no saved tensors do")

    return refuse


_REFUSED = ("EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "EMPTY_SET", "ADDITEMS", "FROZENSET", "BYTEARRAY8", "NEXT_BUFFER")
_TABLE = {
    **pickle._Unpickler.dispatch,
    **{getattr(pickle, name)[0]: _refused(name) for name in (*_REFUSED, "READONLY_BUFFER")},
    pickle.REDUCE[0]: _Unpickler._reduce,
    pickle.NEWOBJ[0]: _Unpickler._reduce,
    pickle.BUILD[0]: _Unpickler._build,
    pickle.SETITEM[0]: _Unpickler._set_item,
    pickle.SETITEMS[0]: _Unpickler._set_items,
    pickle.DICT[0]: _Unpickler._dict,
}


class _TorchUnpickler(_Unpickler):
    """The machine for PyTorch's pickles, which name storages outside of themselves."""

    globals = _GLOBALS | _TENSORS | _STORAGES.keys()

    def __init__(self, file: BinaryIO, size: int, find_storage: Callable):
        super().__init__(file, size)
        self._find_storage = find_storage

    def persistent_load(self, pid: object) -> "_Storage":
        """Return the storage that ``("storage", type, key, place, number of elements)`` names.

        Before PyTorch 1.6 a sixth entry said of which other storage it is a view; it has been None since 0.4.
        """
        if type(pid) is not tuple or pid[5:] not in ((), (None,)) or pid[:1] != ("storage",) or len(pid) < 5:
            raise ConversionError(f"it asks for '{shown(pid)}', which is no storage")
        _, kind, key, _, count = pid[:5]
        if type(key) is not str:
            raise ConversionError(f"it asks for '{shown(pid)}', which is no storage")
        if not isinstance(kind, _Global) or kind.name not in _STORAGES:
            raise ConversionError(f"it has a storage of kind '{shown(kind)}', which is none")
        return _Storage(self._find_storage(key, np.dtype(_STORAGES[kind.name]), *_sizes((count,))))

    def call(self, name: str, args: tuple) -> object:
        """Return what stands for ``name(*args)``."""
        if name == "torch._utils._rebuild_tensor_v2":
            return _tensor(*args[:4])
        if name == "torch._utils._rebuild_parameter":
            return args[0]
        return super().call(name, args)


class _Storage:
    """A storage by itself, of which a tensor is a view."""

    def __init__(self, numbers: np.ndarray):
        self.numbers = numbers


def _tensor(storage: object, offset: object, size: object, stride: object) -> np.ndarray:
    """Return the view of a storage that a tensor is, once it is known to lie within."""
    if type(storage) is not _Storage:
        raise ConversionError("it has a tensor without a storage")
    numbers, (offset,), size, stride = storage.numbers, _sizes((offset,)), _sizes(size), _sizes(stride)
    if not math.prod(size):
        return np.zeros(size, numbers.dtype)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if last >= len(numbers) or math.prod(size) > len(numbers):
        raise ConversionError(f"a tensor of shape {size} is larger than its storage; save a copy of it (.contiguous())")
    steps = [step * numbers.itemsize if length > 1 else 0 for length, step in zip(size, stride, strict=True)]
    return as_strided(numbers[offset:], size, steps, writeable=False)
