"""Processes that take turns, so that drift of the machine hits all that is compared alike.

Each framework has a process of its own, which stays alive: they share neither threads nor memory nor settings. This
module needs no package but this project, because other Pythons run it too.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from paddle_dit.errors import PaddleDiTError
from paddle_dit.runtime import child_environment

FOLDER = Path(__file__).resolve().parent
PAUSE = 0.3  # seconds between turns: idle OpenMP threads spin for 0.2 s and would slow the other's start


class Worker:
    """A process that answers requests.

    Args:
        name: for messages.
        command: starts it; it calls :func:`serve`.
        settings: environment variables of its own; None takes one out.
        log: file for what it says on stderr; None shows that.
    """

    def __init__(self, name: str, command: list[str], settings: Mapping[str, str | None], log: Path | None = None):
        environment = {**child_environment(), **settings}
        environment = {key: value for key, value in environment.items() if value is not None}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.name = name
        with open(log or os.devnull, "ab") as file:
            pipes["stderr"] = file if log else None
            self.process = subprocess.Popen(command, env=environment, **pipes)

    def hello(self) -> dict:
        """Wait until the process is ready, and return what it says of itself.

        Raises:
            PaddleDiTError: it cannot be; the message is its own.
        """
        for line in self.process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                break
        else:
            answer = {"error": self._ended()}
        if "error" in answer:
            raise PaddleDiTError(answer["error"])
        return answer

    def ask(self, **request) -> dict:
        """Have one piece of work done, and return what it answers; errors as for :meth:`hello`."""
        time.sleep(PAUSE)
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise PaddleDiTError(self._ended()) from None
        return self.hello()

    def _ended(self) -> str:
        return f"the process of '{self.name}' ended (exit code {self.process.wait()})"

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(build: Callable[[], tuple[Callable[..., dict], dict]]) -> None:
    """Answer each line on stdin, which holds a request, by a line on stdout.

    Whatever is raised ends the process, and the other side is told its first line: other rows of a table go on. What is
    no :class:`PaddleDiTError` leaves its traceback, too.

    Args:
        build: returns what answers a request, and what to say of it at first.
    """
    try:
        answer, about = build()
        print(json.dumps(about), flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(**json.loads(line))), flush=True)
    except Exception as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind = "" if isinstance(error, PaddleDiTError) else f"{type(error).__name__}: "
        print(json.dumps({"error": kind + (told[0] if told else "no reason given")}), flush=True)
        if kind:
            raise


def peer_is_missing(python: str) -> str | None:
    """Return why PyTorch's side of a comparison cannot run in that interpreter, or None."""
    probe = "import numpy, torch; from diffusers import DiTTransformer2DModel"
    try:
        found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return None if found.returncode == 0 else found.stderr.strip().splitlines()[-1]
