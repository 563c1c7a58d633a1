"""The best size and the best number of tokens for a compute, and how both grow with it: N*(C) = G C^a, D*(C) = (C / 6 G) C^-a.

Two methods. Parabolas (Hoffmann et al. 2022, arXiv 2203.15556, approach 2): runs of one compute make a curve in log N, whose
minimum is N*; a line through log N* over log C, weighted by how well each is known, has the slope a. It assumes no law in N
and D, and needs several sizes at each of several computes. The joint law (approach 3): a = beta / (alpha + beta).

Legend: M runs, F computes, S draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.bootstrap import interval
from megatron_synth.study.fit.diagnostics import Diagnostic
from megatron_synth.study.fit.fit import Fit, checked_losses
from megatron_synth.study.fit.laws import FLOPS_PER_PARAMETER_AND_TOKEN, Floats

LEVELS = (90.0, 95.0)
_FLAT = 1e-9
"""Of the logarithms of a curve's losses: a smaller range is none."""
SAME_COMPUTE = 0.10
"""Runs whose compute differs from a neighbor's by less than this part are of one curve: tokens are rounded to steps."""
SIZES, CURVES = 4, 3
"""Sizes that a curve needs (a parabola has three numbers), and curves that a line needs."""


@dataclass(frozen=True)
class Curve:
    """Runs of one compute.

    flops: their geometric mean. runs: places of its runs in the table.
    n_params, tokens, loss: at the minimum of the parabola.
    interval: of `n_params`, 90 %.
    used: whether its minimum is inside the sizes that were run; others take no part in the slope.
    """

    flops: float
    runs: NDArray[np.int64]
    n_params: float
    tokens: float
    loss: float
    interval: tuple[float, float]
    used: bool


@dataclass(frozen=True)
class Exponent:
    """How N* grows with compute; D* grows with 1 less this.

    n_params, tokens: the exponents of N*(C) and D*(C). n_interval, d_interval: by level in percent.
    at: log of N* at C = 1, so that N*(C) = exp(at) C^n_params.
    method: `parabolas` or `joint`.
    """

    n_params: float
    tokens: float
    n_interval: dict[str, tuple[float, float]]
    d_interval: dict[str, tuple[float, float]]
    at: float
    method: str

    def best(self, flops: float) -> tuple[float, float]:
        """N* and D* for a compute."""
        size = float(np.exp(self.at + self.n_params * np.log(flops)))
        return size, flops / (FLOPS_PER_PARAMETER_AND_TOKEN * size)

    def to_json(self) -> dict[str, Any]:
        """As law.json holds it."""
        return {
            "method": self.method,
            "N": {"exponent": self.n_params, "intervals": self.n_interval},
            "D": {"exponent": self.tokens, "intervals": self.d_interval},
        }


@dataclass(frozen=True)
class Isoflop:
    """What the parabolas say.

    curves: by rising compute. exponent: of the line through their minima.
    warnings: what speaks against it.
    """

    curves: tuple[Curve, ...]
    exponent: Exponent
    warnings: tuple[Diagnostic, ...]


def same_compute(flops: Floats) -> NDArray[np.int64]:
    """A number [M] per run, equal for runs of one curve: those whose compute is near that of the next lower run.

    A curve that drifts over a factor of two is none, and is left to single runs' own numbers.
    """
    order = np.argsort(flops, kind="stable")
    logs = np.log(flops[order])
    number = np.concatenate([[0], np.cumsum(np.diff(logs) > np.log1p(SAME_COMPUTE))])
    result = np.empty(len(flops), dtype=np.int64)
    result[order] = number
    return result


def isoflop(n_params: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, draws: int = 1000, seed: int = 0) -> Isoflop:
    """N*(C) and D*(C) by parabolas.

    Intervals are percentiles over draws: every curve's parabola is drawn again with normal scatter as large as that of the runs
    around their parabolas, pooled over curves and drawn, too (as `bootstrap` does for few points). The line has the scatter of
    the minima around it besides, which holds what differs from curve to curve. The wider of the two ends counts.

    Args:
        n_params: [M].
        tokens: [M].
        loss: [M], above 0.
        draws: for the intervals.
        seed: of the draws.

    Raises:
        UserError: fewer than three computes with four sizes each, or none with a minimum inside.
    """
    from scipy.stats import t as student

    sizes, budgets = (np.asarray(values, dtype=np.float64) for values in (n_params, tokens))
    losses = checked_losses(loss)
    if not (sizes.shape == budgets.shape == losses.shape and (sizes > 0).all() and (budgets > 0).all()):
        raise UserError("isoflop: expected sizes and tokens above 0, one per loss")
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * sizes * budgets
    curve_of = same_compute(flops)
    members = [np.flatnonzero(curve_of == number) for number in range(int(curve_of.max()) + 1)]
    members = [runs for runs in members if len(np.unique(sizes[runs])) >= SIZES and np.ptp(np.log(flops[runs])) < np.log(2)]
    if len(members) < CURVES:
        raise UserError(
            f"isoflop: {len(members)} computes have runs of {SIZES} sizes or more; at least {CURVES} are needed "
            f"(runs count as of one compute within {SAME_COMPUTE:.0%} of their neighbor)"
        )
    random = np.random.default_rng(seed)
    designs = [_design(np.log(sizes[runs])) for runs in members]
    logs = [np.log(losses[runs]) for runs in members]
    solved = [np.linalg.lstsq(design, values, rcond=None)[0] for design, values in zip(designs, logs, strict=True)]
    squares = sum(
        float(np.sum((design @ theta - values) ** 2)) for design, theta, values in zip(designs, solved, logs, strict=True)
    )
    freedom = sum(len(values) - 3 for values in logs)
    scale = np.sqrt(squares / freedom * freedom / random.chisquare(freedom, draws))
    curves, drawn = [], []
    for runs, design, theta in zip(members, designs, solved, strict=True):
        x = np.log(sizes[runs])
        noise = scale[:, None] * random.standard_normal((draws, len(runs)))
        thetas = theta + noise @ np.linalg.pinv(design).T
        minima = np.where(thetas[:, 2] > 0, x.mean() - thetas[:, 1] / (2 * np.where(thetas[:, 2] > 0, thetas[:, 2], 1)), np.nan)
        mean_flops = float(np.exp(np.log(flops[runs]).mean()))
        center = float(x.mean() - theta[1] / (2 * theta[2])) if theta[2] > 0 else np.nan
        # a curve of equal losses has no minimum but that of its rounding
        used = bool(theta[2] > 0 and x.min() <= center <= x.max() and np.ptp(np.log(losses[runs])) > _FLAT)
        drawn.append(minima)
        low, high = np.nanpercentile(minima, [5, 95]) if np.isfinite(minima).any() else (np.nan, np.nan)
        size = float(np.exp(center))
        bottom = float(np.exp(theta[0] - theta[1] ** 2 / (4 * theta[2]))) if theta[2] > 0 else float("nan")
        best_tokens = mean_flops / (FLOPS_PER_PARAMETER_AND_TOKEN * size)
        curves.append(Curve(mean_flops, runs, size, best_tokens, bottom, (float(np.exp(low)), float(np.exp(high))), used))
    chosen = [place for place, curve in enumerate(curves) if curve.used]
    if len(chosen) < CURVES:
        raise UserError(
            f"isoflop: {len(chosen)} of {len(curves)} curves have their minimum inside the sizes that were run; {CURVES} are "
            "needed"
        )
    c = np.log([curves[place].flops for place in chosen])
    y = np.log([curves[place].n_params for place in chosen])
    line = np.stack([np.ones_like(c), c], axis=1)
    ends = [np.nanpercentile(drawn[place], [15.87, 84.13]) for place in chosen]
    weight = 1 / np.maximum([(high - low) / 2 for low, high in ends], 1e-6)
    start, slope = np.linalg.lstsq(line * weight[:, None], y * weight, rcond=None)[0]
    minima = np.stack([drawn[place] for place in chosen], axis=1)
    minima = minima[np.isfinite(minima).all(axis=1)]
    slopes = (np.linalg.pinv(line * weight[:, None]) @ (minima * weight).T)[1]
    around = (y - line @ [start, slope]) * weight
    mean = np.average(c, weights=weight**2)
    n_interval = {}
    for level in LEVELS:
        low, high = interval(slopes, level) if len(slopes) > 1 else (np.array(np.nan), np.array(np.nan))
        if len(chosen) > 2:
            error = np.sqrt(float(np.sum(around**2)) / (len(chosen) - 2) / float(np.sum((weight * (c - mean)) ** 2)))
            reach = float(student.ppf(0.5 + level / 200, len(chosen) - 2)) * error
            low, high = np.fmin(low, slope - reach), np.fmax(high, slope + reach)
        n_interval[f"{level:g}"] = (float(low), float(high))
    d_interval = {level: (1 - high, 1 - low) for level, (low, high) in n_interval.items()}
    exponent = Exponent(float(slope), float(1 - slope), n_interval, d_interval, float(start), "parabolas")
    return Isoflop(tuple(curves), exponent, tuple(_doubts(curves, minima, draws)))


def _design(x: Floats) -> Floats:
    """Features [M, 3] of a parabola around the mean."""
    centered = x - x.mean()
    return np.stack([np.ones_like(x), centered, centered**2], axis=1)


def _doubts(curves: list[Curve], minima: Floats, draws: int) -> Iterator[Diagnostic]:
    edge = [f"{curve.flops:.2g}" for curve in curves if not curve.used]
    if edge:
        yield Diagnostic("best-at-edge", f"at {', '.join(edge)} FLOPs the parabola has no minimum inside the sizes: left out")
    used = [curve for curve in curves if curve.used]
    if len(minima) < 0.95 * draws:
        yield Diagnostic(
            "flat-optimum", f"in {1 - len(minima) / draws:.0%} of the draws a curve has no minimum: the scatter hides it"
        )
    if used[-1].flops / used[0].flops < 10:
        yield Diagnostic(
            "narrow-range",
            f"computes span a factor of {used[-1].flops / used[0].flops:.2g} only: an exponent says little outside",
        )


def joint_exponent(joint: Fit) -> Exponent:
    """The exponents of N*(C) and D*(C) by a fit of the law `joint` or `tied`, with its bootstraps.

    Raises:
        UserError: it is another law, or an exponent is not above 0.
    """
    if joint.law.name not in ("joint", "tied"):
        raise UserError(f"isoflop: needs a fit of the law 'joint', got '{joint.law.name}'")
    p = joint.params
    alpha, beta = p["alpha"], p.get("beta", p["alpha"])
    if min(alpha, beta) <= 0:
        raise UserError("isoflop: the loss does not fall in N or in D, so no size is best")
    named = joint.law.to_params(joint.theta_samples)
    alphas = named.get("alpha", np.full(len(joint.theta_samples), alpha))
    betas = named.get("beta", alphas)
    falls = (alphas > 0) & (betas > 0)
    drawn = (betas / (alphas + betas))[falls]
    n_interval = {}
    for level in LEVELS:
        low, high = interval(drawn, level) if len(drawn) > 1 else (np.array(np.nan), np.array(np.nan))
        n_interval[f"{level:g}"] = (float(low), float(high))
    d_interval = {level: (1 - high, 1 - low) for level, (low, high) in n_interval.items()}
    slope = beta / (alpha + beta)
    log_g = (np.log(alpha / beta) + np.log(p["A"]) - np.log(p["B"])) / (alpha + beta)
    at = float(log_g - slope * np.log(FLOPS_PER_PARAMETER_AND_TOKEN))
    return Exponent(slope, 1 - slope, n_interval, d_interval, at, "joint")
