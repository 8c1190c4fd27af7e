"""Signals as a process gets them: in this one where nothing ends it, in a child where something does."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from paddle_dit.training.signals import PATIENCE, STOPPED, StopSignals
from tests.conftest import ROOT

BOTH = [signal.SIGTERM, signal.SIGINT]
CHILD = """
import threading
from paddle_dit.training.signals import StopSignals

with StopSignals() as stop:
    stuck = threading.Lock()
    stuck.acquire()
    print("ready", flush=True)
    stuck.acquire()
"""


def until(true, seconds=10.0):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    assert true()


def listeners():
    return [thread for thread in threading.enumerate() if thread.name == "stop-signals"]


def test_the_code_of_a_stopped_run_is_the_one_that_is_documented():
    assert STOPPED == os.EX_TEMPFAIL == 75


@pytest.fixture(autouse=True)
def _former_handlers():
    former = [signal.getsignal(number) for number in BOTH]
    yield
    for number, handler in zip(BOTH, former, strict=True):
        signal.signal(number, handler)


def test_one_of_several_ranks_ignores_them_from_then_on(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with StopSignals():
        assert all(callable(signal.getsignal(number)) for number in BOTH)
    assert [signal.getsignal(number) for number in BOTH] == [signal.SIG_IGN] * 2


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_only_noted_and_repetitions_within_the_patience_are_the_same_one(number, capfd):
    with StopSignals() as stop:
        assert stop.received is None
        for _ in range(50):
            os.kill(os.getpid(), number)
        until(lambda: stop.received is not None)
        other = BOTH[1 - BOTH.index(number)]
        os.kill(os.getpid(), other)  # launchers answer Ctrl-C by SIGTERM
        time.sleep(0.2)
        assert stop.received == number.name
    told = [line for line in capfd.readouterr().err.splitlines() if line]
    assert told == [f"{number.name}: stopping in good order after this step; once more ends it at once"]


def test_former_handlers_come_back_and_get_the_next_signal():
    got = []
    former = {number: signal.signal(number, lambda number, frame: got.append(number)) for number in BOTH}
    try:
        until(lambda: not listeners())  # of the tests before
        handlers = [signal.getsignal(number) for number in BOTH]
        for _ in range(3):
            with StopSignals():
                until(lambda: len(listeners()) == 1)
                assert [signal.getsignal(number) for number in BOTH] != handlers
            assert [signal.getsignal(number) for number in BOTH] == handlers
            assert signal.set_wakeup_fd(-1) == -1
        until(lambda: not listeners())
        for number in BOTH:
            os.kill(os.getpid(), number)
        until(lambda: got == BOTH)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_former_handlers_come_back_after_an_error_too():
    before = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in BOTH] == before


def test_another_signal_is_none_of_its_business():
    got, former = [], signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: got == [signal.SIGUSR1])
            time.sleep(0.1)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_off_the_main_thread_it_does_nothing():
    before, seen = [signal.getsignal(number) for number in BOTH], []

    def work():
        with StopSignals() as stop:
            seen.append(([signal.getsignal(number) for number in BOTH], stop.received, len(listeners())))

    until(lambda: not listeners())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None, 0)]
    assert [signal.getsignal(number) for number in BOTH] == before


@pytest.fixture
def child():
    """Return a function that starts a process which listens to signals while its main thread waits for ever."""
    started = []

    def start():
        command, pipe = [sys.executable, "-c", CHILD], subprocess.PIPE
        process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", BOTH)
def test_a_second_signal_after_the_patience_ends_the_process_at_once_though_the_main_thread_is_stuck(child, number):
    process = child()
    process.send_signal(number)
    time.sleep(PATIENCE / 2)
    process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None
    time.sleep(PATIENCE / 2)
    process.send_signal(number)
    assert process.wait(timeout=5) == 128 + number
    assert "stopped at once; what was written whole is kept" in process.stderr.read()


def test_the_number_of_the_last_signal_is_told(child):
    process = child()
    process.send_signal(signal.SIGTERM)
    time.sleep(PATIENCE + 0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 128 + signal.SIGINT == 130


def fill(pipe):
    """Write until nothing fits, as into a terminal that has been stopped."""
    descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x" * 4096)
    os.close(descriptor)


@pytest.mark.parametrize("reader", ["gone", "stuck"])
def test_a_second_signal_counts_though_nobody_reads_what_is_said(child, reader):
    process = child()
    if reader == "gone":
        process.stderr.close()
    else:
        fill(f"/proc/{process.pid}/fd/2")
    process.send_signal(signal.SIGTERM)
    time.sleep(PATIENCE + 0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143
