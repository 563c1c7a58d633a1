"""Figures of decisions, forecasts and rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_synth.core.log import compact, human
from megatron_synth.study.forecast.score import summary
from megatron_synth.study.report.checks import Checks
from megatron_synth.study.report.figures.drawing import (
    HUES,
    MOST_PANELS,
    PAPER,
    Drawn,
    Look,
    figure_size,
    log_ticks,
    panel_title,
    panels_of,
    render_figure,
)
from megatron_synth.train.record.figures.plot import GREY, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
_WIDTH = 11.5


def draw_checks(checks: Checks, style: dict[str, Look]) -> list[Drawn]:
    """The figures that there is something for."""
    found = (_decisions(checks), _forecasts(checks, style), _rates(checks))
    return [figure for figure in found if figure is not None]


def _decisions(checks: Checks) -> Drawn | None:
    every = checks.decisions
    if not every:
        return None
    sizes = list(dict.fromkeys(one.size for one in sorted(every, key=lambda one: one.n_params)))

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for number, size in enumerate(sizes):
            own = [one for one in every if one.size == size]
            x = np.array([6.0 * one.n_params * one.tokens for one in own])
            y = np.array([100 * one.accuracy for one in own])
            low, high = (np.array([100 * one.interval[place] for one in own]) for place in (0, 1))
            color, shape = HUES[number % len(HUES)], _SHAPES[number % len(_SHAPES)]
            bounds = np.maximum([y - low, high - y], 0)
            ax.errorbar(x, y, yerr=bounds, fmt=shape, color=color, capsize=2, elinewidth=0.8, markersize=6, label=size)
            laws = [(place, 100 * one.by_law) for place, one in zip(x, own, strict=True) if one.by_law is not None]
            if laws:
                ax.plot(*zip(*laws, strict=True), shape, color=color, markerfacecolor="none", markersize=9)
        ax.axhline(50, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
        ax.set_xscale("log")
        log_ticks(ax, lambda value: f"{value:.0e}".replace("e+", "e"))
        ax.set_ylim(0, 104)
        ax.set_xlabel("FLOPs of a run (6ND)", color=GREY)
        ax.set_ylabel("pairs in the same order, %", color=GREY, fontsize=9)
        ax.legend(frameon=False, fontsize=9, loc="lower right", labelcolor=INK, title="ranked at size", title_fontsize=9)

    first, last = every[0], every[-1]
    title = f"From {first.accuracy:.0%} of pairs at {first.size} and {compact(first.tokens)} tokens to {last.accuracy:.0%} at "
    title += f"{last.size} and {compact(last.tokens)}"
    caption = (
        f"Pairs of arms whose order at one size and budget is that at {first.target_size} and {compact(first.target_tokens)} "
        "tokens. Filled: ranked by their losses, with 90 % intervals; hollow: by laws fitted to runs of at most that compute. "
        "Dotted: chance."
    )
    told = "; ".join(f"{one.size} at {compact(one.tokens)} tokens {one.accuracy:.0%} of {one.pairs}" for one in every)
    data: list[tuple[object, ...]] = [("size", "n_params", "tokens", "pairs", "kept", "low", "high", "by laws")]
    for one in every:
        law = float("nan") if one.by_law is None else one.by_law
        data.append((one.size, one.n_params, one.tokens, one.pairs, one.kept, *one.interval, law))
    size = (_WIDTH, 3.8)
    question = "Do small runs decide as the largest?"
    return render_figure("decisions", title, caption, size, draw, told, question=question, data=data)


def _forecasts(checks: Checks, style: dict[str, Look]) -> Drawn | None:
    scores = [one for one in checks.forecasts.scores if one.error is not None and one.measured is not None]
    if not scores:
        return None

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for place, one in enumerate(scores):
            assert one.measured is not None
            forecast = one.forecast
            low, mid, high = (100 * (forecast[name] / one.measured - 1) for name in ("low", "loss", "high"))
            look = style.get(forecast["arm"], Look(INK, "o"))
            ax.plot([low, high], [place, place], color=look.color, linewidth=2.2)
            filled = look.color if one.before else "none"
            ax.plot(
                [mid],
                [place],
                marker=look.marker,
                linestyle="none",
                color=look.color,
                markerfacecolor=filled,
                markersize=8,
                markeredgecolor=look.color,
            )
        ax.axvline(0, color=GREY, linewidth=0.9)
        ax.set_yticks(range(len(scores)), [one.name for one in scores])
        ax.invert_yaxis()
        ax.set_xlabel("predicted against measured, %", color=GREY)

    caption = "Each forecast with its 90 % interval, against what was measured since (0). Hollow: made in hindsight."
    told = "; ".join(f"{one.name} {100 * (one.error or 0.0):+.2f} %" for one in scores)
    data: list[tuple[object, ...]] = [
        ("arm", "size", "tokens", "law", "made", "predicted", "low", "high", "measured", "before")
    ]
    for one in scores:
        forecast = one.forecast
        head = (forecast["arm"], forecast["size"], forecast["tokens"], forecast["law"], forecast["made"])
        numbers = (forecast["loss"], forecast["low"], forecast["high"], one.measured)
        data.append((*head, *numbers, "yes" if one.before else "no"))
    size = (_WIDTH, 1.2 + 0.3 * len(scores))
    title = summary(checks.forecasts.scores).rstrip(".")
    question = "Did forecasts hold?"
    return render_figure("forecasts", title, caption, size, draw, told, question=question, data=data)


def _rates(checks: Checks) -> Drawn | None:
    rule = checks.rates.rule
    if rule is None:
        return None
    cells = rule.cells[-MOST_PANELS:]
    used = {(one.n_params, one.tokens, round(one.batch)): one for one in checks.rates.off}

    def draw(figure: Figure) -> None:
        for ax, cell in zip(panels_of(figure, len(cells), 4), cells, strict=True):
            panel_title(ax, f"{human(cell.n_params)}, {compact(cell.tokens)}, {human(cell.batch)}/step")
            own = [point for point in checks.rates.points if point.cell == cell.cell]
            ax.plot(
                [point.lr for point in own],
                [point.loss for point in own],
                "o",
                color=HUES[0],
                markersize=4.5,
                markeredgecolor=PAPER,
            )
            ax.set_xscale("log")
            log_ticks(ax, lambda value: f"{value:g}")
            if cell.best.bounded:
                ax.axvspan(cell.best.low, cell.best.high, color=HUES[2], alpha=0.15, linewidth=0)
            ax.axvline(cell.best.value, color=HUES[2], linewidth=1.4)
            one = used.get((cell.n_params, cell.tokens, round(cell.batch)))
            if one is not None:
                ax.axvline(one.used, color=INK, linewidth=1.2, linestyle=(0, (4, 2.5)))
            ax.set_xlabel("peak learning rate", color=GREY, fontsize=9)
            ax.tick_params(axis="x", which="both", labelsize=7)

    wrong = [one for one in checks.rates.off if one.found]
    title = f"Of {len(checks.rates.off)} rates that were used {len(wrong)} are shown to be off"
    if rule.edges:
        title += f"; in {len(rule.edges)} cells the sweep is too narrow"
    caption = (
        "Loss by peak learning rate. Green: the best by the parabola, with its 90 % interval; dashed: the rate that was used."
    )
    if len(cells) < len(rule.cells):
        caption += f" {len(cells)} of {len(rule.cells)} cells."
    told = "; ".join(
        f"{human(cell.n_params)} at {compact(cell.tokens)} tokens best at {cell.best.value:.3g}" for cell in rule.cells
    )
    data: list[tuple[object, ...]] = [("cell", "n_params", "tokens", "tokens per step", "lr", "loss")]
    for point in checks.rates.points:
        if any(point.cell == cell.cell for cell in rule.cells):
            name = " ".join(map(str, point.cell)) if isinstance(point.cell, tuple) else str(point.cell)
            data.append((name, point.n_params, point.tokens, point.batch, point.lr, point.loss))
    size = figure_size(len(cells), 4, 2.6)
    question = "Are the learning rates good?"
    return render_figure("rates", title, caption, size, draw, told, question=question, data=data)
