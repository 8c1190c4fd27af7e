"""What one rank's failure does to the others, between real processes."""

import atexit
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paddle_dit import runtime
from paddle_dit.errors import ConfigError, NonFiniteLossError, PaddleDiTError, entry_point
from paddle_dit.training.ranks import Ranks

runtime.prepare()

CASES = {  # what each of two ranks raises -> what each then sees
    "a bug": ([None, KeyError("a bug")], ["PaddleDiTError: rank 1: KeyError: 'a bug'", "KeyError: 'a bug'"]),
    "bad data": ([ConfigError("bad file"), None], ["PaddleDiTError: rank 0: bad file"] * 2),
    "bad losses": (
        [NonFiniteLossError(3, [2]), NonFiniteLossError(3, [5])],
        ["NonFiniteLossError: the loss is not finite at step 3 [2, 5]"] * 2,
    ),
    "a bad loss and bad data": ([NonFiniteLossError(3, [2]), ConfigError("bad")], ["PaddleDiTError: rank 1: bad"] * 2),
    "nothing": ([None, None], ["fine"] * 2),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder / "launch_log")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
    command = [sys.executable, *launcher, __file__, str(folder)]
    return subprocess.run(command, env=environment, check=False), folder


@pytest.fixture(scope="module")
def seen(ended):
    _, folder = ended
    return [(folder / f"rank-{rank}").read_text().splitlines() for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_one_ranks_failure_is_everyones(case, seen):
    for rank, expected in enumerate(CASES[case][1]):
        assert seen[rank][list(CASES).index(case)].startswith(expected)


@pytest.mark.distributed
def test_a_rank_ends_without_the_end_of_cpp_but_with_pythons(ended):
    """Where Paddle's own threads may abort while C++ takes its globals down."""
    result, folder = ended
    assert result.returncode == 2
    assert [(folder / f"ended-{rank}").read_text() for rank in range(2)] == ["as it should"] * 2
    assert "printed" in (folder / "launch_log" / "workerlog.1").read_text()


def test_a_lone_rank_keeps_its_own_error():
    with pytest.raises(ConfigError, match=r"^bad$"), Ranks().together():
        raise ConfigError("bad")


def outcome(ranks, error):
    try:
        with ranks.together():
            if error is not None:
                raise error
    except NonFiniteLossError as caught:
        return f"NonFiniteLossError: {caught} {caught.positions}"
    except (PaddleDiTError, KeyError) as caught:
        return f"{type(caught).__name__}: {caught}"
    return "fine"


@entry_point
def main():
    libc = ctypes.CDLL(None)
    libc.on_exit(libc.abort, None)
    ranks, folder = Ranks.join(), Path(sys.argv[1])
    atexit.register((folder / f"ended-{ranks.rank}").write_text, "as it should")
    lines = [outcome(ranks, raised[ranks.rank]) for raised, _ in CASES.values()]
    (folder / f"rank-{ranks.rank}").write_text("\n".join(lines))
    print("printed")
    raise ConfigError("the end")


if __name__ == "__main__":
    main()
