"""loss_by.png of a run that told losses apart by values of documents: a panel for each column, in training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_synth.core.log import one_line
from megatron_synth.train.record import metrics
from megatron_synth.train.record.figures.plot import GREY, PALETTE, STYLE, frame_of_steps, label_ends, save, say_in
from megatron_synth.train.record.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "loss_by.png"
MAX_COLUMNS = 8  # of log.loss_by
_LABEL = 18  # characters


def write_values(run_dir: Path) -> Path | None:
    """Draw what `log.loss_by` recorded to loss_by.png: a row for each column, training on the left, evaluation on the right.

    Returns:
        Its path; None: nothing was recorded.
    """
    import matplotlib
    from matplotlib.figure import Figure

    run = RunDir.open(run_dir)
    records = metrics.read_metrics(run.metrics)
    found = [
        name
        for record in records
        for prefix in (metrics.LOSS_BY, metrics.EVAL_LOSS_BY)
        for name in metrics.parts(record, prefix)
    ]
    columns = list(dict.fromkeys(name.partition("/")[0] for name in found))[:MAX_COLUMNS]
    if not columns:
        return None
    with matplotlib.rc_context(STYLE):
        height = 1.2 + 4.4 * len(columns)
        figure = Figure(figsize=(16, height), dpi=100)
        figure.text(
            0.045, 1 - 0.45 / height, one_line(f"{run.name}: loss by value"), fontsize=22, fontweight="bold", va="center"
        )
        place = {"left": 0.045, "right": 0.88, "top": 1 - 1.5 / height, "bottom": 0.7 / height, "wspace": 0.46, "hspace": 0.5}
        grid = figure.add_gridspec(len(columns), 2, **place)
        for row, column in enumerate(columns):
            values = list(dict.fromkeys(name for name in found if name.startswith(f"{column}/")))
            colors = {value: PALETTE[number % len(PALETTE)] for number, value in enumerate(values)}
            for side, (prefix, title) in enumerate(((metrics.LOSS_BY, "Training"), (metrics.EVAL_LOSS_BY, "Validation"))):
                ax = figure.add_subplot(grid[row, side])
                frame_of_steps(ax, f"{title} loss by {column}", "nats per token", records)
                _lines(ax, records, prefix, colors)
        save(figure, run.path / NAME)
    return run.path / NAME


def _lines(ax: Axes, records: Sequence[metrics.Record], prefix: str, colors: dict[str, str]) -> None:
    """A line for each value that has losses."""
    labels = []
    for value, color in colors.items():
        pairs = [(record[metrics.STEP], record[prefix + value]) for record in records if record.get(prefix + value) is not None]
        points = np.array([pair for pair in pairs if np.isfinite(pair[1])], dtype=np.float64).reshape(-1, 2)
        if not len(points):
            continue
        few = len(points) < 40
        ax.plot(points[:, 0], points[:, 1], color=color, linewidth=1.3, marker="o" if few else "", markersize=4)
        labels.append((points[-1, 1], f"{value.partition('/')[2][:_LABEL]} {points[-1, 1]:.3f}", color))
    if labels:
        label_ends(ax, labels)
    else:
        say_in(ax, "nothing was recorded")
        ax.tick_params(colors=GREY)
