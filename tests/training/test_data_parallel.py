"""What of ZeRO can run without a GPU: cutting, joining and merging arrays between real processes, and the refusals."""

import sys
from pathlib import Path

import numpy as np
import pytest

from paddle_dit import runtime
from paddle_dit.errors import ConfigError

runtime.prepare()

SHAPES = {"odd": (3, 5), "even": (4, 4), "row": (7,)}


def arrays():
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_slices_are_equal_and_make_up_the_whole():
    from paddle_dit.training.data_parallel import slice_of

    for whole in arrays().values():
        size = -(-whole.size // 2)
        pieces = [slice_of(whole, size, rank) for rank in range(2)]
        assert [piece.shape for piece in pieces] == [(size,), (size,)]
        np.testing.assert_array_equal(np.concatenate(pieces)[: whole.size], whole.reshape(-1))


def test_sharding_wants_several_ranks():
    from paddle_dit.training.data_parallel import ShardedDataParallel
    from paddle_dit.training.ranks import Ranks

    with pytest.raises(ConfigError, match="needs several ranks"):
        ShardedDataParallel(Ranks(), "stage2")


@pytest.mark.distributed
def test_two_ranks_join_slices_and_merge_state(run_command, tmp_path):
    result = run_command(__file__, tmp_path, processes=2, log_dir=tmp_path / "launch_log")
    assert result.returncode == 0, result.stdout
    for rank in range(2):
        found = np.load(tmp_path / f"rank-{rank}.npz")
        for name, whole in arrays().items():
            np.testing.assert_array_equal(found[f"joined-{name}"], whole)
            np.testing.assert_array_equal(found[f"merged-{name}"], whole)


def work(folder):
    """Cut and join every array, and merge a dictionary of which each rank has another part."""
    import paddle

    from paddle_dit.training.data_parallel import joined, merged, slice_of
    from paddle_dit.training.ranks import Ranks

    ranks, found = Ranks.join(), {}
    for name, whole in arrays().items():
        piece = paddle.to_tensor(slice_of(whole, -(-whole.size // 2), ranks.rank))
        found[f"joined-{name}"] = joined(piece, whole.shape, ranks).numpy()
    own = {name: array for index, (name, array) in enumerate(arrays().items()) if index % 2 == ranks.rank}
    found |= {f"merged-{name}": array for name, array in merged(own, ranks).items()}
    np.savez(folder / f"rank-{ranks.rank}.npz", **found)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
