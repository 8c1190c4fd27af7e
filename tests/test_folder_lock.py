import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from paddle_dit.errors import ConfigError
from paddle_dit.folder_lock import LOCK, FolderLock


@pytest.fixture
def told():
    """Lines that a lock reported."""
    return []


@pytest.fixture
def take(tmp_path, told):
    """Return a function that locks a folder; all are released at the end."""
    held = []

    def take(folder=tmp_path):
        held.append(FolderLock(folder, "--output-dir", told.append))
        return held[-1]

    yield take
    for lock in held:
        lock.release()


def test_a_second_taker_is_told_who_has_it(take, tmp_path, told):
    take()
    before = (tmp_path / LOCK).read_bytes()
    me = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(ConfigError) as refused:
        take()
    assert str(refused.value).startswith(f"--output-dir {tmp_path} is in use by {me};")
    assert (tmp_path / LOCK).read_bytes() == before
    assert told == []


def test_it_may_be_released_twice_and_then_anyone_takes_it_without_a_word(take, told):
    first = take()
    first.release()
    first.release()
    take()
    first.release()  # no longer its own
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        take()
    assert told == []


def test_other_folders_are_not_affected(take, tmp_path, told):
    (tmp_path / "other").mkdir()
    take()
    take(tmp_path / "other").release()
    with pytest.raises(ConfigError):
        take()
    assert told == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"rubbish",
        b"\xff\xfe\x00binary",
        b"[1, 2]",
        b"null",
        b"{}",
        b'{"pid": 12}',
        b'{"pid": "x", "host": "y"}',
        b'{"pid": Infinity, "host": "y"}',
        b'{"pid": NaN, "host": "y"}',
        b"[" * 100_000,
        b'{"pid": ' + b"9" * 5000 + b', "host": "y"}',
    ],
    ids=range(13),
)
def test_rubbish_in_the_lock_keeps_nobody_out(take, tmp_path, told, text):
    (tmp_path / LOCK).write_bytes(text)
    take()
    assert told == []
    assert json.loads((tmp_path / LOCK).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}


@pytest.mark.parametrize("text", [b"", b"\xff\xferubbish"])
def test_one_that_cannot_be_named_keeps_others_out_too(take, tmp_path, text):
    take()
    (tmp_path / LOCK).write_bytes(text)
    with pytest.raises(ConfigError, match="is in use by another process;"):
        take()


def test_one_that_ended_without_a_word_is_named_by_the_next(take, tmp_path, told):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1234, "host": "far\naway"}))
    take()
    assert told == [f"{tmp_path} was in use by process 1234 on far away, which ended without a word: taking over"]


def test_a_holder_that_releases_just_before_is_not_said_to_have_died(take, told, monkeypatch):
    """Released after another has opened the file, and before that one has the lock."""
    from paddle_dit import folder_lock

    first, flock = take(), folder_lock.fcntl.flock

    def late(*arguments):
        first.release()
        flock(*arguments)

    monkeypatch.setattr(folder_lock.fcntl, "flock", late)
    take()
    assert told == []


def race(gate, folder, told):
    gate.wait()
    try:
        return FolderLock(folder, "--output-dir", told.append)
    except ConfigError as error:
        return error


def test_of_many_threads_one_gets_it(tmp_path, told):
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            gate = threading.Barrier(8)
            results = list(pool.map(race, [gate] * 8, [tmp_path] * 8, [told] * 8))
            locks = [lock for lock in results if isinstance(lock, FolderLock)]
            assert len(locks) == 1
            locks[0].release()
    assert told == []


def test_a_folder_that_was_moved_away_is_locked_anew(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder, "--output-dir")
    lock.keep()
    folder.rename(tmp_path / "aside")
    lock.keep()
    with pytest.raises(ConfigError, match="is in use"):
        FolderLock(folder, "--output-dir")
    lock.release()
    FolderLock(folder, "--output-dir").release()


def test_a_folder_made_anew_may_have_been_taken_by_another(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder, "--output-dir")
    folder.rename(tmp_path / "aside")
    folder.mkdir()
    other = FolderLock(folder, "--output-dir")
    with pytest.raises(ConfigError, match="is in use"):
        lock.keep()
    lock.release()
    other.keep()
    other.release()
