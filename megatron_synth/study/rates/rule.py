"""The best learning rate as a power of size, budget and batch, from a sweep.

    log L = c_cell + k (log lr - log lr*)^2,    log lr* = a + b log N + c log D + d log B

A parabola in the logarithm of the rate, with one curvature k for all cells (one arm, size, budget and batch each). It is
linear in c, k, k a, k b, k c and k d, so least squares gives all at once, and what is asked for are ratios of these: their
intervals are Fieller's (1954), which are exact for normal scatter, and unbounded where the runs do not show a curvature.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_synth.study.fit.laws import Floats

LEVEL = 90.0
FEWEST_RATES = 3
WINDOW = 4.05
"""Rates further from the best of their cell than by this factor are left out: the loss is no parabola there, and diverges."""
_DOUBTED = 0.01
AXES = ("N", "D", "B")


@dataclass(frozen=True)
class Point:
    """A run of a sweep, or one beside it."""

    cell: Hashable
    n_params: float
    tokens: float
    batch: float
    """Tokens per step."""
    lr: float
    loss: float


@dataclass(frozen=True)
class Ratio:
    """A number with its interval, which is infinite where the runs do not bound it."""

    value: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class CellBest:
    """The best rate of one cell.

    measured: the rate of lowest mean loss. best: by the parabola, with interval.
    edge: `low` or `high` where the lowest loss is at the end of the rates that were run, or the parabola's best is beyond it.
    """

    cell: Hashable
    n_params: float
    tokens: float
    batch: float
    rates: tuple[float, ...]
    measured: float
    best: Ratio
    edge: str


@dataclass(frozen=True)
class Rule:
    """A fitted rule.

    exponents: of N, D and B, those that vary in the sweep.
    center: geometric means of N, D and B. lr: the best rate there.
    curvature: k, of log loss per square of log rate, with interval.
    noise: scatter of log loss around the parabolas. freedom: of it.
    misses: p-value of the F-test against a best rate of each cell's own; small: no rule of powers.
    points: runs used. left_out: those outside the window.
    """

    exponents: dict[str, Ratio]
    center: tuple[float, float, float]
    lr: Ratio
    curvature: Ratio
    noise: float
    freedom: int
    misses: float | None
    cells: tuple[CellBest, ...]
    points: int
    left_out: int
    theta: Floats
    covariance: Floats
    axes: tuple[str, ...]

    @property
    def edges(self) -> tuple[CellBest, ...]:
        """Cells whose best rate lies at the end of the rates that were run."""
        return tuple(cell for cell in self.cells if cell.edge)

    @property
    def doubtful(self) -> bool:
        """Whether it is no rule: no curvature, or cells that do not follow it."""
        return not self.lr.bounded or (self.misses is not None and self.misses < _DOUBTED)

    def at(self, n_params: float, tokens: float, batch: float) -> Ratio:
        """The best rate at a size, budget and batch."""
        given = dict(zip(AXES, zip((n_params, tokens, batch), self.center, strict=True), strict=True))
        weights = np.array([1.0, *(math.log(given[axis][0] / given[axis][1]) for axis in self.axes)])
        return _rate(*self._best(weights))

    def _best(self, weights: Floats) -> tuple[float, float, float]:
        combined = np.zeros((2, len(self.theta)))
        combined[0, 1:], combined[1, 0] = weights, 1.0
        slope, curve = combined @ self.theta
        variance = combined @ self.covariance @ combined.T
        return fieller(-slope / 2, curve, variance * np.array([[0.25, -0.5], [-0.5, 1.0]]), self.freedom)


def _rate(value: float, low: float, high: float) -> Ratio:
    return Ratio(*(float(np.exp(np.clip(one, -700, 700))) if math.isfinite(one) else one for one in (value, low, high)))


def fieller(top: float, bottom: float, variance: Floats, freedom: int, level: float = LEVEL) -> tuple[float, float, float]:
    """A ratio of two normal numbers with its interval (E. C. Fieller, J. R. Stat. Soc. B 16 (1954) 175-185).

    Args:
        top: estimate of the one.
        bottom: estimate of the other.
        variance: [2, 2], of both.
        freedom: of the scatter behind it.
        level: of the interval, in percent.

    Returns:
        The ratio and the ends; infinite where the bottom may be 0 or less.
    """
    from scipy.stats import t as student

    t = float(student.ppf(0.5 + level / 200, freedom))
    a = bottom**2 - t**2 * variance[1, 1]
    b = -2 * (top * bottom - t**2 * variance[0, 1])
    c = top**2 - t**2 * variance[0, 0]
    if bottom <= 0 or a <= 0:
        return (top / bottom if bottom else math.nan), -math.inf, math.inf
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return top / bottom, (-b - root) / (2 * a), (-b + root) / (2 * a)


def window(points: Sequence[Point]) -> list[Point]:
    """The runs of cells with three rates or more, within `WINDOW` of the best of their cell."""
    cells: dict[Hashable, dict[float, list[float]]] = {}
    for point in points:
        cells.setdefault(point.cell, {}).setdefault(point.lr, []).append(math.log(point.loss))
    best = {cell: min(rates, key=lambda lr: float(np.mean(rates[lr]))) for cell, rates in cells.items()}
    near = [point for point in points if abs(math.log(point.lr / best[point.cell])) <= math.log(WINDOW)]
    counted: dict[Hashable, set[float]] = {}
    for point in near:
        counted.setdefault(point.cell, set()).add(point.lr)
    return [point for point in near if len(counted[point.cell]) >= FEWEST_RATES]


def fit_rule(points: Sequence[Point]) -> Rule | None:
    """Fit the rule; None where there is no cell with three rates, or nothing is left to estimate the scatter from."""
    used = window(points)
    cells = list(dict.fromkeys(point.cell for point in used))
    if not cells:
        return None
    logs = np.log([[point.n_params, point.tokens, point.batch] for point in used])
    at_cell = np.array([cells.index(point.cell) for point in used])
    per_cell = np.array([logs[at_cell == number][0] for number in range(len(cells))])
    center = per_cell.mean(axis=0)
    axes = _varying(per_cell - center)
    x = np.log([point.lr for point in used])
    middle = float(x.mean())
    x = x - middle
    y = np.log([point.loss for point in used])
    inside = np.eye(len(cells))[at_cell]
    features = [x**2, x, *(x * (logs[:, AXES.index(axis)] - center[AXES.index(axis)]) for axis in axes)]
    design = np.column_stack([*features, inside])
    freedom = len(y) - np.linalg.matrix_rank(design)
    if freedom < 1:
        return None
    theta, covariance, squares = _least_squares(design, y, int(freedom))
    kept = slice(0, 2 + len(axes))
    rule = Rule(
        exponents={},
        center=(float(np.exp(center[0])), float(np.exp(center[1])), float(np.exp(center[2]))),
        lr=Ratio(math.nan, math.nan, math.nan),
        curvature=_curvature(theta[0], covariance[0, 0], int(freedom)),
        noise=math.sqrt(squares / freedom),
        freedom=int(freedom),
        misses=None,
        cells=(),
        points=len(used),
        left_out=len(points) - len(used),
        theta=theta[kept],
        covariance=covariance[kept, kept],
        axes=axes,
    )
    own = np.column_stack([x**2, inside * x[:, None], inside])
    rest = len(y) - int(np.linalg.matrix_rank(own))
    misses, own_fit = None, None
    if rest >= 1:
        own_theta, own_covariance, own_squares = _least_squares(own, y, rest)
        own_fit = own_theta, own_covariance, rest
        if freedom > rest:
            misses = _f_test(squares - own_squares, int(freedom) - rest, own_squares, rest)
    exponents = {}
    for place, axis in enumerate(axes):
        weights = np.zeros(1 + len(axes))
        weights[1 + place] = 1.0
        exponents[axis] = Ratio(*rule._best(weights))
    lr = _rate(*(value + middle for value in rule._best(np.eye(1 + len(axes))[0])))
    bests = tuple(_cell_best(number, cell, used, middle, own_fit) for number, cell in enumerate(cells))
    return _moved(rule, exponents, lr, misses, bests, middle)


def _moved(
    rule: Rule, exponents: dict[str, Ratio], lr: Ratio, misses: float | None, cells: tuple[CellBest, ...], middle: float
) -> Rule:
    """The rule whose slopes are about a rate of 1, and no longer about the middle of the sweep."""
    from dataclasses import replace

    moved = np.eye(len(rule.theta))
    moved[1, 0] = -2 * middle
    return replace(
        rule,
        exponents=exponents,
        lr=lr,
        misses=misses,
        cells=cells,
        theta=moved @ rule.theta,
        covariance=moved @ rule.covariance @ moved.T,
    )


def _varying(centered: Floats) -> tuple[str, ...]:
    """The axes that vary, each beyond those before it: a sweep along D = 20 N cannot tell one from the other."""
    found: list[int] = []
    for axis in range(3):
        if np.linalg.matrix_rank(centered[:, [*found, axis]], tol=0.1) > len(found):
            found.append(axis)
    return tuple(AXES[axis] for axis in found)


def _least_squares(design: Floats, y: Floats, freedom: int) -> tuple[Floats, Floats, float]:
    inverse = np.linalg.pinv(design.T @ design)
    theta = inverse @ design.T @ y
    squares = float(np.sum((y - design @ theta) ** 2))
    return theta, inverse * squares / freedom, squares


def _curvature(value: float, variance: float, freedom: int) -> Ratio:
    from scipy.stats import t as student

    half = float(student.ppf(0.5 + LEVEL / 200, freedom)) * math.sqrt(variance)
    return Ratio(float(value), float(value) - half, float(value) + half)


def _f_test(extra: float, extra_freedom: int, squares: float, freedom: int) -> float:
    from scipy.stats import f as fisher

    if squares <= 0:
        return 1.0 if extra <= 0 else 0.0
    return float(fisher.sf(max(extra, 0.0) / extra_freedom / (squares / freedom), extra_freedom, freedom))


def _cell_best(
    number: int, cell: Hashable, used: Sequence[Point], middle: float, own: tuple[Floats, Floats, int] | None
) -> CellBest:
    members = [point for point in used if point.cell == cell]
    by_rate: dict[float, list[float]] = {}
    for point in members:
        by_rate.setdefault(point.lr, []).append(math.log(point.loss))
    rates = tuple(sorted(by_rate))
    measured = min(rates, key=lambda lr: float(np.mean(by_rate[lr])))
    best = Ratio(measured, 0.0, math.inf)
    if own is not None:
        theta, covariance, freedom = own
        places = [1 + number, 0]
        variance = covariance[np.ix_(places, places)] * np.array([[0.25, -0.5], [-0.5, 1.0]])
        value, low, high = fieller(-theta[1 + number] / 2, theta[0], variance, freedom)
        best = _rate(value + middle, low + middle, high + middle)
    edge = "low" if measured == rates[0] or best.value < rates[0] else ""
    edge = "high" if measured == rates[-1] or best.value > rates[-1] else edge
    first = members[0]
    return CellBest(cell, first.n_params, first.tokens, first.batch, rates, measured, best, edge)
