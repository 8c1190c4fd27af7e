"""What is written appears whole under its name, or not at all."""

import subprocess
import sys

import pytest

from paddle_dit.errors import ConfigError
from paddle_dit.files import appears_whole

KILLED = """
import os, pathlib, signal, sys
from paddle_dit.files import appears_whole
with appears_whole(pathlib.Path(sys.argv[1])) as partial:
    partial.mkdir()
    (partial / "x").write_text("x")
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("ready", flush=True)
    input()
"""


def test_a_file_or_folder_appears_at_the_end(tmp_path):
    with appears_whole(tmp_path / "new" / "folder") as partial:
        partial.mkdir()
        (partial / "x").write_text("x")
        assert not (tmp_path / "new" / "folder").exists()
    with appears_whole(tmp_path / "new" / "file") as partial:
        partial.write_text("y")
    assert (tmp_path / "new" / "folder" / "x").read_text() == "x"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["file", "folder"]


def test_a_folder_that_is_there_is_replaced(tmp_path):
    for content in ("old", "new"):
        with appears_whole(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


@pytest.mark.parametrize("kind", ["folder", "file", "nothing"])
def test_what_breaks_leaves_nothing_and_no_parents(tmp_path, kind):
    def breaks():
        with appears_whole(tmp_path / "there" / "a" / "b") as partial:
            if kind == "folder":
                partial.mkdir()
                (partial / "x").write_text("x")
            elif kind == "file":
                partial.write_text("x")
            raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        breaks()
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_appears_meanwhile_stays_where_it_may_not_be_replaced(tmp_path, kind):
    def make():
        with appears_whole(tmp_path / "folder", replace=False) as partial:
            partial.mkdir()
            (partial / "x").write_text("x")
            place = tmp_path / "folder"
            if kind == "folder":
                place.mkdir()
                place /= "mine"
            place.write_text("mine")

    with pytest.raises(ConfigError, match="meanwhile"):
        make()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / "folder"]
    assert subprocess.run([*command, "killed"], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    with subprocess.Popen([*command, "living"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout.readline() == "ready\n"
        assert not left.exists()
        with appears_whole(tmp_path / "folder", replace=False) as partial:
            partial.mkdir()
            assert list(tmp_path.glob(f".*-{living.pid}/x"))
        living.communicate("\n")
    assert living.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
