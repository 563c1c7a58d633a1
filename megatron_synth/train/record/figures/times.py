"""times.png: what each start of a run spent its time with, as bars along the time, and the shares of all of it."""

from __future__ import annotations

from pathlib import Path

from megatron_synth.core.log import duration, one_line
from megatron_synth.train.record.figures.plot import ACCENT, FAINT, GREY, PALETTE, STYLE, save
from megatron_synth.train.record.goodput import KINDS, PRODUCTIVE, Goodput

NAME = "times.png"
_COLORS = dict(zip(KINDS, (PALETTE[2], ACCENT, PALETTE[1], PALETTE[3], PALETTE[0], *PALETTE[4:8], FAINT), strict=True))
_SHOWN = 60
"""Starts that have a row; of more, the last."""


def write_times(run: Path, name: str, found: Goodput) -> Path:
    """Draw the time of a run to its times.png, 1600 pixels wide, and return that path."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    begin = found.spans[0].begin
    starts = sorted({span.start for span in found.spans})[-_SHOWN:]
    rows = {start: row for row, start in enumerate(starts)}
    scale, unit = (3600.0, "hours") if found.wall_s > 7200 else (60.0, "minutes") if found.wall_s > 120 else (1.0, "seconds")
    with matplotlib.rc_context(STYLE):
        height = 3.2 + 0.28 * len(starts)
        figure = Figure(figsize=(16, height), dpi=100)
        figure.text(0.045, 1 - 0.45 / height, one_line(f"{name}: time"), fontsize=22, fontweight="bold", va="center")
        figure.text(0.045, 1 - 0.85 / height, found.text(), fontsize=11, color=GREY, va="center")
        ax = figure.add_axes((0.07, 0.7 / height, 0.73, (height - 2.0) / height))
        for kind in KINDS:
            for start, row in rows.items():
                bars = [
                    ((span.begin - begin) / scale, (span.end - span.begin) / scale)
                    for span in found.spans
                    if span.kind == kind and span.start == start
                ]
                if bars:
                    ax.broken_barh(bars, (row - 0.38, 0.76), facecolors=_COLORS[kind], linewidth=0)
        ax.set_yticks(list(rows.values()), [f"start {start}" for start in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlim(0, 1.002 * (found.spans[-1].end - begin) / scale)
        ax.set_xlabel(unit, color=GREY)
        ax.grid(visible=False, axis="y")
        handles = [Patch(color=_COLORS[kind]) for kind in found.seconds]
        texts = [f"{kind}  {100 * s / found.wall_s:.1f} %  {duration(s)}" for kind, s in found.seconds.items()]
        assert PRODUCTIVE in _COLORS
        ax.legend(handles, texts, loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=9.5)
        save(figure, run / NAME)
    return run / NAME
