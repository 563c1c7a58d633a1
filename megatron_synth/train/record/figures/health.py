"""health.png of a run that recorded its health: norms by layer, the largest attention logits, the output's entropy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_synth.core.log import one_line
from megatron_synth.train.record import metrics
from megatron_synth.train.record.figures.plot import GREY, INK, PALETTE, STYLE, frame_of_steps, label_ends, save, say_in
from megatron_synth.train.record.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "health.png"
Values = dict[str, list[tuple[int, float]]]
"""By part of the model: step and value."""


def write_health(run_dir: Path) -> Path | None:
    """Draw what `log.health_interval` recorded to health.png, 1600 x 1000 pixels.

    Returns:
        Its path; None: nothing was recorded.
    """
    import matplotlib
    from matplotlib.figure import Figure

    run = RunDir.open(run_dir)
    records = [record for record in metrics.read_metrics(run.metrics) if metrics.ENTROPY in record]
    if not records:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 10), dpi=100)
        figure.text(0.045, 0.955, one_line(f"{run.name}: health"), fontsize=22, fontweight="bold", va="center")
        line = f"{len(records)} measured steps, {records[0][metrics.STEP]:,} to {records[-1][metrics.STEP]:,}; run {run.id}"
        figure.text(0.045, 0.915, line, fontsize=11, color=GREY, va="center")
        grid = figure.add_gridspec(2, 3, left=0.045, right=0.91, top=0.825, bottom=0.07, wspace=0.46, hspace=0.42)
        panels = (
            ("Gradient norm", "by layer, before clipping", _values(records, metrics.GRAD_NORMS), True),
            ("Weight norm", "by layer", _values(records, metrics.WEIGHT_NORMS), True),
            ("Update / weight", "ratio of norms by layer", _update_ratios(records), True),
            ("Activations", "root mean square of each layer's output", _values(records, metrics.ACTIVATIONS), True),
            ("Largest attention logit", "by layer, of a sampled row", _values(records, metrics.MAX_LOGITS), False),
        )
        for position, (title, unit, values, log) in enumerate(panels):
            ax = figure.add_subplot(grid[divmod(position, 3)])
            frame_of_steps(ax, title, unit, records)
            _by_part(ax, values, log=log)
        _output(figure.add_subplot(grid[1, 2]), records)
        save(figure, run.path / NAME)
    return run.path / NAME


def _values(records: Sequence[metrics.Record], prefix: str) -> Values:
    """Of every part of the model that has them, the values that are finite."""
    found: Values = {}
    for record in records:
        for part, value in metrics.parts(record, prefix).items():
            if value is not None and np.isfinite(value):
                found.setdefault(part, []).append((record[metrics.STEP], value))
    return found


def _by_part(ax: Axes, values: Values, *, log: bool) -> None:
    """A line for each part: layers from light to dark, what is no layer in a color of its own."""
    from matplotlib import colormaps

    layers = sorted((part for part in values if part.isdecimal()), key=int)
    others = [part for part in values if not part.isdecimal()]
    shades = colormaps["viridis_r"](np.linspace(0.1, 1.0, max(len(layers), 1)))
    labels = []
    for part, color in [*zip(layers, shades, strict=True), *zip(others, PALETTE[1:], strict=False)]:
        steps, heights = np.array(values[part], dtype=np.float64).T
        if log:
            steps, heights = steps[heights > 0], heights[heights > 0]
        if not len(steps):
            continue
        ax.plot(steps, heights, color=color, linewidth=1.3, marker="o" if len(steps) == 1 else "")
        if part in (*layers[:1], *layers[-1:], *others):
            labels.append((heights[-1], f"layer {part}" if part.isdecimal() else part.replace("_", " "), color))
    if not labels:
        say_in(ax, "nothing was recorded")
        return
    if log:
        from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

        ax.set_yscale("log")
        low, high = np.log(ax.get_ylim())
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high - low < np.log(300) else (1.0,)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the usual one writes formulas
        ax.yaxis.set_minor_formatter(NullFormatter())
        placed = [(float((np.log(value) - low) / (high - low)), text, color) for value, text, color in labels]
        label_ends(ax, placed, relative=True)
    else:
        label_ends(ax, labels)


def _update_ratios(records: Sequence[metrics.Record]) -> Values:
    """Norm of the update over that of the weights, where these are not zero."""
    updates, weights = _values(records, metrics.UPDATE_NORMS), _values(records, metrics.WEIGHT_NORMS)
    of_step = {part: dict(values) for part, values in weights.items()}
    ratios = {
        part: [(step, value / of_step[part][step]) for step, value in values if of_step.get(part, {}).get(step)]
        for part, values in updates.items()
    }
    return {part: values for part, values in ratios.items() if values}


def _output(ax: Axes, records: list[metrics.Record]) -> None:
    """Entropy, and where there are any the shares of padding and of saturated FP8 values."""
    frame_of_steps(ax, "Output", "entropy in nats; shares on the right", records)
    entropy: list[Any] = [(record[metrics.STEP], record[metrics.ENTROPY]) for record in records]
    steps, heights = np.array(entropy, dtype=np.float64).T
    ax.plot(steps, heights, color=INK, linewidth=1.8, marker="o" if len(steps) == 1 else "")
    label_ends(ax, [(heights[-1], f"entropy\n{heights[-1]:.3f}", INK)])
    padding = [record.get(metrics.PADDING_PROBABILITY) for record in records]
    saturated = [max(metrics.parts(record, metrics.SATURATED).values(), default=None) for record in records]
    facts = []
    for name, shares, color in (("padding", padding, PALETTE[1]), ("saturated FP8, worst layer", saturated, PALETTE[3])):
        known = [(step, share) for step, share in zip(steps, shares, strict=True) if share is not None]
        if known:
            facts.append((name, known, color))
    if facts:
        other = ax.twinx()
        other.grid(visible=False)
        for name, known, color in facts:
            x, y = np.array(known, dtype=np.float64).T
            other.plot(x, y, color=color, linewidth=1.2, label=f"{name} {y[-1]:.2g}")
        other.legend(loc="lower left", frameon=False, fontsize=9)
        other.set_yticks([])
