"""Are the rates of a study good ones? By a sweep where there is one, by a bend that all arms share where there is none.

A rate that is off by a factor f costs k (log f)^2 of log loss. With a sweep, the slope of the parabola at the rate that was
used says whether it is off. Without one, a rate that is off at the longest budget alone lifts the losses of all arms there
above what their smaller budgets say, by about the same fraction. A rate that is off gradually, as one rate for all budgets is,
bends nothing that a law cannot follow: only a sweep shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_synth.study.fit.fit import Fit
from megatron_synth.study.fit.laws import TOKENS, Floats
from megatron_synth.study.fit.noise import Noise, holm
from megatron_synth.study.rates.rule import Point, fieller, window

SIZE = 0.05
"""Of the tests."""
SPAN = 8.0
"""Budgets that span this factor want rates that follow them."""
EXPONENT = -0.3
"""By which the best rate follows the budget, about."""
FEWEST_BUDGETS = 4


@dataclass(frozen=True)
class Off:
    """The rate that was used at one size, budget and batch, beside the best of its sweep.

    factor: used / best, with interval. cost: of log loss, by the parabola. p: of "it is the best", two-sided, corrected (Holm).
    """

    n_params: float
    tokens: float
    batch: float
    used: float
    factor: tuple[float, float, float]
    cost: float
    p: float

    @property
    def found(self) -> bool:
        """Whether the sweep shows that the rate is off."""
        return self.p < SIZE


@dataclass(frozen=True)
class Bend:
    """How far the losses of all arms at the longest budget of a size lie above what their smaller budgets say.

    lift: of log loss, weighted over arms, with its 90 % interval. p: of none, one-sided, corrected (Holm), and the largest
    that is found without one of the arms.
    """

    size: str
    tokens: float
    arms: tuple[str, ...]
    lift: float
    interval: tuple[float, float]
    p: float

    @property
    def found(self) -> bool:
        """Whether all arms share a lift."""
        return self.p < SIZE


def off_rates(points: Sequence[Point], used: Mapping[tuple[float, float, float], float]) -> list[Off]:
    """Hold the rates of runs against a sweep of the same cells.

    Args:
        points: all runs with their rates, those of the grid included.
        used: by size, budget and batch the rate of the grid's runs.
    """
    from scipy.stats import t as student

    near = window(points)
    cells = list(dict.fromkeys(point.cell for point in near))
    if not cells:
        return []
    at_cell = np.array([cells.index(point.cell) for point in near])
    where = {number: next(p for p in near if p.cell == cell) for number, cell in enumerate(cells)}
    rates = {number: used.get((one.n_params, one.tokens, one.batch)) for number, one in where.items()}
    origin = np.array([math.log(rates[number] or where[number].lr) for number in range(len(cells))])
    x = np.log([point.lr for point in near]) - origin[at_cell]  # 0 at the rate that was used
    y = np.log([point.loss for point in near])
    inside = np.eye(len(cells))[at_cell]
    design = np.column_stack([x**2, inside * x[:, None], inside])
    freedom = len(y) - int(np.linalg.matrix_rank(design))
    if freedom < 1:
        return []
    inverse = np.linalg.pinv(design.T @ design)
    theta = inverse @ design.T @ y
    covariance = inverse * float(np.sum((y - design @ theta) ** 2)) / freedom
    found = []
    for number in range(len(cells)):
        rate = rates[number]
        if rate is None:
            continue
        slope, curve = theta[1 + number], theta[0]
        error = math.sqrt(covariance[1 + number, 1 + number])
        p = 2 * float(student.sf(abs(slope) / error, freedom)) if error > 0 else float(slope == 0)
        places = [1 + number, 0]
        variance = covariance[np.ix_(places, places)] * np.array([[0.25, -0.5], [-0.5, 1.0]])
        best, low, high = fieller(-slope / 2, curve, variance, freedom)
        factor = tuple(float(np.exp(np.clip(-value, -50, 50))) for value in (best, high, low))
        cost = float(curve * best**2) if curve > 0 else math.nan
        one = where[number]
        found.append((one, rate, factor, cost, p))
    corrected = holm([p for *_, p in found])
    return [
        Off(one.n_params, one.tokens, one.batch, rate, (factor[0], factor[1], factor[2]), cost, float(p))
        for (one, rate, factor, cost, _), p in zip(found, corrected, strict=True)
    ]


def bends(fits: Mapping[tuple[str, str], Fit], noises: Mapping[str, Noise | None]) -> list[Bend]:
    """Test each size for a lift at its longest budget that arms share.

    Args:
        fits: L(D) by arm and size.
        noises: scatter between seeds by size; None where there are no seeds.
    """
    from scipy.stats import t as student

    found: list[tuple[str, float, list[str], float, float, int, float]] = []
    for size in dict.fromkeys(size for _, size in fits):
        lifts: dict[str, tuple[float, float]] = {}
        squares, rest, longest = 0.0, 0, 0.0
        for (arm, at), law in fits.items():
            if at != size or len(np.unique(law.columns[TOKENS])) < FEWEST_BUDGETS:
                continue
            lift, weight, left, freedom = _lift(law)
            lifts[arm] = lift, weight
            squares, rest, longest = squares + left, rest + freedom, max(longest, float(law.columns[TOKENS].max()))
        noise = noises.get(size)
        scatter, freedom = (noise.relative, noise.freedom) if noise is not None else (0.0, 0)
        if noise is None and rest >= 2:
            scatter, freedom = math.sqrt(squares / rest), rest
        if not lifts or freedom < 2 or scatter <= 0:
            continue
        without = [{arm: one for arm, one in lifts.items() if arm != left_out} for left_out in lifts] if len(lifts) > 1 else []
        p = max(_pooled(chosen, scatter, freedom)[2] for chosen in (lifts, *without))
        value, error, _ = _pooled(lifts, scatter, freedom)
        found.append((size, longest, list(lifts), value, error, freedom, p))
    corrected = holm([one[-1] for one in found])
    result = []
    for (size, longest, arms, value, error, freedom, _), p in zip(found, corrected, strict=True):
        half = float(student.ppf(0.95, freedom)) * error
        result.append(Bend(size, longest, tuple(arms), value, (value - half, value + half), float(p)))
    return result


def _lift(law: Fit) -> tuple[float, float, float, int]:
    """Of one arm: the lift at the longest budget, its weight (1 / variance at unit noise), and what is left of it."""
    last = (law.columns[TOKENS] == law.columns[TOKENS].max()).astype(float)
    slopes = law.law.gradient(law.theta, law.columns)
    free = last - slopes @ np.linalg.lstsq(slopes, last, rcond=1e-10)[0]
    weight = float(free @ free)
    lift = float(free @ law.residuals) / weight
    left = law.residuals - slopes @ np.linalg.lstsq(slopes, law.residuals, rcond=1e-10)[0] - free * lift
    return lift, weight, float(left @ left), len(last) - slopes.shape[1] - 1


def _pooled(lifts: Mapping[str, tuple[float, float]], scatter: float, freedom: int) -> tuple[float, float, float]:
    """The weighted mean of the lifts, its standard error and one-sided p-value."""
    from scipy.stats import t as student

    values: Floats = np.array([lift for lift, _ in lifts.values()])
    weights: Floats = np.array([weight for _, weight in lifts.values()])
    mean, error = float(values @ weights / weights.sum()), scatter / math.sqrt(float(weights.sum()))
    return mean, error, float(student.sf(mean / error, freedom))


def fixed_rates(spans: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Of sizes whose budgets span `SPAN` or more at one rate: the factor by which it is off at the ends if best in the middle.

    spans: smallest and largest budget of each size.
    """
    return {size: (high / low) ** (-EXPONENT / 2) for size, (low, high) in spans.items() if high / low >= SPAN}
