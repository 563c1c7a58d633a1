"""The figures of a report.

In the order of the study that they follow: loss against data, loss against model size, best ratios, speed-up, domains. What is
measured is drawn with points, what a law says inside the measured range with a line, and what it extrapolates with dashes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_synth.core.log import compact, human
from megatron_synth.study.fit.fit import Fit
from megatron_synth.study.report.analysis import LEVEL, Analysis, BestAt, Fitted
from megatron_synth.study.report.collect import Row
from megatron_synth.study.report.figures.drawing import (
    DOUBTED,
    HUES,
    MOST_PANELS,
    PAPER,
    Drawn,
    Look,
    figure_size,
    log_ticks,
    looks,
    marked,
    panel_title,
    panels_of,
    render_figure,
)
from megatron_synth.train.record.figures.plot import GREY, INK, label_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEYOND = 4.0
"""How far a law is drawn beyond the last budget or size."""
_DOMAIN_COLUMNS = 4
_CSV_POINTS = 10
"""Of a law's curve in a figure's data."""


def draw_all(analysis: Analysis) -> list[Drawn]:
    """Every figure that the runs allow."""
    style = looks(analysis)
    loss = _loss_name(analysis)
    found = [
        _laws(analysis, style, "data", f"{loss}. Points: runs; lines: L(D) per arm"),
        _laws(analysis, style, "model", f"{loss}. Points: runs; lines: L(N) per arm"),
        _ratios(analysis, f"{loss}. Shaded: ratios whose mean cannot be told from the best, by the noise between seeds"),
        _speed_ups(analysis, style),
        _domain_bars(analysis, style),
    ]
    return [figure for figure in found if figure is not None]


def _loss_name(analysis: Analysis) -> str:
    how = analysis.study.report.aggregate
    if isinstance(how, tuple):
        return f"Validation loss, mean over {', '.join(how)}"
    return "Validation loss, mean over " + ("domains" if how == "macro" else "tokens")


# ---- loss against data and against model size


def _laws(analysis: Analysis, style: dict[str, Look], law: str, caption: str) -> Drawn | None:
    fits: dict[tuple[str, Any], Fitted] = dict(analysis.data) if law == "data" else dict(analysis.model)
    baseline, study = analysis.study.baseline_arm, analysis.study
    panels: list[tuple[str, Any, list[str]]] = []
    for at in dict.fromkeys(at for _, at in fits):
        families = dict.fromkeys(study.family(arm) for arm, where in fits if where == at and arm != baseline) or {"": None}
        for family in families:
            arms = [arm for arm, where in fits if where == at and (arm == baseline or study.family(arm) == family)]
            panels.append((family, at, arms))
    if not panels:
        return None
    every = len(panels)
    families_here = len({family for family, *_ in panels})
    places = sorted({at for _, at, _ in panels}, key=lambda at: max(row.flops for row in _rows_at(fits, at)))
    shown = places[-max(MOST_PANELS // families_here, 1) :]
    panels = [panel for panel in panels if panel[1] in shown]

    def draw(figure: Figure) -> None:
        for ax, (family, at, arms) in zip(panels_of(figure, len(panels)), panels, strict=True):
            where = f"size {at}" if law == "data" else f"{compact(at)} tokens"
            panel_title(ax, f"{family or baseline} at {where}")
            ax.set_xscale("log")
            labels = [_arm_curve(ax, fits[arm, at], law, style[arm], arm) for arm in arms]
            _keep_to(ax, [row.loss for arm in arms for row in fits[arm, at].rows])
            ax.set_xlabel("training tokens" if law == "data" else "non-embedding parameters", color=GREY)
            log_ticks(ax)
            label_ends(ax, labels)

    caption = (
        f"{caption}, dashed up to {_BEYOND:g} times what was run, unless they rise; cut where they leave what was measured far "
        f"behind. Bands: {LEVEL:.0f} % of the bootstraps."
    )
    if len(panels) < every:
        caption += f" {len(panels)} of {every} panels, those with most compute; the map has all cells, the data all laws."
    size = figure_size(len(panels), height=4.0)
    question = "How does the loss fall with data?" if law == "data" else "How does the loss fall with model size?"
    title = _lowest_at(_rows_at(fits, shown[-1]), baseline)
    data = _law_data(fits, law)
    return render_figure(f"loss-{law}", title, caption + DOUBTED, size, draw, _told_laws(fits), question=question, data=data)


def _rows_at(fits: dict[tuple[str, Any], Fitted], at: Any) -> list[Row]:
    return [row for (_, where), fitted in fits.items() if where == at for row in fitted.rows]


def _lowest_at(rows: Sequence[Row], baseline: str) -> str:
    """Which arm has the lowest mean loss in the largest cell of some runs, and how many are below the baseline."""
    last = max(rows, key=lambda row: row.flops)
    means: dict[str, float] = {}
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row.loss for row in rows if (row.arm, row.size, row.tokens) == (arm, last.size, last.tokens)]
        if own:
            means[arm] = float(np.mean(own))
    best = min(means, key=lambda arm: means[arm])
    where = f"At {last.size} and {compact(last.tokens)} tokens {best} is lowest ({means[best]:.3f})"
    if baseline not in means:
        return where
    below = sum(loss < means[baseline] for loss in means.values())
    return f"{where}; {below} of {len(means) - 1} arms are below {baseline} ({means[baseline]:.3f})"


def _law_data(fits: dict[tuple[str, Any], Fitted], law: str) -> list[tuple[object, ...]]:
    column = "tokens" if law == "data" else "n_params"
    data: list[tuple[object, ...]] = [("arm", "size" if law == "data" else "tokens", "what", column, "loss", "low", "high")]
    for (arm, at), fitted in fits.items():
        for row in fitted.rows:
            data.append((arm, at, "run", getattr(row, column), row.loss, math.nan, math.nan))
        if fitted.fit is None:
            continue
        x = np.array([getattr(row, column) for row in fitted.rows], dtype=np.float64)
        curve = np.geomspace(x.min(), x.max() * _BEYOND, _CSV_POINTS)
        low = high = np.full(len(curve), np.nan)
        if len(fitted.fit.theta_samples) > 1:
            low, high = fitted.fit.predict_interval({column: curve}, LEVEL)
        for values in zip(curve, fitted.fit.predict({column: curve}), low, high, strict=True):
            kind = "law" if values[0] <= x.max() * 1.0001 else "law, extrapolated"
            data.append((arm, at, kind, *(float(value) for value in values)))
    return data


def _told_laws(fits: dict[tuple[str, Any], Fitted]) -> str:
    """The measured ends of every curve, in words."""
    parts = []
    for (arm, at), fitted in fits.items():
        ends = sorted(((row.tokens, row.n_params), row.loss) for row in fitted.rows)
        where = at if isinstance(at, str) else f"{compact(at)} tokens"
        parts.append(f"{arm} at {where} from {ends[0][1]:.3f} to {ends[-1][1]:.3f}")
    return "Loss from the smallest to the largest run: " + "; ".join(parts)


def _arm_curve(ax: Axes, fitted: Fitted, law: str, look: Look, arm: str) -> tuple[float, str, str]:
    column = "tokens" if law == "data" else "n_params"
    x = np.array([getattr(row, column) for row in fitted.rows], dtype=np.float64)
    y = np.array([row.loss for row in fitted.rows])
    ax.plot(
        x,
        y,
        marker=look.marker,
        linestyle="none",
        color=look.color,
        markersize=6.5,
        markeredgecolor=PAPER,
        markeredgewidth=0.6,
        zorder=3,
    )
    if fitted.fit is None:
        return float(y[np.argmax(x)]), marked(arm, fitted), look.color
    inside = np.geomspace(x.min(), x.max(), 40)
    outside = np.geomspace(x.max(), x.max() * _BEYOND, 20)
    ax.plot(inside, fitted.fit.predict({column: inside}), color=look.color, linewidth=1.6)
    beyond = fitted.fit.predict({column: outside})
    if beyond[-1] <= beyond[0]:
        ax.plot(outside, beyond, color=look.color, linewidth=1.4, linestyle=(0, (4, 2.5)))
        whole = np.concatenate([inside, outside])
    else:  # a law that rises with size or budget tells of noise: it is not carried on
        beyond, whole = beyond[:1], inside
    if len(fitted.fit.theta_samples) > 1:
        low, high = fitted.fit.predict_interval({column: whole}, LEVEL)
        ax.fill_between(whole, low, high, color=look.color, alpha=0.13, linewidth=0)
    return float(beyond[-1]), marked(arm, fitted), look.color


def _keep_to(ax: Axes, losses: Sequence[float]) -> None:
    """Axis limits at most one measured range away from what was measured: a law that runs off is cut, not the runs."""
    low, high = ax.get_ylim()
    span = max(losses) - min(losses)
    ax.set_ylim(max(low, min(losses) - span), min(high, max(losses) + span))


# ---- best ratios


def _ratios(analysis: Analysis, caption: str) -> Drawn | None:
    every = [best for best in analysis.best if len({row.ratio for row in best.rows}) > 2]
    if not every:
        return None
    panels = _largest(every)
    hues = {family: HUES[number % len(HUES)] for number, family in enumerate(dict.fromkeys(best.family for best in panels))}

    def draw(figure: Figure) -> None:
        for ax, best in zip(panels_of(figure, len(panels), _DOMAIN_COLUMNS), panels, strict=True):
            _ratio_panel(ax, best, hues[best.family], analysis.behind_best(best.family))

    text = f"{caption}. Curve: the law in the ratio, where it gives an answer. Triangle: the lowest mean among the ratios that "
    text += "were run."
    if len(panels) < len(every):
        text += f" The {len(panels)} of {len(every)} cells with most compute; the map of best ratios has all."
    told = "; ".join(
        f"{best.family} at {best.size} and {compact(best.tokens)} tokens: {best.lowest[0]:.3g} with {best.lowest[1]:.3f}"
        for best in panels
    )
    size = figure_size(len(panels), _DOMAIN_COLUMNS, 2.9)
    data: list[tuple[object, ...]] = [("family", "size", "tokens", "share", "what", "loss")]
    for best in every:
        data += [(best.family, best.size, best.tokens, row.ratio, "run", row.loss) for row in best.rows]
        if best.fitted is not None and not best.refused:
            step = max(len(best.fitted.ratios) // _CSV_POINTS, 1)
            pairs = zip(best.fitted.ratios[::step], best.fitted.losses[::step], strict=True)
            data += [(best.family, best.size, best.tokens, float(share), "law", float(loss)) for share, loss in pairs]
    largest = {best.family: best for best in panels}
    title = "At most compute: " + ", ".join(f"{family} {best.lowest[0]:.2g}" for family, best in largest.items())
    question = "Which share is best?"
    told = f"Lowest mean loss: {told}"
    return render_figure("best-ratio", title, text + DOUBTED, size, draw, told, question=question, data=data)


def _largest(cells: Sequence[BestAt]) -> list[BestAt]:
    """The cells with most compute of each family, in their order; all where they are few."""
    families = dict.fromkeys(best.family for best in cells)
    each = max(MOST_PANELS // len(families), 1)
    chosen = []
    for family in families:
        own = [best for best in cells if best.family == family]
        chosen += sorted(own, key=lambda best: best.rows[0].flops)[-each:]
    return [best for best in cells if any(best is one for one in chosen)]


def _ratio_panel(ax: Axes, best: BestAt, color: str, mixture: Fitted | None) -> None:
    doubted = mixture is not None and bool(mixture.doubts) and not best.refused
    panel_title(ax, f"{best.size}, {compact(best.tokens)} tokens{' †' if doubted else ''}")
    ratios = np.array([row.ratio for row in best.rows])
    losses = np.array([row.loss for row in best.rows])
    levels = np.unique(ratios)
    means = np.array([losses[ratios == level].mean() for level in levels])
    if best.measured is not None:
        low, high = min(best.measured.band), max(best.measured.band)
        ax.axvspan(low - 0.02, high + 0.02, color=color, alpha=0.12, linewidth=0)
        bottom = best.measured.loss
        ax.plot([best.measured.ratio], [bottom], "^", color=color, markersize=9, markeredgecolor=PAPER, zorder=5)
    if best.fitted is not None and not best.refused:
        ax.plot(best.fitted.ratios, best.fitted.losses, color=color, linewidth=1.6)
    ax.plot(ratios, losses, "o", color=color, markersize=3.5, alpha=0.65, markeredgewidth=0, zorder=3)
    ax.plot(levels, means, "_", color=INK, markersize=12, markeredgewidth=1.4, zorder=4)
    ax.set_xlabel(f"share of {best.family}", color=GREY)
    ax.set_xlim(-0.06, 1.06)
    ax.set_xticks([0, 1 / 3, 2 / 3, 1], ["0", "1/3", "2/3", "1"])


# ---- speed-up


def _speed_ups(analysis: Analysis, style: dict[str, Look]) -> Drawn | None:
    study, baseline = analysis.study, analysis.study.baseline_arm
    every = list(dict.fromkeys((size, study.family(arm)) for arm, size in analysis.speed))
    if not every:
        return None
    order = {row.size: row.n_params for row in analysis.rows}
    count = max(MOST_PANELS // len({family for _, family in every}), 1)
    sizes = sorted(dict.fromkeys(size for size, _ in every), key=lambda size: order[size])[-count:]
    panels = [panel for panel in every if panel[0] in sizes]

    def draw(figure: Figure) -> None:
        for ax, (size, family) in zip(panels_of(figure, len(panels), min(len(panels), 3)), panels, strict=True):
            panel_title(ax, f"{family or 'others'} at size {size}")
            ax.axhline(1, color=GREY, linewidth=0.9)
            ax.set_yscale("log")
            for (arm, at), curve in analysis.speed.items():
                if (at, study.family(arm)) == (size, family):
                    fits = analysis.data[arm, size], analysis.data[baseline, size]
                    _speed_curve(ax, curve, style[arm], marked(arm, *fits))
            ax.invert_xaxis()
            ax.set_xlabel("loss to reach (falling to the right)", color=GREY)
            ax.set_ylabel(f"tokens of {baseline} / of the mixture", color=GREY, fontsize=9)
            _factor_ticks(ax)
            ax.legend(frameon=False, fontsize=9, loc="best", labelcolor=INK)

    caption = (
        f"How many times fewer tokens a mixture needs than {baseline} for the same loss. Points: interpolated between "
        "measured losses; lines: from the laws, dashed where at least one arm was not measured there. "
        f"Bands: {LEVEL:.0f} % of the bootstraps."
    )
    last = {
        (arm, size): (float(curve.measured[place]), float(curve.loss[place]))
        for (arm, size), curve in analysis.speed.items()
        for place in np.flatnonzero(np.isfinite(curve.measured))[-1:]
    }
    told = "; ".join(f"{arm} at {size}: {value:.2f} at a loss of {loss:.3f}" for (arm, size), (value, loss) in last.items())
    here = {arm: value for (arm, size), (value, _) in last.items() if size == sizes[-1]}
    title = f"At {sizes[-1]} no arm shares a loss with {baseline}"
    if here:
        best = max(here, key=lambda arm: here[arm])
        fewer = sum(value > 1 for value in here.values())
        title = f"At {sizes[-1]} {fewer} of {len(here)} need fewer tokens than {baseline}; {best} saves most, {here[best]:.2f}x"
    data: list[tuple[object, ...]] = [("arm", "size", "loss", "measured", "by the laws", "low", "high", "what")]
    for (arm, at), curve in analysis.speed.items():
        for place in range(0, len(curve.loss), 4):
            numbers = (float(value[place]) for value in (curve.loss, curve.measured, curve.fitted, curve.low, curve.high))
            data.append((arm, at, *numbers, "measured" if curve.inside[place] else "extrapolated"))
    size = figure_size(len(panels), min(len(panels), 3), 3.9)
    told = f"At the lowest loss measured: {told}"
    question = "How many fewer tokens does a mixture need?"
    return render_figure("speed-up", title, caption + DOUBTED, size, draw, told, question=question, data=data)


def _speed_curve(ax: Axes, curve: Any, look: Look, arm: str) -> None:
    usable = np.isfinite(curve.fitted) & (curve.fitted > 0)
    shown = usable & (curve.fitted < 100) & (curve.fitted > 0.01)
    for part, line in ((curve.inside, "-"), (~curve.inside, (0, (4, 2.5)))):
        values = np.where(shown & part, curve.fitted, np.nan)
        ax.plot(curve.loss, values, color=look.color, linestyle=line, linewidth=1.6)
    band = shown & np.isfinite(curve.low) & np.isfinite(curve.high) & (curve.low > 0)
    if band.any():
        low, high = np.clip(curve.low, 0.05, 20), np.clip(curve.high, 0.05, 20)
        ax.fill_between(curve.loss, low, high, where=list(band), color=look.color, alpha=0.13, linewidth=0)
    places = np.flatnonzero(np.isfinite(curve.measured))[::4]
    x, y = curve.loss[places], curve.measured[places]
    ax.plot(x, y, marker=look.marker, linestyle="none", color=look.color, markersize=6.5, markeredgecolor=PAPER, label=arm)


def _factor_ticks(ax: Axes) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = ax.get_ylim()
    steps = [value for value in (0.05, 0.1, 0.2, 0.33, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20) if low <= value <= high]
    ax.yaxis.set_major_locator(FixedLocator(steps))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")


# ---- domains


def domain_cell(analysis: Analysis) -> tuple[str, int] | None:
    """Size and tokens of the largest cell that every arm was run at; None if there is none."""
    arms = {row.arm for row in analysis.rows}
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in analysis.rows:
        cells.setdefault((row.size, row.tokens), []).append(row)
    common = {cell: rows for cell, rows in cells.items() if {row.arm for row in rows} == arms}
    return max(common, key=lambda cell: common[cell][0].flops) if common and len(arms) > 1 else None


def _domain_bars(analysis: Analysis, style: dict[str, Look]) -> Drawn | None:
    cell = domain_cell(analysis)
    if cell is None:
        return None
    baseline = analysis.study.baseline_arm
    rows = [row for row in analysis.rows if (row.size, row.tokens) == cell]
    domains = list(rows[0].domains)
    arms = [arm for arm in analysis.study.arms if arm != baseline and any(row.arm == arm for row in rows)]
    if not arms or all(row.arm != baseline for row in rows):
        return None
    height = 0.8 / len(arms)

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for number, arm in enumerate(arms):
            at = np.arange(len(domains)) + (number - (len(arms) - 1) / 2) * height
            changes = [_change(rows, arm, baseline, domain) for domain in domains]
            values = [100 * change for change, _ in changes]
            errors = [100 * error for _, error in changes]
            look = style[arm]
            ax.barh(
                at, values, height=0.88 * height, color=look.color, hatch=look.hatch, edgecolor=PAPER, linewidth=0, label=arm
            )
            ax.errorbar(values, at, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
        ax.axvline(0, color=GREY, linewidth=0.9)
        ax.set_yticks(range(len(domains)), domains)
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set_xlabel(f"loss against {baseline}, %; lower is better", color=GREY)
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), labelcolor=INK)

    caption = (
        f"Loss of each arm on each validation domain against {baseline}, at size {cell[0]} and {human(cell[1])} tokens, "
        "the largest cell that all arms have. Bars: means over seeds; whiskers: one standard error of the difference."
    )
    size = (11.5, 1.2 + (0.24 * len(arms) + 0.25) * len(domains))
    changes = {(arm, name): _change(rows, arm, baseline, name) for arm in arms for name in domains}
    told = "; ".join(f"{arm}, {name}: {100 * change:+.1f} %" for (arm, name), (change, _) in changes.items())
    better = {name: sum(changes[arm, name][0] < 0 for arm in arms) for name in domains}
    most, least = (pick(better, key=lambda name: better[name]) for pick in (max, min))
    title = f"{better[most]} of {len(arms)} arms help on {most}"
    if better[most] > better[least]:
        title = f"Most arms help on {most} ({better[most]} of {len(arms)}), fewest on {least} ({better[least]})"
    elif len(domains) > 1:
        title = f"{better[most]} of {len(arms)} arms help, on every domain as many"
    heads = ("arm", "domain", "change", "standard error")
    data = [heads, *((arm, name, *change) for (arm, name), change in changes.items())]
    question = "On which domains does it help?"
    return render_figure("domains", title, caption, size, draw, told, question=question, data=data)


def _change(rows: Sequence[Row], arm: str, baseline: str, domain: str) -> tuple[float, float]:
    """Relative difference of the mean loss, and its standard error over seeds (0 with one seed each)."""
    own = np.array([row.domains[domain] for row in rows if row.arm == arm])
    base = np.array([row.domains[domain] for row in rows if row.arm == baseline])
    spread = sum(float(part.var(ddof=1)) / len(part) for part in (own, base) if len(part) > 1)
    return float(own.mean() / base.mean() - 1), math.sqrt(spread) / float(base.mean())


def describe_fit(fit: Fit) -> str:
    """`E = 4.21 [3.9, 4.4], B = 12.3 [..], beta = 0.31 [..]` with 90 % intervals where there are any."""
    parts = []
    for name, value in fit.params.items():
        bounds = fit.intervals.get("90", {}).get(name)
        parts.append(f"{name} = {value:.4g}" + (f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds else ""))
    return ", ".join(parts)
