"""Processes that share parts of a result by files in its folder, each played by an object of this process."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from paddle_dit import meeting as meetings
from paddle_dit.errors import DataError
from paddle_dit.meeting import NOTICE, Meeting, Place, StoppedError


@dataclass(frozen=True)
class Parts:
    """Five parts, each a file that says nothing."""

    folder: Path
    name: str = "the same"
    num_parts: int = 5
    flag = "--output"

    def is_whole(self):
        return False

    def begin(self):
        return False

    def finished(self):
        return {number for number, path in self.sidecars() if path.read_text() != "damaged"}

    def sidecars(self):
        for path in sorted(self.folder.glob("part-*")):
            yield int(path.name.split("-")[1]), path


def start(folder, rank, launch="a", stop=lambda: False, **fields):
    meeting = Meeting(Parts(folder, **fields), Place(rank, 2, launch), lambda line: None)
    meeting.hold()
    meeting.begin(stop)
    return meeting


def test_shares_are_disjoint_and_whatever_is_finished_is_left_out(tmp_path):
    main, other = start(tmp_path, 0), start(tmp_path, 1)
    assert (main.share(), other.share()) == ([0, 2, 4], [1, 3])
    main.close()
    for number in (1, 2):
        (tmp_path / f"part-{number}").touch()
    main, other = start(tmp_path, 0), start(tmp_path, 1)
    assert (main.share(), other.share()) == ([0, 4], [3])


def test_a_damaged_part_is_shared_out_again(tmp_path):
    (tmp_path / "part-2").write_text("damaged")
    main = start(tmp_path, 0)
    assert main.share() == [0, 2, 4]
    assert main.done() == frozenset()


@pytest.mark.parametrize("case", ["no start", "another start", "a start whose rank 0 is dead"])
def test_a_rank_waits_for_rank_0_of_its_own_start_and_not_for_ever(tmp_path, monkeypatch, case):
    monkeypatch.setattr(meetings, "_START", 0.5)
    if case != "no start":
        start(tmp_path, 0, launch="b" if case == "another start" else "a")
    if case == "a start whose rank 0 is dead":
        notice = json.loads((tmp_path / NOTICE).read_text())
        (tmp_path / NOTICE).write_text(json.dumps(notice | {"pid": 2**22 + 1}))
    with pytest.raises(DataError, match="rank 0 has not begun within"):
        start(tmp_path, 1)
    with pytest.raises(StoppedError):
        start(tmp_path, 1, stop=lambda: True)


def test_a_rank_with_other_options_than_rank_0_is_told(tmp_path):
    start(tmp_path, 0)
    with pytest.raises(DataError, match="rank 0 and rank 1 were started with different options, weights or images"):
        start(tmp_path, 1, name="another")


def test_a_rank_that_fails_tells_rank_0_and_one_whose_rank_0_is_gone_stops(tmp_path):
    main = start(tmp_path, 0)
    other = start(tmp_path, 1)
    for rank in (main, other):
        rank.check(lambda: False)
    other.fail(DataError("no such luck"))
    with pytest.raises(DataError, match="rank 1: no such luck"):
        main.check(lambda: True)
    main.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == []
    with pytest.raises(StoppedError):
        other.check(lambda: False)


def test_rank_0_says_for_whom_it_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(meetings, "_QUIET", 0.3)
    main, said = start(tmp_path, 0), []
    main._report = said.append
    with pytest.raises(StoppedError):
        main.wait_for_all(lambda: said, lambda: None)
    assert said[0].startswith("waiting for 5 parts of rank 0, 1: none was finished for 0 s; if such a rank has died")
