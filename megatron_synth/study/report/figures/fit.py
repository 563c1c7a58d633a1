"""The figure of one fit: points and law, residuals, and the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_synth.core.log import human, one_line
from megatron_synth.study.fit.fit import Fit
from megatron_synth.study.fit.laws import N_PARAMS, RATIO, TOKENS, Floats
from megatron_synth.study.report.answers import compute_optimal
from megatron_synth.train.record.figures.plot import ACCENT, GREY, INK, PALETTE, STYLE, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {N_PARAMS: "N, parameters", TOKENS: "D, tokens", RATIO: "share of the synthetic source"}
LINES = 200  # points of a curve
CURVES = 6  # of a mixture figure at most


@contextmanager
def three_panels(
    path: Path, title: str, law: str, *, widths: tuple[int, int, int], left: float, gap: float
) -> Iterator[tuple[Axes, Axes, Axes]]:
    """Axes to draw on; then they are written to a PNG of 1600 x 560 pixels.

    law: stands at the right of the title. widths: of the panels, as ratios. left, gap: margins, in parts of the width of the
    figure and of a panel.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 5.6), dpi=100)
        first, second, third = figure.subplots(1, 3, width_ratios=widths)
        figure.subplots_adjust(left=left, right=0.985, top=0.84, bottom=0.12, wspace=gap)
        figure.text(0.05, 0.94, one_line(title), fontsize=18, fontweight="bold", va="center")
        figure.text(0.985, 0.94, law, fontsize=11, color=GREY, va="center", ha="right")
        yield first, second, third
        save(figure, path)


def write_figure(fit: Fit, path: Path, title: str) -> None:
    """Draw `fit` to a PNG."""
    with three_panels(path, title, fit.law.formula, widths=(5, 4, 4), left=0.05, gap=0.24) as (left, middle, right):
        kinds = {"mixture": draw_ratio, "mixture-additive": draw_ratio}
        kinds |= dict.fromkeys(("joint", "tied", "repetition"), draw_compute)
        kinds.get(fit.law.name, draw_curve)(left, fit)
        draw_residuals(middle, fit)
        draw_numbers(right, fit)


def draw_curve(axes: Axes, fit: Fit) -> None:
    """A law in one variable: points, curve, the band of its 90 % interval, and the floor; dashed beyond the points."""
    (column,) = fit.law.columns
    points = fit.columns[column]
    inside = np.geomspace(points.min(), points.max(), LINES)
    far = points.max() * 4 if fit.holdout is None else max(points.max() * 4, fit.holdout.columns[column].max() * 1.5)
    beyond = np.geomspace(points.max(), far, LINES)
    color = PALETTE[0]
    for x, dashes in ((inside, "-"), (beyond, "--")):
        axes.plot(x, fit.predict({column: x}), dashes, color=color, linewidth=1.8)
        if len(fit.theta_samples):
            low, high = fit.predict_interval({column: x}, 90)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(fit.params["E"], color=GREY, linewidth=1, linestyle=":")
    axes.annotate("floor E", (points.min(), fit.params["E"]), color=GREY, fontsize=9, va="bottom")
    axes.plot(points, fit.loss, "o", color=INK, markersize=4.5, zorder=3)
    if fit.holdout is not None:
        held = fit.holdout
        axes.plot(held.columns[column], held.loss, "o", color=ACCENT, markerfacecolor="white", zorder=3, label="held out")
        axes.legend(frameon=False)
    axes.set(xscale="log", xlabel=LABELS[column], ylabel="loss", title="Loss and law (dashed: extrapolated)")


def draw_compute(axes: Axes, fit: Fit) -> None:
    """A joint law: loss against compute 6 N D, colored by N, with the best loss at each compute."""
    n, d = fit.columns[N_PARAMS], fit.columns[TOKENS]
    compute = 6 * n * d
    marks = axes.scatter(compute, fit.loss, c=np.log10(n), cmap="viridis", s=18, zorder=3)
    bar = axes.figure.colorbar(marks, ax=axes, pad=0.02)
    ticks = np.linspace(np.log10(n.min()), np.log10(n.max()), 4)
    bar.set_ticks(list(ticks), labels=[human(10**tick) for tick in ticks])
    bar.set_label("N, parameters")
    has_best = set(fit.law.columns) == {N_PARAMS, TOKENS} and not getattr(fit.law, "fixed", {})
    if has_best and fit.params["alpha"] > 0 and fit.params.get("beta", 1.0) > 0:
        grid = np.geomspace(compute.min(), compute.max(), LINES)
        best = np.array([fit.predict(compute_optimal(fit, fit.theta[None], float(flops)))[0] for flops in grid])
        axes.plot(grid, best, color=ACCENT, linewidth=1.8, label="best N and D by the law")
    if fit.holdout is not None:
        held = fit.holdout
        position = 6 * held.columns[N_PARAMS] * held.columns[TOKENS]
        axes.plot(position, held.loss, "o", color=ACCENT, markerfacecolor="none", markersize=7, label="held out")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.set(xscale="log", xlabel="C = 6 N D, FLOPs", ylabel="loss", title="Loss and compute")


def draw_ratio(axes: Axes, fit: Fit) -> None:
    """A mixture law: loss against the ratio, at some of the N and D that were run."""
    others = [column for column in (N_PARAMS, TOKENS) if column in fit.columns]
    ratios = np.linspace(fit.columns[RATIO].min(), fit.columns[RATIO].max(), LINES)
    points: Floats = np.stack([fit.columns[name] for name in others], axis=1) if others else np.zeros((len(fit.loss), 0))
    settings = np.unique(points, axis=0)
    chosen = settings[np.unique(np.linspace(0, len(settings) - 1, CURVES).round().astype(int))]
    for setting, color in zip(chosen, PALETTE, strict=False):
        here = (points == setting).all(axis=1)
        label = ", ".join(
            f"{name[0].upper() if name == N_PARAMS else 'D'} {human(value)}"
            for name, value in zip(others, setting, strict=True)
        )
        losses = fit.predict({RATIO: ratios, **dict(zip(others, setting, strict=True))})
        axes.plot(ratios, losses, color=color, linewidth=1.8, label=label or None)
        axes.plot(ratios[losses.argmin()], losses.min(), "v", color=color, markersize=7)
        axes.plot(fit.columns[RATIO][here], fit.loss[here], "o", color=color, markersize=4.5)
    if others:
        axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel=LABELS[RATIO], ylabel="loss", title="Loss and ratio (triangle: best)")


def draw_residuals(axes: Axes, fit: Fit) -> None:
    """Measured / predicted - 1 against the prediction."""
    predicted = fit.loss / np.exp(fit.residuals)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.plot(predicted, 100 * np.expm1(fit.residuals), "o", color=PALETTE[0], markersize=4, alpha=0.7)
    axes.set(xlabel="predicted loss", ylabel="measured / predicted - 1, %", title="Residuals")


def draw_numbers(axes: Axes, fit: Fit) -> None:
    """Parameters with their 90 % intervals, the hold-out, and the warnings."""
    import textwrap

    axes.axis("off")
    lines = []
    for name, value in fit.params.items():
        bounds = fit.intervals.get("90", {}).get(name)
        lines.append(f"{name:<6}{value:>11.5g}" + (f"   {bounds[0]:.4g} to {bounds[1]:.4g}" if bounds else ""))
    held = fit.holdout
    lines += ["", f"{len(fit.points)} points, {len(fit.dropped)} dropped", f"mean error {fit.mean_absolute_relative_error:.2%}"]
    if held is not None:
        lines.append(f"hold-out {held.rule}: {held.mean_absolute_relative_error:.2%} ({held.points} points)")
    axes.text(0, 1, "\n".join(lines), family="DejaVu Sans Mono", fontsize=9.5, va="top", transform=axes.transAxes)
    if fit.warnings:
        text = "\n".join(textwrap.fill(str(diagnostic), 66) for diagnostic in fit.warnings)
        axes.text(0, 0, text, color=ACCENT, fontsize=8.5, va="bottom", transform=axes.transAxes)
    axes.set_title("Parameters, 90 % intervals", loc="left")
