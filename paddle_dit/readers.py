"""Reading weight files without running anything that they say.

A ``.pdparams`` file is a Python pickle, that is, a program. It is read by an unpickler that knows how to rebuild NumPy
arrays and nothing else.
"""

import codecs
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from paddle_dit.errors import ConversionError

# Names of the weight files in a folder of ppdiffusers, in the order in which it looks for them.
STOCK_WEIGHTS = {"safetensors": "diffusion_paddle_model.safetensors", "pdparams": "model_state.pdparams"}
_PARAMETER_NAMES = "StructuredToParameterName@@"  # Paddle's record of its generated names, among the tensors


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read a ``.safetensors`` or ``.pdparams`` file: name -> array. bfloat16, which NumPy lacks, becomes float32.

    Raises:
        ConversionError: the file is missing, cut short, of another kind, or its pickle asks for more than arrays.
    """
    path = Path(path)
    readers = {".safetensors": _read_safetensors, ".pdparams": _read_pdparams}
    if path.suffix not in readers:
        raise ConversionError(f"cannot read {path}: known weight files end in {' or '.join(readers)}")
    if not path.is_file():
        raise ConversionError(f"no such file: {path}")
    return readers[path.suffix](path)


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
        tensors[name] = _widened(bits.reshape(entries[name]["shape"]))
    return tensors


def _read_pdparams(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            values = _ArrayUnpickler(file).load()
    except ConversionError as error:
        raise ConversionError(f"{path} is refused: {error}") from None
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a broken pickle can fail in any operation
        raise ConversionError(f"{path} is cut short or no Paddle weights ({type(error).__name__}: {error})") from None
    if not isinstance(values, dict):
        raise ConversionError(f"{path} holds a {type(values).__name__}, not a table of tensors")
    values.pop(_PARAMETER_NAMES, None)
    for name, array in values.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise ConversionError(f"{path}: entry {name!r} is no tensor; give a file of weights only")
    # Paddle stores bfloat16 as its bits, and no weights are 16-bit integers.
    return {name: _widened(array) if array.dtype == np.uint16 else array for name, array in values.items()}


def _widened(bits: np.ndarray) -> np.ndarray:
    """Turn the bits of bfloat16 into float32: they are the upper half of it."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for ``_codecs.encode``, by which old pickles write bytes; other codecs would be imported by name."""
    if encoding != "latin1":
        raise ConversionError(f"it encodes text as '{encoding}'")
    return codecs.latin_1_encode(text)[0]


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that admits only what rebuilds NumPy arrays."""

    _ADMITTED = {  # noqa: RUF012 - never changed
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
        # NumPy 1 and 2 name it differently; either reads the other's files.
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str):
        """Return an admitted global; anything else is refused by name."""
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise ConversionError(f"it asks for '{module}.{name}', and only NumPy arrays are admitted") from None
