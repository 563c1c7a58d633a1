"""Which mixtures to run next, given those that were run."""

from __future__ import annotations

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.gaussian import FittedProcess, GaussianProcess
from megatron_synth.study.fit.shares.parametric import FittedParametric
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.search.optimum import minimize
from megatron_synth.study.search.space import CANDIDATES, Space

DESIGNS = ("space-filling", "expected-improvement", "d-optimal")
_LEAST_DISTANCE = 0.02
"""Of the square roots of shares, between a proposed mixture and every other."""


def expected_improvement(
    space: Space,
    points: Mixtures,
    loss: Floats,
    count: int,
    *,
    n_params: float | None = None,
    tokens: float | None = None,
    seed: int = 0,
) -> Floats:
    """Mixtures [count, K] that promise most to be better than the best so far.

    A Gaussian process says for each mixture how low its loss may be; expected improvement (Jones, Schonlau and Welch 1998) is
    over the lowest loss that the process predicts for a mixture that was run, as single runs are noisy. A batch is made by
    believing each proposal's prediction before the next is chosen (Ginsbourger, Le Riche and Carraro 2010).

    Args:
        space: where to look.
        points: the runs; M of at least three mixtures.
        loss: [M].
        count: how many.
        n_params: size at which mixtures are compared, where the runs differ in it.
        tokens: budget, likewise.
        seed: of candidates.
    """
    from scipy.stats import norm

    process = GaussianProcess().fit(points, np.log(loss), seed=seed)
    candidates = space.draw(CANDIDATES, seed)
    best = minimize(space, lambda shares: process.log_predict(points.at(shares, n_params, tokens)), noise=0.0, seed=seed)
    near = best.shares + np.array([0.05, 0.1, 0.2])[:, None, None] * (candidates[:500] - best.shares)
    candidates = np.vstack([best.shares, near.reshape(-1, len(space.sources)), candidates])
    at = points.at(candidates, n_params, tokens)
    runs = points.at(np.unique(points.shares, axis=0), n_params, tokens)
    taken = points.shares
    chosen: list[Floats] = []
    believed: FittedProcess = process
    for _ in range(count):
        mean, deviation = believed.log_predict(at), believed.deviation(at)
        gain = believed.log_predict(runs).min() - mean
        score = gain / deviation
        promise = gain * norm.cdf(score) + deviation * norm.pdf(score)
        promise[_distance(candidates, taken) < _LEAST_DISTANCE] = -np.inf
        place = int(promise.argmax())
        if not np.isfinite(promise[place]):
            raise UserError(f"no mixture is left that is not among those that were run or proposed ({len(taken)})")
        chosen.append(candidates[place])
        taken = np.vstack([taken, candidates[place]])
        believed = believed.with_run(points.at(candidates[place], n_params, tokens), float(mean[place]))
    return np.array(chosen)


def d_optimal(space: Space, count: int, *, taken: Floats, fitted: FittedParametric | None = None, seed: int = 0) -> Floats:
    """Mixtures [count, K] that determine the parameters of a law best, beside those that are there.

    Each is the one whose prediction is known least, which raises the determinant of the information most (Fedorov 1972). The
    law is a fitted one, by its slopes, or before there is one Scheffe's quadratic polynomial of the shares (1958).

    Args:
        space: where to look.
        count: how many.
        taken: [M, K] mixtures that were run or will be.
        fitted: a parametric law of shares alone.
        seed: of candidates.
    """
    candidates = space.draw(CANDIDATES, seed)

    def features(shares: Floats) -> Floats:
        if fitted is not None:
            return fitted.slopes(Mixtures(space.sources, shares))
        first, second = np.triu_indices(shares.shape[1], 1)
        return np.hstack([shares, shares[:, first] * shares[:, second]])

    known, offered = features(np.atleast_2d(taken)) if len(taken) else None, features(candidates)
    size = offered.shape[1]
    scale = np.maximum(np.abs(offered).max(axis=0), 1e-12)
    offered = offered / scale
    information = 1e-4 * np.eye(size)
    if known is not None:
        information += (known / scale).T @ (known / scale)
    inverse = np.linalg.inv(information)
    chosen: list[Floats] = []
    for _ in range(count):
        unknown = np.einsum("cp,pq,cq->c", offered, inverse, offered)
        unknown[_distance(candidates, np.vstack([np.atleast_2d(taken), *chosen])) < _LEAST_DISTANCE] = -np.inf
        place = int(unknown.argmax())
        chosen.append(candidates[place])
        column = inverse @ offered[place]
        inverse = inverse - np.outer(column, column) / (1 + unknown[place])
    return np.array(chosen)


def _distance(candidates: Floats, taken: Floats) -> Floats:
    """From each candidate [C] to the nearest mixture that is taken."""
    if not len(taken):
        return np.full(len(candidates), np.inf)
    roots, others = np.sqrt(np.maximum(candidates, 0)), np.sqrt(np.unique(taken, axis=0))
    squares = (roots**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * roots @ others.T
    return np.asarray(np.sqrt(np.maximum(squares.min(axis=1), 0)))
