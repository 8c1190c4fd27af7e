"""Files of tensors are written one tensor after the other, and only as announced."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from paddle_dit.writers import write_safetensors

ARRAYS = {
    "z": np.arange(6, dtype=np.float32).reshape(2, 3),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "a": np.array(2.5, np.float32),
    "none": np.zeros((0, 3), np.float32),
}
SHAPES = {name: array.shape for name, array in ARRAYS.items()}


def test_the_library_reads_what_was_written(tmp_path):
    told = []
    write_safetensors(tmp_path / "x", SHAPES, ARRAYS.items(), {"format": "pt"}, told.append)
    found = load_file(tmp_path / "x")
    assert found.keys() == ARRAYS.keys()
    assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())
    assert told == [24, 24, 4, 0]
    with safe_open(tmp_path / "x", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    start = 8 + int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
    assert start % 8 == 0


@pytest.mark.parametrize(
    ("name", "array"),
    [("b", ARRAYS["z"]), ("z", ARRAYS["turned"]), ("z", ARRAYS["z"].astype(np.float64))],
)
def test_what_was_not_announced_is_refused(tmp_path, name, array):
    with pytest.raises(ValueError, match="in the place of 'z'"):
        write_safetensors(tmp_path / "x", {"z": (2, 3)}, [(name, array)])


def test_too_few_and_too_many_are_refused(tmp_path):
    for arrays in ({}, ARRAYS):
        with pytest.raises(ValueError, match="argument 2 is"):
            write_safetensors(tmp_path / "x", {"z": (2, 3)}, arrays.items())
