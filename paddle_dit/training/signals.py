"""Signals that ask a run to stop: noticed at once, obeyed at the end of a step."""

import os
import signal
import socket
import threading
import time

STOPPED = 75  # exit code of a run that saved and stopped because a signal asked for it: "try again later" (EX_TEMPFAIL)
PATIENCE = 2.0  # seconds within which a repeated signal is the same one: launchers send theirs several times
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Within its context, the first SIGTERM or SIGINT only sets :attr:`received`.

    One that comes :data:`PATIENCE` seconds later, or any after it, ends the process at once, with exit code 128 plus
    its number.

    A thread listens, because a Python handler runs in the main thread alone, which may be inside a collective call that
    waits for a rank that is gone. Outside the main thread Python installs no handlers, and the context does nothing.

    Attributes:
        received: the name of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._installed = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopSignals":
        """Take the signals over from whoever handles them."""
        if self._installed:
            self._receiver, self._sender = socket.socketpair()
            self._sender.setblocking(False)
            self._former_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            self._former = {number: signal.signal(number, _leave_it_to_the_thread) for number in _SIGNALS}
            threading.Thread(target=self._listen, name="stop-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        if self._installed:
            for number, handler in self._former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._former_descriptor)
            self._sender.close()  # which ends the thread

    def _listen(self) -> None:
        first = None
        with self._receiver:
            while numbers := self._receiver.recv(64):
                now = time.monotonic()
                for number in (number for number in numbers if number in _SIGNALS):
                    if first is None:
                        first, self.received = now, signal.Signals(number).name
                        self._say(f"{self.received}: finishing this step, then saving; once more ends it at once")
                    elif now - first >= PATIENCE:
                        self._say("stopped at once; the checkpoints are as they were")
                        os._exit(128 + number)

    @staticmethod
    def _say(line: str) -> None:
        os.write(2, f"\n{line}\n".encode())  # print and tqdm take locks, which the main thread may hold for ever


def _leave_it_to_the_thread(number: int, frame: object) -> None:
    """Let Python's own handler in C do no more than write the signal's number to the socket."""
