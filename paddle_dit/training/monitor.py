"""What a run says while it trains: the progress bar, ``log.jsonl`` and VisualDL."""

import errno
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from paddle_dit.files import replace_file

LOG = "log.jsonl"


class Monitor:
    """Reports of the main rank; on the others every method does nothing.

    Args:
        folder: the run's output folder; ``log.jsonl`` and ``visualdl/`` go there.
        total_steps: length of the run.
        start_step: updates already made; later lines of an earlier attempt are dropped from the log.
        enabled: whether this is the main rank.
        visualdl: folder of VisualDL's files; None writes none.
        progress_bar: whether to show one.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int,
        enabled: bool = True,
        *,
        visualdl: Path | None = None,
        progress_bar: bool = True,
    ):
        self.enabled = enabled
        if not enabled:
            return
        from visualdl import LogWriter

        folder.mkdir(parents=True, exist_ok=True)
        _forget_later_lines(folder / LOG, start_step)
        self._log = folder / LOG
        self._visualdl = LogWriter(logdir=str(visualdl)) if visualdl else None
        quiet = not sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            desc="train",
            disable=not progress_bar,
            dynamic_ncols=not quiet,
            mininterval=10.0 if quiet else 0.2,
        )

    def advance(self) -> None:
        """Count one update."""
        if self.enabled:
            self._bar.update()

    def record(self, step: int, values: dict[str, float], group: str = "train") -> None:
        """Write the figures of ``step`` everywhere: a line in the log, a scalar ``<group>/<name>`` each.

        Names in a line of a group other than "train" begin with the group's, so that a reader can tell them apart.
        """
        if not self.enabled:
            return
        prefix = "" if group == "train" else f"{group}_"
        line = {f"{prefix}{name}": value if math.isfinite(value) else None for name, value in values.items()}
        self._append(json.dumps({"step": step, **line}) + "\n")  # JSON has no NaN
        for name, value in values.items() if self._visualdl else ():
            self._visualdl.add_scalar(tag=f"{group}/{name}", value=value, step=step)
        if group == "train":
            self._bar.set_postfix_str(_in_short(values), refresh=False)

    def _append(self, line: str) -> None:
        """Write a line whole or not at all; a run does not end for it, as there may be space again at its next save."""
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)  # it may have been moved away while the run went on
            with self._log.open("ab", buffering=0) as log:
                before = log.tell()
                if log.write(line.encode()) < len(line.encode()):
                    log.truncate(before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            tqdm.write(f"warning: a line of {self._log} is lost: {error.strerror}", file=sys.stderr)

    def add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Show an image, uint8 ``[H, W, 3]``, in VisualDL."""
        if self.enabled and self._visualdl:
            self._visualdl.add_image(tag=tag, img=image, step=step)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        """Finish all outputs, so that an error's message starts on a line of its own."""
        if self.enabled:
            self._bar.close()
            if self._visualdl:
                self._visualdl.close()


def _in_short(values: dict[str, float]) -> str:
    """Return the figures that fit beside a progress bar."""
    rate, per_card = values["images_per_second"], values["images_per_second_per_card"]
    shown = [f"loss {values['loss']:.4f}", f"{rate:.0f} images/s ({per_card:.0f} per card)"]
    shown += [f"{values['tflops_per_card']:.3g} TFLOP/s", f"wait {values['data_wait']:.0%}"]
    if "encoding" in values:
        shown += [f"encoding {values['encoding']:.0%}"]
        shown += [f"{values['images_per_second_from_latents']:.0f} images/s if from latents"]
    shown += [f"MFU {values['mfu']:.0%}"] if "mfu" in values else []
    return ", ".join([*shown, f"{values['peak_memory_mib']:,.0f} MiB of tensors"])


def read_log(folder: Path, step: int) -> list[dict]:
    """Return the lines of a step in a run's log."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if _step_of(line) == step]


def _step_of(line: str) -> float:
    """Return a log line's step; infinity for a line that was cut off."""
    try:
        return json.loads(line)["step"] + 0
    except (ValueError, KeyError, TypeError):
        return math.inf


def _forget_later_lines(log: Path, start_step: int) -> None:
    """Drop the lines of steps that a resumed run will make again, and a last line that was cut off."""
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= start_step]
    if kept != lines:
        text = "".join(f"{line}\n" for line in kept)
        replace_file(log, lambda file: file.write(text.encode()))
