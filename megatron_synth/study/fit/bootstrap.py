"""Intervals of a fit: the law is fitted again to many sets of losses that could as well have been measured.

Few points (fewer than 20 per parameter): losses are made by the fitted law, with normal scatter. Its standard deviation is
drawn, too: s sqrt(F / chi2(F)), with s that of the residuals around the least-squares fit and F = M - P degrees of freedom. For
a law linear in its parameters the percentiles are then Student's t intervals, as wide as few points demand: this is what makes
them cover with four budgets and one seed (Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 12). It
takes all points to scatter alike, which `diagnostics` tests where seeds allow. Clusters that lie within one setting, such as
seeds that share the order of their text, are points here: all rows of one get one draw, of the scatter of the G clusters' means
with F = G - P, and the scatter inside clusters besides.

Many points, or clusters that span settings, such as checkpoints of one run: every point (cluster) gets a random weight.
Weights are exponential (D. Rubin, Annals of Statistics 9 (1981) 130-134): what drawing points with replacement does, as in
Besiroglu et al. 2024, without draws that miss a point altogether. The spread is widened by sqrt(M / (M - P)), as residuals at P
fitted parameters are too small by that. Scatter may differ between points. With clusters the factor and the degrees of freedom
are those of the cluster-robust variance of each parameter at the slopes of the law (Bell and McCaffrey, Survey Methodology 28
(2002) 169-181), the largest and the smallest of them: F is G - 1 where every cluster has all settings, and less where few
clusters tell a parameter. Every draw has its own sqrt(F / chi2(F)).

All draws are solved as one batch. docs/laws.md has the coverage on simulated studies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

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
        nested = within_settings(solve.columns, clusters)
        if count < FEWEST_CLUSTERS or (nested and count <= parameters):
            return np.zeros((0, parameters))
        if nested and count < MANY_POINTS * parameters:
            return simulate(solve, optima, delta, draws, seed, progress, clusters=clusters)
        return resample(solve, optima, delta, draw_weights(count, draws, seed)[:, clusters], progress, clusters, seed)
    if points <= parameters:
        return np.zeros((0, parameters))
    if points >= MANY_POINTS * parameters:
        return resample(solve, optima, delta, draw_weights(points, draws, seed), progress)
    return simulate(solve, optima, delta, draws, seed, progress)


def draw_weights(points: int, draws: int, seed: int) -> Floats:
    """Weights [draws, M] of M points, which sum to M in every draw."""
    weights = np.random.default_rng(seed).exponential(size=(draws, points))
    return np.asarray(weights * (points / weights.sum(axis=1, keepdims=True)))


def within_settings(columns: Mapping[str, Floats], clusters: NDArray[np.int64]) -> bool:
    """Whether all rows of every cluster have one setting: the same value in every column [M]."""
    rows = np.unique(np.stack(list(columns.values()), axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    return len(np.unique(np.stack([clusters, rows], axis=1), axis=0)) == int(clusters.max()) + 1


def resample(
    solve: Solver,
    optima: Floats,
    delta: float,
    weights: Floats,
    progress: Callable[[int], object] | None = None,
    clusters: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> Floats:
    """Theta [draws, P] of the fit to points with weights [draws, M], its spread widened as the module says.

    clusters: the number [M] of each point's; seed: of their draws of chi-squared. All else as in `draw`.
    """
    lowest = _lowest(solve, optima, delta, len(weights), progress, weights=weights)
    points, parameters = weights.shape[1], optima.shape[1]
    if clusters is None:
        return np.asarray(optima[0] + np.sqrt(points / max(points - parameters, 1)) * (lowest - optima[0]))
    widening, freedom = cluster_correction(solve.law.gradient(optima[0], solve.columns), clusters)
    return np.asarray(optima[0] + (widening * _scales(freedom, len(weights), seed + 1))[:, None] * (lowest - optima[0]))


def cluster_correction(slopes: Floats, clusters: NDArray[np.int64]) -> tuple[float, float]:
    """By how much draws with weighted clusters scatter too little, and the degrees of freedom that their scatter has.

    Both are those of the cluster-robust variance of every parameter, were all points independent and alike (Bell and McCaffrey
    2002): the factor of the parameter that needs most, the degrees of the one that has fewest. Exponential weights themselves
    lack a factor of (G + 1) / G in the variance.

    Args:
        slopes: of the predictions at the M points, [M, P].
        clusters: number [M] of each point's cluster.
    """
    scale = np.linalg.norm(slopes, axis=0)
    design = slopes[:, scale > 0] / scale[scale > 0]
    inverse = np.linalg.pinv(design.T @ design, hermitian=True)
    count = int(clusters.max()) + 1
    factor, freedom = 1.0, float(count - 1)
    for effect in (design @ inverse).T:  # [M]: what each point's error does to this parameter
        own = np.bincount(clusters, effect**2)
        carried = np.stack([np.bincount(clusters, effect * column) for column in design.T], axis=1)  # [G, P]
        spread = np.diag(own) - carried @ inverse @ carried.T
        seen = float(np.trace(spread))
        factor = max(factor, float(own.sum()) / max(seen, 1e-12 * float(own.sum())))
        freedom = min(freedom, seen**2 / float(np.sum(spread**2)))
    return float(np.sqrt(factor * (count + 1) / count)), freedom


def simulate(
    solve: Solver,
    optima: Floats,
    delta: float,
    draws: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
    clusters: NDArray[np.int64] | None = None,
) -> Floats:
    """Theta [draws, P] of the fit to losses that the law and its scatter made. Arguments as in `draw`.

    clusters: number [M] of each point's, where all points of one have one setting.
    """
    points, parameters = len(solve.log_loss), optima.shape[1]
    nearest = solve(optima[:1], LEAST_SQUARES, tolerance=1e-14)
    center = solve.law.log_predict(optima[0], solve.columns)
    random = np.random.default_rng(seed + 1)
    if clusters is None:
        freedom = points - parameters
        scatter = np.sqrt(2 * float(nearest.objective[0]) / freedom) * _scales(freedom, draws, seed)
        noise = scatter[:, None] * random.standard_normal((draws, points))
    else:
        residuals = solve.log_loss - solve.law.log_predict(nearest.theta[0], solve.columns)
        sizes = np.bincount(clusters)
        means = np.bincount(clusters, residuals) / sizes
        freedom = len(sizes) - parameters
        scatter = np.sqrt(float(np.sum(means**2)) / freedom) * _scales(freedom, draws, seed)
        inside = np.sqrt(float(np.sum((residuals - means[clusters]) ** 2)) / max(points - len(sizes), 1))
        own = inside * random.standard_normal((draws, points))
        own -= (np.stack([np.bincount(clusters, row) for row in own]) / sizes)[:, clusters]
        noise = own + (scatter[:, None] * random.standard_normal((draws, len(sizes))))[:, clusters]
    return _lowest(solve, optima, delta, draws, progress, log_loss=center + noise)


def _scales(freedom: float, draws: int, seed: int) -> Floats:
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
