"""Training runs of real processes, in the background, that can be watched and killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from paddle_dit.data.store import StoreWriter
from paddle_dit.errors import PaddleDiTError

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TRAINER = "train.py", "train_image_generation_dit_trainer.py"
BATCH = 16
_MARK = "PADDLE_DIT_LAUNCH"


class Launch:
    """A command of this project, in the background, with every process that it starts. A context manager.

    Ranks lead sessions of their own and outlive a killed launcher, so neither a process group nor a parent finds them:
    a mark in their environment does. Leaving the context ends them all.

    Args:
        script: to run, relative to the project's folder or absolute.
        flags: of the script.
        processes: ranks; with more than one, Paddle's launcher starts them.
        log: file that takes the output; the launcher's logs of the ranks go into a folder beside it.
        environment: added to this process's, from which Paddle's own variables are taken out.
    """

    def __init__(
        self,
        script: str | Path,
        flags: Sequence,
        *,
        processes: int,
        log: Path,
        environment: dict[str, str] | None = None,
    ):
        self.log, self.log_folder = log, log.with_name(f"{log.name}-ranks")
        shutil.rmtree(self.log_folder, ignore_errors=True)  # the launcher would write on into an earlier one's
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes)]
            command += ["--log_dir", str(self.log_folder)]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
        self._mark = uuid.uuid4().hex
        kept |= {_MARK: self._mark, **(environment or {})}
        self._gone: set[int] = set()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *map(str, (script, *flags))],
                cwd=ROOT,
                env=kept,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def code(self) -> int | None:
        """Exit code of the command, None while it runs; minus the signal's number where one ended it."""
        return self.process.poll()

    @property
    def text(self) -> str:
        """All that the command and its ranks have said so far."""
        logs = [self.log, *sorted(self.log_folder.glob("workerlog.*"))]
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def pids(self) -> dict[int, int | None]:
        """Return the living processes and the rank of each, None for the launcher and for what is no rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                values = dict(entry.split(b"=", 1) for entry in path.read_bytes().split(b"\0") if b"=" in entry)
                if values.get(_MARK.encode()) == self._mark.encode():
                    rank = values.get(b"PADDLE_TRAINER_ID")
                    found[int(path.parent.name)] = None if rank is None else int(rank)
        return found

    def pid(self, rank: int | None = None) -> int | None:
        """Return the process of a rank, or of the command itself; None where there is none (yet)."""
        if rank is None:
            return self.process.pid
        return next((pid for pid, found in self.pids().items() if found == rank), None)

    def wait(self, seconds: float) -> int:
        """Return the command's exit code; PaddleDiTError if it has none after ``seconds``."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise PaddleDiTError(f"{self.log} is of a command that still runs after {seconds} s") from None

    def kill(self, known: Iterable[int] = ()) -> None:
        """Send SIGKILL to every process, those that are known already at once, and return when all are gone."""
        pids = list(known) or self.pids()
        while pids:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._gone |= set(pids)
            time.sleep(0.01)
            pids = self.pids()
        # Memory, and with it the mark, goes before open files, and with them the lock of the output folder.
        while any(map(_lives, self._gone)):
            self.process.poll()
            time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def wait_for(condition: Callable[[], object], seconds: float, interval: float = 0.02) -> object:
    """Return what ``condition`` returns once that is true, or None after ``seconds``."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            return None
        time.sleep(interval)
    return found


def write_random_latents(folder: Path, samples: int = 64, vae: dict | None = None) -> Path:
    """Write random latents ``[4, 8, 8]`` of ten classes as a packed store, and return its folder.

    Args:
        folder: is replaced.
        samples: how many.
        vae: who is said to have made them; by default no one.
    """
    latents = np.random.default_rng(0).standard_normal((samples, 4, 8, 8)).astype(np.float32)
    with StoreWriter(
        folder,
        sample_shape=(4, 8, 8),
        dtype="float32",
        num_classes=10,
        vae=vae or {"name": "none", "scaling_factor": 1.0, "image_size": 64},
        overwrite=True,
    ) as store:
        store.append(latents, np.arange(samples) % 10)
    return folder


def flags_of(
    script: str, store: Path | None, folder: Path, processes: int = 1, *, model="DiT-Digits/2", accumulation=1, **values
) -> list:
    """Return the flags of either script for the same small run, a log line at each step.

    Args:
        script: :data:`TRAIN` or :data:`TRAINER`.
        store: the latents; None where ``values`` name images.
        folder: the run's output.
        processes: ranks, which share a batch of 16.
        model: a preset or JSON file.
        accumulation: micro-batches of each rank's share.
        values: more options, named as those of ``train.py`` with underscores.
    """
    values = {"log_every": 1, "image_logging_steps": -1, **values, "output_dir": folder}
    values |= {} if store is None else {"feature_path": store}
    if script == TRAINER:
        theirs = {"log_every": "logging_steps", "ckpt_every": "save_steps", "global_seed": "seed"}
        values = {theirs.get(name, name): value for name, value in values.items()}
        values |= {"model_name_or_config": model, "gradient_accumulation_steps": accumulation}
        values["per_device_train_batch_size"] = BATCH // processes // accumulation
        return ["--do_train", *(text for name, value in values.items() for text in (f"--{name}", value))]
    values |= {"model": model, "global_batch_size": BATCH, "accumulation": accumulation}
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
    return flags
