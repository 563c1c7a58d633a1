"""The figure of a law over shares: laws compared, unseen runs as predicted, and what each source's share does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_synth.study.fit.shares.fit import ShareFit
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.report.figures.fit import three_panels
from megatron_synth.train.record.figures.plot import ACCENT, GREY, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = 6
"""Sources drawn, those that change the loss most."""
_STEPS = 60


def write_shares_figure(fit: ShareFit, path: Path, title: str) -> None:
    """Draw `fit` to a PNG."""
    law = f"{fit.law.name}: {fit.law.formula}"
    with three_panels(path, title, law, widths=(4, 4, 5), left=0.09, gap=0.26) as (left, middle, right):
        _draw_laws(left, fit)
        _draw_predicted(middle, fit)
        _draw_sources(right, fit)


def _draw_laws(axes: Axes, fit: ShareFit) -> None:
    """Bars of the cross-validated errors, the lowest on top."""
    ordered = sorted(fit.compared.values(), key=lambda one: -one.error)
    colors = [ACCENT if one.law.name == fit.law.name else GREY for one in ordered]
    axes.barh([one.law.name for one in ordered], [100 * one.error for one in ordered], color=colors)
    for place, one in enumerate(ordered):
        rank = "" if one.rank is None else f", rank {one.rank:.3f}"
        axes.annotate(f" {one.error:.2%}{rank}", (0, place), va="center", fontsize=8, color=INK)
    axes.set_xlabel("mean error of unseen mixtures, %")
    axes.set_title("Laws by cross-validation")


def _draw_predicted(axes: Axes, fit: ShareFit) -> None:
    """Losses by the law without the run's fold, against those measured."""
    measured, predicted = fit.loss, np.exp(fit.chosen.predicted)
    ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    axes.plot(ends, ends, color=GREY, linewidth=1)
    axes.plot(measured, predicted, "o", color=PALETTE[0], markersize=3.5, alpha=0.6)
    axes.set_xlabel("measured loss")
    axes.set_ylabel("predicted without the run")
    axes.set_title("Unseen mixtures")


def _draw_sources(axes: Axes, fit: ShareFit) -> None:
    """The loss along the share of a source, the others in the proportions of the mean mixture, to the largest share run."""
    points = fit.points
    mean = points.shares.mean(axis=0)
    scales = [None if column is None else float(np.exp(np.log(column).mean())) for column in (points.n_params, points.tokens)]
    curves = []
    for place, source in enumerate(points.sources):
        shares = np.linspace(0, points.shares[:, place].max(), _STEPS)
        rest = np.delete(mean, place)
        if rest.sum() <= 0 or shares[-1] <= 0:
            continue
        mixtures = np.insert(np.outer(1 - shares, rest / rest.sum()), place, shares, axis=1)
        at = Mixtures(points.sources, mixtures, *(None if value is None else np.full(_STEPS, value) for value in scales))
        curves.append((source, shares, fit.predict(at)))
    curves.sort(key=lambda curve: -float(np.ptp(curve[2])))
    for color, (source, shares, losses) in zip(PALETTE * 2, curves[:CURVES], strict=False):
        axes.plot(shares, losses, color=color, linewidth=1.8, label=source)
    axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("share of a source, others as in the mean mixture")
    axes.set_ylabel("predicted loss")
    axes.set_title("What a source does")
