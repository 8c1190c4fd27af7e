"""Writing safetensors one tensor after the other, so that a file of any size takes the memory of its largest tensor."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from paddle_dit.files import flush_to_disk


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    report: Callable[[int], object] = lambda count: None,
) -> None:
    """Write float32 tensors whose shapes are known before their numbers.

    Args:
        path: of the file.
        shapes: name -> shape, in the order in which the tensors come.
        tensors: names and float32 arrays, each of which may be dropped as soon as the next is asked for.
        metadata: texts for the header; readers of PyTorch want ``{"format": "pt"}``, Paddle's ``{"format": "pd"}``.
        report: is told after each tensor how many bytes it had.

    Raises:
        ValueError: a tensor that was not announced so.
        OSError: the file cannot be written.
    """
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (wanted, shape), (name, array) in zip(shapes.items(), tensors, strict=True):
            if (name, array.shape, array.dtype) != (wanted, shape, np.float32):
                raise ValueError(f"'{name}' {array.shape} {array.dtype} in the place of '{wanted}' {shape} float32")
            file.write(np.ascontiguousarray(array).astype("<f4", copy=False).data)
            report(array.nbytes)
    flush_to_disk(path)
