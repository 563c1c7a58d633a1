"""Figures over sizes and budgets: how far each arm is from the baseline, which ratio is best, and what the laws leave over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_synth.core.log import compact
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.report.analysis import Analysis, Fitted
from megatron_synth.study.report.collect import Row
from megatron_synth.study.report.figures.drawing import (
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_LAWS = {"data": "L(D)", "model": "L(N)", "joint": "L(N, D)", "mixture": "laws in the ratio"}


def draw_maps(analysis: Analysis, style: dict[str, Look]) -> list[Drawn]:
    """The maps over sizes and budgets, where both vary, and the residuals."""
    return [figure for figure in (_gaps(analysis), _best_ratios(analysis), _residuals(analysis, style)) if figure is not None]


def _axes_of(rows: Sequence[Row]) -> tuple[list[str], list[int]] | None:
    """Sizes in rising order and budgets; None unless both vary."""
    sizes = sorted({(row.n_params, row.size) for row in rows})
    tokens = sorted({row.tokens for row in rows})
    return ([size for _, size in sizes], tokens) if min(len(sizes), len(tokens)) > 1 else None


def _map(
    ax: Axes, values: Floats, texts: Sequence[Sequence[str]], sizes: Sequence[str], tokens: Sequence[int], reach: float
) -> None:
    """A table of colors [sizes, budgets] with the numbers in it; blue is low. Cells that were not run are empty."""
    ax.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", alpha=0.55, origin="lower")
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            ax.text(column, row, text, ha="center", va="center", fontsize=8.5, color=INK)
    ax.set_xticks(range(len(tokens)), [compact(count) for count in tokens])
    ax.set_yticks(range(len(sizes)), list(sizes))
    ax.grid(visible=False)
    ax.set_xlabel("training tokens", color=GREY)


def _gaps(analysis: Analysis) -> Drawn | None:
    baseline = analysis.study.baseline_arm
    place = _axes_of(analysis.rows)
    arms = [arm for arm in analysis.study.arms if arm != baseline and any(row.arm == arm for row in analysis.rows)]
    means: dict[tuple[str, str, int], float] = {}
    for cell in {row.cell for row in analysis.rows}:
        means[cell] = float(np.mean([row.loss for row in analysis.rows if row.cell == cell]))
    if place is None or not arms or not any(cell[0] == baseline for cell in means):
        return None
    sizes, tokens = place
    gaps = np.full((len(arms), len(sizes), len(tokens)), np.nan)
    for (arm, size, count), loss in means.items():
        natural = means.get((baseline, size, count))
        if arm in arms and natural is not None:
            gaps[arms.index(arm), sizes.index(size), tokens.index(count)] = 100 * (loss / natural - 1)
    reach = max(float(np.nanmax(np.abs(gaps), initial=0.0)), 0.1)

    def draw(figure: Figure) -> None:
        for ax, arm, values in zip(panels_of(figure, len(arms), _COLUMNS), arms, gaps, strict=True):
            panel_title(ax, arm)
            texts = [["" if np.isnan(value) else f"{value:+.1f}" for value in line] for line in values]
            _map(ax, values, texts, sizes, tokens, reach)

    told = "; ".join(
        f"{arm} at {sizes[row]} and {compact(tokens[column])} tokens {gaps[number, row, column]:+.1f} %"
        for number, arm in enumerate(arms)
        for row, column in np.argwhere(~np.isnan(gaps[number]))
    )
    caption = f"Mean loss of each arm against {baseline}, in percent, by size and budget; below 0 is better. Empty: not run."
    extent = figure_size(len(arms), _COLUMNS, 0.9 + 0.42 * len(sizes))
    known = np.argwhere(~np.isnan(gaps))
    data: list[tuple[object, ...]] = [("arm", "size", "tokens", "percent above the baseline")]
    data += [(arms[one], sizes[row], tokens[column], float(gaps[one, row, column])) for one, row, column in known]
    title = f"No cell has both an arm and {baseline}"
    if len(known):
        one, row, column = known[np.argmin([gaps[tuple(place)] for place in known])]
        title = f"Below {baseline} in {int((gaps < 0).sum())} of {len(known)} cells; most {arms[one]} at {sizes[row]} and "
        title += f"{compact(tokens[column])} tokens, {gaps[one, row, column]:+.1f} %"
    question = "Where does each arm help?"
    return render_figure("map", title, caption, extent, draw, told, question=question, data=data)


def _best_ratios(analysis: Analysis) -> Drawn | None:
    families = list(dict.fromkeys(best.family for best in analysis.best))
    place = _axes_of([row for best in analysis.best for row in best.rows])
    if place is None:
        return None
    sizes, tokens = place
    ratios = np.full((len(families), len(sizes), len(tokens)), np.nan)
    texts = [[["" for _ in tokens] for _ in sizes] for _ in families]
    for best in analysis.best:
        at = families.index(best.family), sizes.index(best.size), tokens.index(best.tokens)
        ratios[at] = best.lowest[0]
        ties = best.measured is not None and len(best.measured.band) > 1
        texts[at[0]][at[1]][at[2]] = f"{best.lowest[0]:.2f}{' ~' if ties else ''}"

    def draw(figure: Figure) -> None:
        for number, ax in enumerate(panels_of(figure, len(families), _COLUMNS)):
            panel_title(ax, families[number])
            _map(ax, 2 * ratios[number] - 1, texts[number], sizes, tokens, 1.0)

    told = "; ".join(
        f"{best.family} at {best.size} and {compact(best.tokens)} tokens {best.lowest[0]:.2f}" for best in analysis.best
    )
    caption = "The share with the lowest mean loss among those that were run; ~ where the noise cannot tell it from others."
    size = figure_size(len(families), _COLUMNS, 0.9 + 0.42 * len(sizes))
    heads = ("family", "size", "tokens", "best share", "its loss", "not worse")
    data: list[tuple[object, ...]] = [heads]
    for best in analysis.best:
        band = () if best.measured is None else best.measured.band
        data.append((best.family, best.size, best.tokens, *best.lowest, " ".join(f"{share:.4g}" for share in band)))
    ranges = []
    for number, family in enumerate(families):
        low, high = float(np.nanmin(ratios[number])), float(np.nanmax(ratios[number]))
        ranges.append(f"{family} {low:.2g} everywhere" if low == high else f"{family} from {low:.2g} to {high:.2g}")
    question = "Does the best share depend on size and budget?"
    return render_figure("best-ratio-map", "; ".join(ranges), caption, size, draw, told, question=question, data=data)


def _residuals(analysis: Analysis, style: dict[str, Look]) -> Drawn | None:
    kinds: dict[str, list[Fitted]] = {}
    for fitted in analysis.fits:
        if fitted.fit is not None:
            kinds.setdefault(fitted.key[0], []).append(fitted)
    if not kinds:
        return None

    def draw(figure: Figure) -> None:
        for ax, (kind, fits) in zip(panels_of(figure, len(kinds), 2), kinds.items(), strict=True):
            panel_title(ax, _LAWS.get(kind, kind))
            ax.axhline(0, color=GREY, linewidth=0.9)
            for fitted in fits:
                assert fitted.fit is not None
                kept = [fitted.rows[place] for place in fitted.fit.points]
                x = [row.n_params if kind == "model" else row.tokens for row in kept]
                for arm in dict.fromkeys(row.arm for row in kept):
                    own = [place for place, row in enumerate(kept) if row.arm == arm]
                    look = style[arm]
                    values = 100 * np.expm1(fitted.fit.residuals[own])
                    ax.plot(
                        [x[place] for place in own],
                        values,
                        marker=look.marker,
                        linestyle="none",
                        color=look.color,
                        markersize=4,
                        alpha=0.75,
                    )
            ax.set_xscale("log")
            log_ticks(ax)
            ax.set_xlabel("non-embedding parameters" if kind == "model" else "training tokens", color=GREY)
            ax.set_ylabel("measured / law - 1, %", color=GREY, fontsize=9)

    told = "; ".join(
        f"{_LAWS.get(kind, kind)}, {len(fits)} laws: {100 * _mean_error(fits):.2f} %" for kind, fits in kinds.items()
    )
    caption = "What the laws leave over of every run, in the arms' colors. A bend that arms share is a wrong law; a funnel is "
    caption += "unequal noise."
    size = figure_size(len(kinds), 2, 3.2)
    told = f"Mean absolute relative errors: {told}"
    data: list[tuple[object, ...]] = [("law", "of", "run", "arm", "measured / law - 1")]
    errors, doubted = [], 0
    for fits in kinds.values():
        for fitted in fits:
            assert fitted.fit is not None
            errors.append(fitted.fit.mean_absolute_relative_error)
            doubted += bool(fitted.doubts)
            of = " ".join(fitted.key[1:])
            for place, residual in zip(fitted.fit.points, np.expm1(fitted.fit.residuals), strict=True):
                row = fitted.rows[place]
                data.append((fitted.key[0], of, row.id, row.arm, float(residual)))
    title = f"They miss their runs by {100 * float(np.mean(errors)):.2g} % in the mean; {doubted} of {len(errors)} carry doubts"
    question = "Do the laws hold?"
    return render_figure("residuals", title, caption, size, draw, told, question=question, data=data)


def _mean_error(fits: Sequence[Fitted]) -> float:
    return float(np.mean([fitted.fit.mean_absolute_relative_error for fitted in fits if fitted.fit is not None]))
