"""A packed store of ImageNet's size: how soon it is open, and what memory it takes."""

import numpy as np
import pytest

from paddle_dit.data.store_index import new_index, write_index


def write_sparse(folder, count, shape=(4, 32, 32), shard_size=16_384):
    """Write a store of zeros that takes no space."""
    folder.mkdir()
    index = new_index(sample_shape=shape, num_classes=1000)
    for number in range(-(-count // shard_size)):
        path, length = folder / f"latents-{number:05d}.npy", min(shard_size, count - number * shard_size)
        np.lib.format.open_memmap(path, "w+", np.float16, (length, *shape))
        index["shards"].append({"length": length, "file": path.name, "bytes": path.stat().st_size, "sha256": "0" * 64})
    write_index(folder, index, np.arange(count) % 1000)


LOOK = """
import sys, time
from pathlib import Path
import numpy as np
from paddle_dit.data.source import open_source

start = time.process_time()
source = open_source(sys.argv[1])
seconds = time.process_time() - start
indices = np.linspace(0, len(source) - 1, 256).astype(np.int64)
assert source.gather(indices)[1].tolist() == (indices % 1000).tolist()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(seconds, int(status["RssAnon"].split()[0]) / 1024)
"""


@pytest.mark.slow
def test_a_store_of_imagenets_size_opens_at_once_and_takes_no_memory_but_its_labels(tmp_path, run_command):
    found = {}
    for count in (10_000, 1_281_167):
        write_sparse(tmp_path / str(count), count)
        result = run_command("-c", LOOK, tmp_path / str(count))
        assert result.returncode == 0, result.stderr
        found[count] = [float(value) for value in result.stdout.split()]
    seconds, memory = found[1_281_167]
    assert seconds < 1
    assert memory - found[10_000][1] < 2 * 8 * 1_281_167 / 2**20  # MiB: labels are int64, and are checked once
