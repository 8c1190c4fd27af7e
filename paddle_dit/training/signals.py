"""Signals that ask a run to stop: noticed at once, obeyed at the end of a step."""

import contextlib
import os
import select
import signal
import socket
import threading
import time

STOPPED = 75  # exit code of a run that saved and stopped because a signal asked for it: "try again later" (EX_TEMPFAIL)
# Seconds within which a repeated signal is the same one: a launcher sends its own three times, 0.2 s apart, to one rank
# after the other, and whoever stops a whole job sends one to each process besides.
PATIENCE = max(2.0, 0.8 * int(os.environ.get("PADDLE_LOCAL_SIZE", "1")))
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
        """Give them back; one of several ranks, which is about to end, ignores more of them.

        A launcher sends SIGTERM as soon as one rank has ended, which must not change the exit codes of the others.
        """
        if self._installed:
            several = int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1
            for number, handler in self._former.items():
                signal.signal(number, signal.SIG_IGN if several else handler)
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
                        self._say(f"{self.received}: stopping in good order after this step; once more ends it at once")
                    elif now - first >= PATIENCE:
                        self._say("stopped at once; what was written whole is kept")
                        os._exit(128 + number)

    @staticmethod
    def _say(line: str) -> None:
        # print and tqdm take locks, which the main thread may hold for ever; whoever read this may be gone or stuck.
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0)[1]:
                os.write(2, f"\n{line}\n".encode())


def _leave_it_to_the_thread(number: int, frame: object) -> None:
    """Let Python's own handler in C do no more than write the signal's number to the socket."""
