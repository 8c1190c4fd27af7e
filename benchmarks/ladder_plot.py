"""The picture of latency_ladder.py."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladder_rows import ROWS

PEER, OURS, OTHER = "#8a94a6", "#2f6fde", "#7fb0ff"


def draw_bars(measured: Mapping[int, Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the median seconds per image of every row as bars, one panel for each batch size.

    Args:
        measured: batch size -> row -> what has its seconds per image and turn as ``loop``.
        path: of the PNG.
        title: above the panels.
    """
    from matplotlib.figure import Figure

    rows = max(map(len, measured.values()))
    figure = Figure(figsize=(5 * len(measured) + 3, 0.42 * rows + 1.3), layout="constrained")
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, (batch_size, times) in zip(panels, measured.items(), strict=True):
        medians = [statistics.median(row.loop) for row in times.values()]
        colours = [PEER if ROWS[name].peer else OURS if ROWS[name].exact else OTHER for name in times]
        bars = axes.barh([ROWS[name].title for name in times], medians, color=colours)
        axes.bar_label(bars, [f" {value:.3g}" for value in medians])
        axes.margins(x=0.12)
        axes.set(title=f"batch {batch_size}", xlabel="seconds per image (median), without the decoder")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
