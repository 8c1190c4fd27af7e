"""Files as PyTorch writes them, without PyTorch, tensor after tensor."""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..faults.test_pickles import call, name, number, table, tensor, text

KINDS = {"float32": "torch.FloatStorage", "float16": "torch.HalfStorage", "float64": "torch.DoubleStorage"}


def strides(shape):
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


def state_dict(shapes, dtype="float32", start=0):
    """Return the pickle of an OrderedDict of tensors; their numbers are entries from ``start`` on."""
    items = [
        text(key)
        + tensor(
            size=shape, stride=strides(shape), count=int(np.prod(shape)), key=str(start + index), kind=KINDS[dtype]
        )
        for index, (key, shape) in enumerate(shapes.items())
    ]
    return call(name("collections.OrderedDict")) + b"(" + b"".join(items) + b"u"


def options(**values):
    encoded = {key: number(value) if isinstance(value, int) else text(value) for key, value in values.items()}
    return name("argparse.Namespace") + b")\x81" + table(**encoded) + b"b"


def write_stream(path: Path, pickled: bytes, arrays: Iterable[np.ndarray]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        file.writestr("archive/byteorder", b"little")
        for key, array in enumerate(arrays):
            entry = zipfile.ZipInfo(f"archive/data/{key}")
            start = file.fp.tell() + 30 + len(entry.filename) + 4
            entry.extra = b"FB" + (-start % 64).to_bytes(2, "little") + bytes(-start % 64)  # aligned, as PyTorch does
            file.writestr(entry, np.ascontiguousarray(array).data)
    return path


def write_pt(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write a bare state dict."""
    shapes = {key: array.shape for key, array in tensors.items()}
    dtype = str(next(iter(tensors.values())).dtype)
    return write_stream(path, state_dict(shapes, dtype), tensors.values())


def write_training_checkpoint(path: Path, **tables) -> Path:
    """Write tables of tensors (``model``, ``ema``), an optimizer's state and options (``args``) as fast-DiT does."""
    said = tables.pop("args", {})
    arrays, parts = [], {}
    for key, tensors in tables.items():
        parts[key] = state_dict({key: array.shape for key, array in tensors.items()}, start=len(arrays))
        arrays += tensors.values()
    optimizer = table(state=b"}", param_groups=b"](" + table(lr=number(1)) + b"e")
    return write_stream(path, table(**parts, opt=optimizer, args=options(**said)), arrays)
