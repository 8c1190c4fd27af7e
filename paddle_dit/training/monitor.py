"""What a run says while it trains: the progress bar, ``log.jsonl`` and VisualDL."""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from paddle_dit.files import replace_file

LOG = "log.jsonl"


class Monitor:
    """Reports of the main rank; on the others every method does nothing.

    Args:
        folder: the run's output folder; ``log.jsonl`` and ``visualdl/`` go there.
        total_steps: length of the run.
        start_step: updates already made; later lines of an earlier attempt are dropped from the log.
        batch_size: samples per update, for images per second.
        enabled: whether this is the main rank.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int, batch_size: int, enabled: bool = True):
        self.enabled, self.batch_size = enabled, batch_size
        self.restart_clock()
        if not enabled:
            return
        from visualdl import LogWriter

        folder.mkdir(parents=True, exist_ok=True)
        _forget_later_lines(folder / LOG, start_step)
        self._log = (folder / LOG).open("a", encoding="utf-8")
        self._scalars = LogWriter(logdir=str(folder / "visualdl"))
        quiet = not sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            desc="train",
            dynamic_ncols=not quiet,
            mininterval=10.0 if quiet else 0.2,
        )

    def advance(self) -> None:
        """Count one update."""
        self._window_steps += 1
        if self.enabled:
            self._bar.update()

    def restart_clock(self) -> None:
        """Begin a new window of steps; called after a checkpoint too, so that saving does not count as training."""
        self._window_start, self._window_steps = time.perf_counter(), 0

    def images_per_second(self) -> float:
        """Return the rate over all ranks since the window began."""
        return self._window_steps * self.batch_size / max(time.perf_counter() - self._window_start, 1e-9)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write the figures of ``step`` everywhere."""
        self.restart_clock()
        if not self.enabled:
            return
        self._log.write(json.dumps({"step": step, **values}) + "\n")
        self._log.flush()
        for name, value in values.items():
            self._scalars.add_scalar(tag=f"train/{name}", value=value, step=step)
        shown = {"loss": f"{values['loss']:.4f}", "images/s": f"{values['images_per_second']:.0f}"}
        self._bar.set_postfix(shown, refresh=False)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        """Finish all outputs, so that an error's message starts on a line of its own."""
        if self.enabled:
            self._bar.close()
            self._scalars.close()
            self._log.close()


def _forget_later_lines(log: Path, start_step: int) -> None:
    """Drop the lines of steps that a resumed run will make again, and a last line that was cut off."""
    if not log.exists():
        return
    kept, lines = [], log.read_text(encoding="utf-8").splitlines()
    for line in lines:
        try:
            if json.loads(line)["step"] <= start_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    if kept != lines:
        text = "".join(f"{line}\n" for line in kept)
        replace_file(log, lambda file: file.write(text.encode()))
