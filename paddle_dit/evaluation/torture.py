"""A run that is killed again and again and continued by the same command, beside an unbroken one: are they equal?"""

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from paddle_dit.checkpoint import checkpoint_folders, find_checkpoint, open_checkpoint
from paddle_dit.errors import ConfigError, PaddleDiTError
from paddle_dit.evaluation.launch import TRAIN, TRAINER, Launch, flags_of, wait_for, write_random_latents
from paddle_dit.files import check_writable
from paddle_dit.training.monitor import LOG

MOMENTS = ("saving", "training", "saving", "start-up", "training", "deleting", "saving")  # of the kills, in turn
KEPT = 2  # checkpoints, so that every later save deletes one
_FIGURES = re.compile("step|loss|mse|vb|learning_rate|eval_.*")  # of the log; the others are the machine's
_PATIENCE = 300.0  # seconds in which something must happen
_TAIL = 4096  # bytes of the log that hold its last two lines
_LAUNCHER = 60.0  # seconds in which a launcher must end the other ranks; it gives them 3


@dataclass(frozen=True)
class Kill:
    """What a kill found and left.

    Attributes:
        moment: which one it was aimed at.
        victim: "all", or the rank.
        reached: last step in the log, or the one continued from where there was none yet.
        whole: step of the newest checkpoint, 0 for none.
        leftovers: steps of folders half written or half deleted, which the next start is to clean.
    """

    moment: str
    victim: str
    reached: int
    whole: int
    leftovers: list[int]

    @property
    def lost(self) -> int:
        """Steps to be made again."""
        return self.reached - self.whole

    @property
    def inside_save(self) -> bool:
        """Whether it hit while a checkpoint was being written; at start-up, leftovers are those of the kill before."""
        return self.moment != "start-up" and any(step > self.whole for step in self.leftovers)

    @property
    def inside_deletion(self) -> bool:
        """Whether it hit while an old checkpoint was being deleted."""
        return self.moment != "start-up" and any(step < self.whole for step in self.leftovers)


@dataclass
class Torture:
    """What to kill, and how often: an unbroken run, and one of the same recipe that is killed again and again."""

    output: Path = Path("outputs/torture")
    """Folder of both runs. An unbroken run of the same settings is taken again; the killed one is always new."""
    kills: int = 10
    """Times to kill the run; 0 only compares two runs."""
    seed: int = 0
    """Of the moments of the kills."""
    processes: int = 2
    """Ranks of each run."""
    steps: int | None = None
    """Steps of each run. Default: enough for all kills."""
    ckpt_every: int = 5
    """Steps between two checkpoints."""
    async_save: bool = True
    """Save in the background."""
    trainer: bool = False
    """Run train_image_generation_dit_trainer.py instead of train.py."""
    feature_path: Path | None = None
    """Latents to train on. Default: 64 random ones."""
    model: str = "DiT-Digits/2"
    """Preset or JSON file."""
    done: list[Kill] = field(default_factory=list, init=False)
    """What the kills so far found."""

    def run(self) -> bool:
        """Return whether both runs are equal bit for bit; PaddleDiTError names what else went wrong."""
        self._prepare()
        print(f"an unbroken run of {self.steps} steps on {self.processes} process(es)", flush=True)
        with self._start(self._unbroken) as launch:
            self._finish(launch)
        for number in tqdm(range(self.kills), desc="kills", unit="kill", disable=None):
            self.done.append(self._kill(number))
            tqdm.write(_line(number, self.done[-1]))
            sys.stdout.flush()
        with self._start(self._name) as launch:
            self._finish(launch)
        if left := _leftovers(self._folder):
            raise PaddleDiTError(f"{self._folder} still holds what interrupted saves left: steps {sorted(left)}")
        found = differences(self.output / self._unbroken, self._folder)
        print(self._summary(found))
        return not found

    def _prepare(self) -> None:
        least = 2 * self.ckpt_every * (self.kills + 1)  # a kill may come two saves after the one before
        self.steps = least if self.steps is None else self.steps
        for name, low in (("kills", 0), ("seed", 0), ("processes", 1), ("ckpt_every", 1), ("steps", least)):
            if getattr(self, name) < low:
                raise ConfigError(f"--{name.replace('_', '-')} must be {low} or more, got {getattr(self, name)}")
        check_writable(self.output, "--output")
        self.output = self.output.resolve()  # the runs start in the project's folder
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        self._store = (
            self.feature_path.resolve() if self.feature_path else write_random_latents(self.output / "latents")
        )
        self._name = next(name for n in range(1, 10**6) if not (self.output / (name := f"killed-{n}")).exists())
        self._folder, self._random = self.output / self._name, np.random.default_rng(self.seed)
        loop, model = "trainer" if self.trainer else "train", self.model.replace("/", "-")
        self._unbroken = f"unbroken-{loop}-{model}-{self.steps}-on-{self.processes}"
        self._seconds_to_start = 0.0  # known from the first kill, which is none at the start-up

    def _start(self, name: str) -> Launch:
        script, folder = TRAINER if self.trainer else TRAIN, self.output / name
        values = {"max_steps": self.steps, "ckpt_every": self.ckpt_every, "save_total_limit": KEPT}
        values |= {"async_save": self.async_save, "model": self.model}
        flags = flags_of(script, self._store, folder, self.processes, **values)
        return Launch(script, flags, processes=self.processes, log=self.output / "logs" / f"{name}-{len(self.done)}")

    def _watch(self, launch: Launch, moment: Callable[[], object]) -> None:
        """Return when the moment has come or the command has ended; PaddleDiTError if nothing happens for long."""
        seen, since = None, time.monotonic()
        while launch.code is None and not moment():
            if (now := (launch.log.stat().st_size, *_stamp(self._folder))) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                raise PaddleDiTError(f"the run hangs: nothing new for {_PATIENCE:.0f} s; see {launch.log}")
            time.sleep(0.0005)

    def _finish(self, launch: Launch) -> None:
        self._watch(launch, lambda: False)
        if launch.code:
            raise PaddleDiTError(f"a run that nobody killed ended with exit code {launch.code}; see {launch.log}")

    def _kill(self, number: int) -> Kill:
        """Start or continue the run, kill it at the moment of this number, and look at what is left."""
        moment, former = MOMENTS[number % len(MOMENTS)], _stamp(self._folder)
        before = _newest(self._folder)
        with self._start(self._name) as launch:
            pids = self._aim(launch, moment, before)
            if launch.code is not None:
                raise PaddleDiTError(f"the run ended by itself with exit code {launch.code}; see {launch.log}")
            rank = int(self._random.integers(self.processes)) if number % 2 else None
            pid = next((pid for pid, found in (pids or launch.pids()).items() if found == rank), None)
            if rank is None or pid is None:
                launch.kill(pids)
            else:
                self._kill_one(launch, pid)
            said = re.search(r"; (?:starting at step|continuing after step) ([\d,]+);", launch.text)
        if said and int(said[1].replace(",", "")) != before:
            raise PaddleDiTError(f"the run continued from step {said[1]} instead of {before}; see {launch.log}")
        reached = max(before, last_step(self._folder)) if _stamp(self._folder) != former else before
        victim = "all" if rank is None or pid is None else f"rank {rank}"
        kill = Kill(moment, victim, reached, _newest(self._folder), sorted(_leftovers(self._folder)))
        if kill.lost > self._most:
            raise PaddleDiTError(f"{_line(number, kill)}: more than the {self._most} steps that may be lost")
        return kill

    @staticmethod
    def _kill_one(launch: Launch, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        launch.wait(_LAUNCHER)
        if not wait_for(lambda: not launch.pids(), _LAUNCHER):
            raise PaddleDiTError(f"the launcher is gone and left processes {list(launch.pids())}; see {launch.log}")

    def _aim(self, launch: Launch, moment: str, before: int) -> dict[int, int | None]:
        """Return at the moment, or when the command has ended, with the processes if steps were made."""
        random, every, folder = self._random, self.ckpt_every, self._folder
        if moment == "start-up":
            end = time.monotonic() + random.uniform(0, self._seconds_to_start)
            self._watch(launch, lambda: time.monotonic() > end)
            return {}
        former, left, started = _stamp(folder), _leftovers(folder), time.monotonic()
        self._watch(launch, lambda: _stamp(folder) != former and last_step(folder) > before)
        self._seconds_to_start = time.monotonic() - started
        same = left.items() & _leftovers(folder).items()  # by time too: the same step may be on its way again
        if same and launch.code is None:
            raise PaddleDiTError(f"{folder} still holds what a kill left of steps {sorted(dict(same))}")
        pids = launch.pids()
        step = (before // every + int(random.integers(1, 3))) * every  # of the first save or the second
        saved, partial = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
        if moment == "training":
            step = before + int(random.integers(1, 2 * every))
            self._watch(launch, lambda: last_step(folder) >= step)
            time.sleep(random.uniform(0, 0.1))
        elif moment == "saving":
            files = int(random.integers(6))  # how many of its six are there
            self._watch(launch, lambda: _count(partial) >= files or saved.exists())
            time.sleep(random.uniform(0, 0.005))
        else:
            old = [folder / f"{dot}checkpoint-{step - KEPT * every}{tmp}" for dot, tmp in ((".", ".tmp"), ("", ""))]
            self._watch(launch, lambda: old[0].exists() or (saved.exists() and not old[1].exists()))
        return pids

    @property
    def _most(self) -> int:
        """Steps that a kill may cost: those since the last save, where one in the background is under way two."""
        return self.ckpt_every * (2 if self.async_save else 1)

    def _summary(self, found: list[str]) -> str:
        lost = [kill.lost for kill in self.done] or [0]
        rows = {
            "kills survived": len(self.done),
            "of one rank": sum(kill.victim != "all" for kill in self.done),
            "inside saves": sum(kill.inside_save for kill in self.done),
            "inside deletions": sum(kill.inside_deletion for kill in self.done),
            "steps lost per kill": f"mean {np.mean(lost):.1f}, max {max(lost)}; at most {self._most} may be",
            "verdict": f"NOT equal: {found[0]} ({len(found)} differences)" if found else "equal bit for bit",
        }
        return "\n" + "\n".join(f"{name:<22}{value}" for name, value in rows.items())


def _line(number: int, kill: Kill) -> str:
    left = f"leaving step {', '.join(map(str, kill.leftovers))} unfinished" if kill.leftovers else "leaving nothing"
    return (
        f"kill {number + 1}: {kill.victim} while {kill.moment}, at step {kill.reached}, whole is {kill.whole}, "
        f"{kill.lost} steps lost, {left}"
    )


def differences(run: Path, other: Path) -> list[str]:
    """Return what differs between two runs: tensors of their newest checkpoints, figures of their logs; bit for bit."""
    first, second = find_checkpoint(run), find_checkpoint(other)
    found = [] if first.step == second.step else [f"the last step is {first.step} and {second.step}"]
    for kind in ("model", "ema", "optimizer"):
        ours, theirs = first.tensors(kind), second.tensors(kind)
        for name in sorted(ours.keys() | theirs.keys()):
            if _bits(ours.get(name)) != _bits(theirs.get(name)):
                found.append(f"tensor {kind}:{name}")
    for ours, theirs in itertools.zip_longest(_figures(run), _figures(other)):
        if ours != theirs:
            found.append(f"log line {ours} and {theirs}")
    return found


def _bits(array: np.ndarray | None) -> tuple | None:
    return None if array is None else (array.dtype, array.shape, array.tobytes())


def _figures(folder: Path) -> list[dict]:
    lines = _lines((folder / LOG).read_bytes())
    return [{name: value for name, value in line.items() if _FIGURES.fullmatch(name)} for line in lines]


def _lines(log: bytes) -> list[dict]:
    return [json.loads(line) for line in log.splitlines(keepends=True) if line.endswith(b"\n")]


def last_step(folder: Path) -> int:
    """Return the last step in a run's log, 0 for none."""
    try:
        with (folder / LOG).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
            lines = log.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return max((line["step"] for line in _lines(b"".join(lines[-2:]))), default=0)


def _stamp(folder: Path) -> tuple:
    """Return what changes with the log."""
    try:
        status = (folder / LOG).stat()
    except FileNotFoundError:
        return ()
    return status.st_ino, status.st_size


def _newest(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 for none; CheckpointError where any is not whole."""
    return max((open_checkpoint(path).step for path in checkpoint_folders(folder)), default=0)


def _leftovers(folder: Path) -> dict[int, int]:
    """Return the steps of folders half written or half deleted, and when each was last changed."""
    found = {}
    for path in folder.glob(".checkpoint-*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it has just become a checkpoint
            found[int(path.name.split("-")[1].removesuffix(".tmp"))] = path.stat().st_mtime_ns
    return found


def _count(folder: Path) -> int:
    """Return how many files a folder has, -1 where it is not there."""
    try:
        return len(os.listdir(folder))
    except FileNotFoundError:
        return -1
