"""Intervals of a fit by the Bayesian bootstrap: every point gets a random weight, and the law is fitted again to each draw.

Weights are exponential (D. Rubin, Annals of Statistics 9 (1981) 130-134): what drawing points with replacement does, as in
Besiroglu et al. 2024, without draws that miss a point altogether, which in a small design may be all that determines a
parameter. All draws share one design and are solved as one batch. The spread is widened by sqrt(M / (M - P)), as residuals at
P fitted parameters are too small by that. docs/laws.md has the coverage on simulated studies.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_synth.study.fit.catalog import AnyLaw
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.solver import Solver

LEVELS = (90, 95)  # percent


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
) -> Floats:
    """Theta [draws, P] of the fit to every draw, its spread around the fit to all points widened as the module says.

    Args:
        solve: the solver of the law and its points.
        optima: [O, P], the optima of the fit to all points, best first: each draw starts from all and keeps the lowest.
        delta: of Huber's loss.
        weights: [draws, M].
        progress: called with the number of solutions found since the last call.
    """
    draws, kinds = len(weights), len(optima)
    starts = np.tile(optima, (draws, 1))
    found = solve(starts, delta, weights=np.repeat(weights, kinds, axis=0), progress=progress)
    best = found.objective.reshape(draws, kinds).argmin(axis=1)
    lowest = found.theta.reshape(draws, kinds, -1)[np.arange(draws), best]
    points, parameters = weights.shape[1], optima.shape[1]
    return np.asarray(optima[0] + np.sqrt(points / max(points - parameters, 1)) * (lowest - optima[0]))


def interval(samples: Floats, level: float) -> tuple[Floats, Floats]:
    """The percentile interval over the first axis, `level` in percent."""
    tail = (100 - level) / 2
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return low, high


def summary(law: AnyLaw, samples: Floats) -> tuple[dict[str, float], dict[str, dict[str, list[float]]]]:
    """Standard errors by parameter, and intervals by level and parameter, of theta [draws, P]."""
    named = law.to_params(samples)
    errors = {name: float(np.std(values, ddof=1)) for name, values in named.items()}
    intervals = {
        str(level): {name: [float(bound) for bound in interval(values, level)] for name, values in named.items()}
        for level in LEVELS
    }
    return errors, intervals
