import threading
import time

import pytest

from paddle_dit.training.background import Background


class Break(Exception):
    """What a piece of work raises."""


def break_with(text):
    def work():
        raise Break(text)

    return work


@pytest.fixture
def background():
    with Background() as background:
        yield background


def test_pieces_never_overlap_and_keep_their_order(background):
    happened, running, overlaps = [], threading.Lock(), []

    def work(number):
        def piece():
            overlaps.append(not running.acquire(blocking=False))
            time.sleep(0.02)
            happened.append(number)
            running.release()

        return piece

    for number in range(5):
        background.do(work(number))
    background.wait()
    assert happened == [0, 1, 2, 3, 4]
    assert not any(overlaps)


def test_work_goes_on_beside_the_caller(background):
    ran_in = []
    background.do(lambda: ran_in.append(threading.current_thread()))
    background.wait()
    assert ran_in[0] is not threading.current_thread()


def test_the_caller_is_not_kept_waiting():
    go_on = threading.Event()
    with Background() as background:
        background.do(go_on.wait)
        assert background.busy
        assert not background.has_failed, "it still runs"
        go_on.set()  # reached only because do() returned before its work did


def test_wait_raises_what_the_work_raised_once():
    with Background() as background:
        background.do(break_with("the disk is full"))
        with pytest.raises(Break, match="the disk is full"):
            background.wait()
        background.wait()
        assert not background.has_failed


def test_the_next_piece_is_not_begun_after_one_that_failed():
    begun = []
    with Background() as background:
        background.do(break_with("first"))
        with pytest.raises(Break, match="first"):
            background.do(lambda: begun.append("second"))
        assert begun == []
        background.do(lambda: begun.append("third"))
    assert begun == ["third"]


def test_a_failure_is_told_before_anyone_waits():
    with Background() as background:
        background.do(break_with("soon"))
        end = time.monotonic() + 5
        while not background.has_failed and time.monotonic() < end:
            time.sleep(0.005)
        assert background.has_failed
        assert background.has_failed, "asking does not use it up"
        with pytest.raises(Break):
            background.wait()


def test_leaving_waits_for_the_work():
    done = []
    with Background() as background:
        background.do(lambda: time.sleep(0.1) or done.append(1))
    assert done == [1]
    with pytest.raises(RuntimeError):  # the thread is gone
        background.do(done.clear)


def test_leaving_raises_what_nobody_waited_for():
    with pytest.raises(Break, match="at the end"), Background() as background:
        background.do(break_with("at the end"))


def leave_by(error):
    with Background() as background:
        background.do(break_with("the disk is full"))
        raise error


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(75)], ids=["error", "exit code"])
def test_another_error_on_its_way_is_not_replaced_and_the_works_is_printed(capsys, error):
    with pytest.raises(type(error)):
        leave_by(error)
    assert capsys.readouterr().err == "and in the background: the disk is full\n"
