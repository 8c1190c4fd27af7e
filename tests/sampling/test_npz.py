import subprocess
import sys
import zipfile

import numpy as np
import pytest

from paddle_dit.sampling.npz import write_npz

from ..conftest import ROOT

# Writes images of 256x256 that are made one after the other, and prints the process's peak memory in bytes.
WRITING = """
import sys
import numpy as np
from pathlib import Path
from paddle_dit.runtime import peak_rss
from paddle_dit.sampling.npz import write_npz
count = int(sys.argv[2])
images = (np.full((256, 256, 3), number % 256, np.uint8) for number in range(count))
write_npz(Path(sys.argv[1]), (count, 256, 256, 3), images, np.zeros(count, np.int64))
assert "paddle" not in sys.modules
print(peak_rss())
"""


def write(path, count=5, labels=None):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)
    write_npz(path, images.shape, iter(images), np.arange(count) if labels is None else labels)
    return images


def test_numpy_reads_what_was_written(tmp_path):
    images = write(tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert (file["arr_0"].dtype, file["arr_1"].dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], range(5))


def test_the_arrays_are_those_that_numpy_would_write(tmp_path):
    images = write(tmp_path / "ours.npz")
    np.savez(tmp_path / "numpys.npz", images, np.arange(5))
    with zipfile.ZipFile(tmp_path / "ours.npz") as ours, zipfile.ZipFile(tmp_path / "numpys.npz") as numpys:
        assert ours.namelist() == numpys.namelist()
        for name in ours.namelist():
            assert ours.read(name) == numpys.read(name)


def test_the_same_images_give_the_same_bytes(tmp_path):
    for name in ("one.npz", "two.npz"):
        write(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_an_image_of_another_shape_is_a_bug_and_leaves_the_earlier_file(tmp_path):
    write(tmp_path / "one.npz")
    before = (tmp_path / "one.npz").read_bytes()
    with pytest.raises(ValueError, match="images are uint8"):
        write_npz(tmp_path / "one.npz", (1, 4, 4, 3), [np.zeros((8, 4, 3), np.uint8)], np.zeros(1, np.int64))
    assert (tmp_path / "one.npz").read_bytes() == before


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """50,000 images of 256x256 are 9.4 GB; a line through these two figures stays far below 500 MB there."""
    few, many = 64, 1024
    peaks = {}
    for count in (few, many):
        command = [sys.executable, "-c", WRITING, str(tmp_path / "images.npz"), str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout) / 2**20
    slope = max(0.0, peaks[many] - peaks[few]) / (many - few)
    assert peaks[many] + slope * (50_000 - many) < 500
