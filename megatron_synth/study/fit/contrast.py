"""Does an arm fall behind the baseline as budgets grow? Its law held against the baseline's, not its loss against itself.

A plateau, a higher floor and a smaller exponent are collapse that no rising loss shows. All three make the gap to the baseline
grow with the budget. Three contrasts, each with its interval: the slope of the gap; the floors, at one exponent that both arms
share; the exponents, at one floor that both share. An arm that needs fewer tokens by a constant factor has the same floor and
exponent: its lead shrinks without any of them.

The noise is nowhere pooled as if equal: every cell (arm and budget) has the variance of its own seeds, and contrasts, which are
linear in the cells' means near the fit, have Welch's and Satterthwaite's degrees of freedom (F. Satterthwaite, Biometrics
Bulletin 2 (1946) 110-114). Cells with one seed have the pooled variance of their arm; where no cell has two, all have that of
the residuals around both laws, which holds only as far as the laws do.

Legend: M runs of both arms, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.fit import checked_losses
from megatron_synth.study.fit.laws import Floats, log_sum_exp, term_mean
from megatron_synth.study.fit.solvers.newton import solve

LEAST_SQUARES = 1e6  # a delta of Huber's loss that no residual reaches
SHARES, EXPONENTS = (-1.5, -0.4, -0.1), (0.1, 0.3, 0.7)  # starts: of the floor's part in the loss, and of the exponent
TYPICAL = {"E": 1.82, "B": 2085.0, "beta": 0.366}  # Besiroglu et al. 2024, for designs that have not run


@dataclass(frozen=True)
class Estimate:
    """A contrast of arm and baseline.

    value, interval: `level` percent, two-sided. p: one-sided, of "no worse than the baseline"; small is evidence of collapse.
    freedom: degrees of freedom of its error.
    """

    value: float
    interval: tuple[float, float]
    p: float
    freedom: float


@dataclass(frozen=True)
class Contrast:
    """How an arm does beside the baseline as the budget grows.

    gap: slope of log(loss / baseline's loss) per doubling of the budget, over the budgets that both have.
    floor: E / E of the baseline - 1, both laws having one exponent; None with fewer than three budgets of either.
    exponent: beta - beta of the baseline, both laws having one floor; None alike.
    last: log(loss / baseline's loss) at the largest common budget, an estimate whose p is of "no higher".
    noise: `seeds`, or `residuals` where no cell has two runs.
    """

    gap: Estimate
    floor: Estimate | None
    exponent: Estimate | None
    last: Estimate
    noise: str
    level: float


def contrast(
    tokens: ArrayLike, loss: ArrayLike, base_tokens: ArrayLike, base_loss: ArrayLike, *, level: float = 90
) -> Contrast:
    """Hold an arm against the baseline, at one model size.

    Args:
        tokens: of the arm's runs.
        loss: theirs, above 0.
        base_tokens: of the baseline's runs.
        base_loss: theirs.
        level: of the intervals, in percent.

    Raises:
        UserError: fewer than two budgets in common, or nothing to estimate the scatter from.
    """
    budgets = np.concatenate([np.asarray(tokens, dtype=np.float64), np.asarray(base_tokens, dtype=np.float64)])
    logs = np.log(np.concatenate([checked_losses(loss), checked_losses(base_loss)]))
    own = np.arange(len(logs)) < len(np.asarray(tokens))
    if budgets.shape != logs.shape or not (np.isfinite(budgets) & (budgets > 0)).all():
        raise UserError(f"contrast: expected {len(logs)} budgets above 0, one per loss")
    common = np.intersect1d(budgets[own], budgets[~own])
    if len(common) < 2:
        raise UserError("contrast: at least two budgets that both arms have are needed")
    both = np.isin(budgets, common)
    cells = np.unique(np.stack([own, budgets], axis=1), axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    designs = _designs(budgets, own)
    enough = min(len(np.unique(budgets[own])), len(np.unique(budgets[~own]))) >= 3
    # arm, baseline and the slope that both share, then the slope of the gap
    x = np.log2(budgets)
    linear = np.stack([own, ~own, _centered(x, common), _centered(x, common) * own], axis=1).astype(np.float64)[both]
    noise = _variances(logs, cells, own)
    of_laws = _residual_variance(logs, designs["own"] if enough else None) if noise is None else None
    if noise is None and of_laws is None:
        raise UserError("contrast: one seed and three budgets or fewer leave nothing to estimate the scatter from")
    variances = noise or tuple(np.full(len(logs), value) for value in of_laws or ())

    def estimate(slopes: Floats, chosen: NDArray[np.bool_], value: float, place: int, sign: float) -> Estimate:
        weights = np.linalg.pinv(slopes)[place]
        return _estimate(value, weights, cells[chosen], [part[chosen] for part in variances], of_laws, sign, level)

    everything = np.ones(len(logs), dtype=bool)
    gap = float((np.linalg.pinv(linear) @ logs[both])[3])
    last = both & (budgets == common[-1])
    means = np.stack([own, ~own], axis=1).astype(np.float64)[last]
    difference = np.linalg.pinv(means)
    weights = difference[0] - difference[1]
    found: dict[str, Estimate | None] = {"floor": None, "exponent": None}
    for name, sign in (("floor", 1.0), ("exponent", -1.0)):
        if not enough:
            continue
        design = designs[name]
        theta = _fit(design, logs)
        slopes = term_mean(log_sum_exp(design, theta[None])[1], design)[0]
        found[name] = estimate(slopes, everything, float(theta[-1]), len(theta) - 1, sign)
    floor = found["floor"]
    if floor is not None:  # of a logarithm
        floor = Estimate(float(np.expm1(floor.value)), _expm1(floor.interval), floor.p, floor.freedom)
    return Contrast(
        gap=estimate(linear, both, gap, 3, 1.0),
        floor=floor,
        exponent=found["exponent"],
        last=_estimate(
            float(weights @ logs[last]), weights, cells[last], [part[last] for part in variances], of_laws, 1.0, level
        ),
        noise="seeds" if noise is not None else "residuals",
        level=level,
    )


def floor_weights(budgets: Floats, own: NDArray[np.bool_]) -> Floats | None:
    """Weights [M] of the log losses in the floor's contrast, near laws of typical shape; None with fewer than three budgets.

    Args:
        budgets: [M] of the runs of both arms.
        own: [M], whether a run is of the arm.
    """
    if min(len(np.unique(budgets[own])), len(np.unique(budgets[~own]))) < 3:
        return None
    design = _designs(budgets, own)["floor"]
    theta = np.array([np.log(TYPICAL["E"]), np.log(TYPICAL["B"]), 0.0, TYPICAL["beta"], 0.0])
    slopes = term_mean(log_sum_exp(design, theta[None])[1], design)[0]
    return np.asarray(np.linalg.pinv(slopes)[-1])


def _centered(x: Floats, common: Floats) -> Floats:
    return np.asarray(x - np.log2(common).mean())


def _expm1(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = np.expm1(np.clip(bounds, -700, 700))
    return float(low), float(high)


def _designs(budgets: Floats, own: NDArray[np.bool_]) -> dict[str, Floats]:
    """Features [2, M, P] of the law E + B / D^beta of both arms; the last parameter is the contrast.

    `floor`: log E, log B, the arm's own log B, beta, then the arm's log E less the baseline's. `exponent` alike, with beta.
    `own`: everything of the arm's own.
    """
    one, log_d, mine = np.ones(len(budgets)), -np.log(budgets), own.astype(np.float64)
    zero = np.zeros(len(budgets))
    floor = {"E": one, "B": zero, "dB": zero, "beta": zero, "dbeta": zero, "dE": mine}
    data = {"E": zero, "B": one, "dB": mine, "beta": log_d, "dbeta": log_d * mine, "dE": zero}

    def design(*names: str) -> Floats:
        return np.stack([np.stack([term[name] for name in names], axis=1) for term in (floor, data)])

    return {
        "floor": design("E", "B", "dB", "beta", "dE"),
        "exponent": design("E", "B", "dB", "beta", "dbeta"),
        "own": design("E", "B", "dB", "beta", "dbeta", "dE"),
    }


def _fit(design: Floats, logs: Floats) -> Floats:
    """Theta [P] of least squares, the best of a few starts; the parameters are E, B, dB, beta and contrasts that start at 0."""
    center = design[1].mean(axis=0)
    starts = []
    for share in SHARES:
        for exponent in EXPONENTS:
            start = np.zeros(design.shape[2])
            start[0] = logs.min() + share
            start[3] = exponent
            start[1] = np.log(max(np.exp(logs.mean()) - np.exp(start[0]), 1e-3)) - exponent * center[3]
            starts.append(start)
    found = solve(design, logs, np.array(starts), LEAST_SQUARES, tolerance=1e-12)
    return np.asarray(found.theta[int(np.nanargmin(found.objective))])


def _variances(logs: Floats, cells: NDArray[np.int64], own: NDArray[np.bool_]) -> tuple[Floats, Floats] | None:
    """Variance of one run and its degrees of freedom, by run [M]; None where no cell has two runs."""
    counts = np.bincount(cells)
    means = np.bincount(cells, logs) / counts
    squares = np.bincount(cells, (logs - means[cells]) ** 2)
    if (counts < 2).all():
        return None
    arm_of = np.zeros(len(counts), dtype=bool)
    arm_of[cells] = own
    variance, freedom = np.zeros(len(counts)), np.zeros(len(counts))
    for cell in range(len(counts)):
        same = arm_of == arm_of[cell]
        pool = [cell] if counts[cell] > 1 else np.flatnonzero(same & (counts > 1)) if counts[same].max() > 1 else counts > 1
        freedom[cell] = (counts[pool] - 1).sum()
        variance[cell] = squares[pool].sum() / freedom[cell]
    return variance[cells], freedom[cells]


def _residual_variance(logs: Floats, design: Floats | None) -> tuple[float, float] | None:
    """Variance of one run around both arms' own laws, and its degrees of freedom; None if there are none."""
    if design is None or len(logs) <= design.shape[2]:
        return None
    theta = _fit(design, logs)
    freedom = len(logs) - design.shape[2]
    return float(np.sum((log_sum_exp(design, theta[None])[0][0] - logs) ** 2) / freedom), float(freedom)


def _estimate(
    value: float,
    weights: Floats,
    cells: NDArray[np.int64],
    variances: list[Floats],
    pooled: tuple[float, float] | None,
    sign: float,
    level: float,
) -> Estimate:
    """The estimate sum of weights x logs, of runs in cells; its variance is the sum of those of the cells."""
    from scipy.stats import t as student

    variance, freedom = variances
    numbers, first = np.unique(cells, return_index=True)
    parts = np.array([float(np.sum(weights[cells == number] ** 2)) for number in numbers]) * variance[first]
    total = float(parts.sum())
    if pooled is not None:
        degrees = pooled[1]
    else:
        degrees = total**2 / max(float(np.sum(parts**2 / freedom[first])), 1e-300) if total > 0 else float(freedom[first].min())
    error = float(np.sqrt(total))
    if error == 0:
        p = 0.5 if value == 0 else float(sign * value < 0)
        return Estimate(value, (value, value), p, degrees)
    reach = float(student.ppf(0.5 + level / 200, degrees)) * error
    return Estimate(value, (value - reach, value + reach), float(student.sf(sign * value / error, degrees)), degrees)
