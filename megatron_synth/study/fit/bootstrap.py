"""Intervals of a fit: the law is fitted again to many sets of losses that could as well have been measured.

Few points (fewer than 20 per parameter): losses are made by the fitted law, with normal scatter. Its standard deviation is
drawn, too: s sqrt(F / chi2(F)), with s that of the residuals around the least-squares fit and F = M - P degrees of freedom. For
a law linear in its parameters the percentiles are then Student's t intervals, as wide as few points demand: this is what makes
them cover with four budgets and one seed (Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 12). It
takes all points to scatter alike, which `diagnostics` tests where seeds allow.

Many points, or rows in clusters: every point (cluster) gets a random weight. Weights are exponential (D. Rubin, Annals of
Statistics 9 (1981) 130-134): what drawing points with replacement does, as in Besiroglu et al. 2024, without draws that miss a
point altogether. The spread is widened by sqrt(M / (M - P)), as residuals at P fitted parameters are too small by that. Scatter
may differ between points. With G clusters it is sqrt(G / F) with F = G - P, times sqrt(F / chi2(F)) in every draw.

All draws are solved as one batch. docs/laws.md has the coverage on simulated studies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from megatron_synth.study.fit.catalog import AnyLaw
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.solvers.solve import Solver

LEVELS = (90, 95)  # percent
MANY_POINTS = 20  # per parameter, from which points are weighted and no scatter is assumed
LEAST_SQUARES = 1e6  # a delta of Huber's loss that no residual reaches
LARGEST_SCALE = 30.0  # of the scatter drawn for one degree of freedom: beyond it the quantiles do not change
FEWEST_CLUSTERS = 3
CENTRAL = (15.87, 84.13)  # percent: one standard deviation to both sides, were it normal
LONG_TAILS = 2.0
LARGEST = 600.0  # of theta: its exponential is a number still


def draw(
    solve: Solver,
    optima: Floats,
    delta: float,
    draws: int,
    seed: int,
    *,
    clusters: NDArray[np.int64] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Floats:
    """Theta [draws, P]; [0, P] where nothing is left to estimate the scatter from, so that no interval can be had.

    Args:
        solve: the solver of the law and its points.
        optima: [O, P], the optima of the fit to all points, best first: each draw starts from all and keeps the lowest.
        delta: of Huber's loss.
        draws: how many.
        seed: of the draws.
        clusters: number [M] of the cluster that each point is of; points of one depend on each other.
        progress: called with the number of solutions found since the last call.
    """
    points, parameters = len(solve.log_loss), optima.shape[1]
    if clusters is not None:
        count = int(clusters.max()) + 1
        if count < FEWEST_CLUSTERS:
            return np.zeros((0, parameters))
        return resample(solve, optima, delta, draw_weights(count, draws, seed)[:, clusters], progress, count, seed)
    if points <= parameters:
        return np.zeros((0, parameters))
    if points >= MANY_POINTS * parameters:
        return resample(solve, optima, delta, draw_weights(points, draws, seed), progress)
    return simulate(solve, optima, delta, draws, seed, progress)


def draw_weights(points: int, draws: int, seed: int) -> Floats:
    """Weights [draws, M] of M points, which sum to M in every draw."""
    weights = np.random.default_rng(seed).exponential(size=(draws, points))
    return np.asarray(weights * (points / weights.sum(axis=1, keepdims=True)))


def resample(
    solve: Solver,
    optima: Floats,
    delta: float,
    weights: Floats,
    progress: Callable[[int], object] | None = None,
    clusters: int | None = None,
    seed: int = 0,
) -> Floats:
    """Theta [draws, P] of the fit to points with weights [draws, M], its spread widened as the module says.

    clusters: how many there are; seed: of their draws of chi-squared. All else as in `draw`.
    """
    lowest = _lowest(solve, optima, delta, len(weights), progress, weights=weights)
    points, parameters = weights.shape[1], optima.shape[1]
    if clusters is None:
        return np.asarray(optima[0] + np.sqrt(points / max(points - parameters, 1)) * (lowest - optima[0]))
    freedom = max(clusters - parameters, 1)
    widening = np.sqrt(clusters / freedom) * _scales(freedom, len(weights), seed + 1)
    return np.asarray(optima[0] + widening[:, None] * (lowest - optima[0]))


def simulate(
    solve: Solver,
    optima: Floats,
    delta: float,
    draws: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> Floats:
    """Theta [draws, P] of the fit to losses that the law and its scatter made. Arguments as in `draw`."""
    points, parameters = len(solve.log_loss), optima.shape[1]
    freedom = points - parameters
    squares = 2 * float(solve(optima[:1], LEAST_SQUARES, tolerance=1e-14).objective[0])
    center = solve.law.log_predict(optima[0], solve.columns)
    scatter = np.sqrt(squares / freedom) * _scales(freedom, draws, seed)
    noise = np.random.default_rng(seed + 1).standard_normal((draws, points))
    return _lowest(solve, optima, delta, draws, progress, log_loss=center + scatter[:, None] * noise)


def _scales(freedom: int, draws: int, seed: int) -> Floats:
    """sqrt(F / chi2(F)) [draws]: how much larger the true scatter may be than the one that was estimated."""
    drawn = np.random.default_rng(seed).chisquare(freedom, draws)
    return np.asarray(np.minimum(np.sqrt(freedom / drawn), LARGEST_SCALE))


def _lowest(
    solve: Solver,
    optima: Floats,
    delta: float,
    draws: int,
    progress: Callable[[int], object] | None,
    *,
    weights: Floats | None = None,
    log_loss: Floats | None = None,
) -> Floats:
    """Theta [draws, P] of the lowest end of every draw, which starts from all optima."""
    kinds = len(optima)
    weights, log_loss = (None if values is None else np.repeat(values, kinds, axis=0) for values in (weights, log_loss))
    found = solve(np.tile(optima, (draws, 1)), delta, weights=weights, log_loss=log_loss, progress=progress)
    best = found.objective.reshape(draws, kinds).argmin(axis=1)
    lowest = found.theta.reshape(draws, kinds, -1)[np.arange(draws), best]
    return np.asarray(np.clip(lowest, -LARGEST, LARGEST))


def interval(samples: Floats, level: float) -> tuple[Floats, Floats]:
    """The percentile interval over the first axis, `level` in percent."""
    tail = (100 - level) / 2
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return low, high


def summary(
    law: AnyLaw, samples: Floats, undetermined: Collection[str] = ()
) -> tuple[dict[str, float], dict[str, dict[str, list[float]]], tuple[str, ...]]:
    """Standard errors by parameter, intervals by level and parameter, and the parameters whose error a few draws would rule.

    Args:
        law: the law.
        samples: theta [draws, P].
        undetermined: parameters that the points do not determine: they have neither.

    Returns:
        Errors are standard deviations. Of the parameters named last they are half the central 68 % instead: the standard
        deviation is more than twice that, and tells of the longest draws alone.
    """
    named = {name: values for name, values in law.to_params(samples).items() if name not in undetermined}
    errors, tails = {}, []
    for name, values in named.items():
        low, high = np.percentile(values, CENTRAL)
        with np.errstate(over="ignore", invalid="ignore"):
            spread, central = float(np.std(values, ddof=1)), float(high - low) / 2
        if not spread <= LONG_TAILS * central:
            tails.append(name)
        errors[name] = central if name in tails else spread
    intervals = {
        str(level): {name: [float(bound) for bound in interval(values, level)] for name, values in named.items()}
        for level in LEVELS
    }
    return errors, intervals, tuple(tails)
