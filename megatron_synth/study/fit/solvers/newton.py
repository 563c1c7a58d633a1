"""Many Huber fits at once: a damped Newton method over a batch of starts or of bootstrap weights.

The objective is that of Hoffmann et al. 2022 as Besiroglu et al. 2024 sum it: sum over points of w Huber(log L - log loss),
Huber(r) = r^2 / 2 up to |r| = delta and delta (|r| - delta / 2) beyond. Where most residuals are beyond delta, its Newton
model holds only nearby, as few points bend it. So the steps are damped with the curvature of the reweighted least squares
(w min(1, delta / |r|)), which bounds Huber from above: large damping gives small steps of that safe method, damping near 0
Newton's quadratic end.
Both matrices transform with the parameters, so scales and correlations (A against alpha) do not matter.

Legend: M points, S fits, P parameters, K terms.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_synth.study.fit.laws import Floats, log_sum_exp, term_mean

CHUNK = 128  # fits handled together, so that a chunk's arrays stay in the cache
FOR_THREADS = 2**22  # numbers in the features of all fits, below which threads cost more than they save
LONGEST_STEP = 4.0  # of any internal parameter, in one step
RIDGE = 1e-12  # of the diagonal, against directions without any curvature
STEEPEST, FLATTEST = 1e8, 1e-8  # bounds of the damping


@dataclass(frozen=True)
class Solutions:
    """theta [S, P], objective [S], and whether each converged [S]."""

    theta: Floats
    objective: Floats
    converged: NDArray[np.bool_]


def huber(residuals: Floats, delta: float) -> Floats:
    """Huber's loss, elementwise: r^2 / 2 up to delta, then delta (|r| - delta / 2)."""
    size = np.abs(residuals)
    inside = np.minimum(size, delta)
    return inside * (size - inside / 2)


def objective(design: Floats, log_loss: Floats, theta: Floats, delta: float, weights: Floats | None = None) -> Floats:
    """The objective [S] of theta [S, P] on log losses [M] or [S, M], with weights [M] or [S, M] (default 1)."""
    losses = huber(log_sum_exp(design, theta)[0] - log_loss, delta)
    total: Floats = (losses if weights is None else losses * weights).sum(axis=1)
    return total


def objective_gradient(
    design: Floats, log_loss: Floats, theta: Floats, delta: float, weights: Floats | None = None
) -> tuple[Floats, Floats]:
    """The objective [S] and its gradient [S, P]."""
    predicted, shares = log_sum_exp(design, theta)
    residuals = predicted - log_loss
    slope, losses = np.clip(residuals, -delta, delta), huber(residuals, delta)
    if weights is not None:
        slope, losses = slope * weights, losses * weights
    gradient: Floats = np.einsum("sm,smp->sp", slope, term_mean(shares, design))
    return losses.sum(axis=1), gradient


def solve(
    design: Floats,
    log_loss: Floats,
    starts: Floats,
    delta: float,
    *,
    weights: Floats | None = None,
    iterations: int = 100,
    tolerance: float = 1e-10,
    progress: Callable[[int], object] | None = None,
) -> Solutions:
    """Minimize from every start.

    Args:
        design: features [K, M, P].
        log_loss: [M], or [S, M] where each fit has its own.
        starts: [S, P].
        delta: of Huber's loss.
        weights: [S, M], such as how often a bootstrap drew each point.
        iterations: at most so many steps of each fit.
        tolerance: converged when the decrease that the model expects is below this part of the objective.
        progress: called with the number of fits that are done since the last call.
    """
    blocks = [slice(first, first + CHUNK) for first in range(0, len(starts), CHUNK)]

    def one(block: slice) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        own_losses = log_loss[block] if log_loss.ndim == 2 else log_loss
        own_weights = None if weights is None else weights[block]
        with np.errstate(over="ignore", invalid="ignore"):
            result = _newton(design, own_losses, starts[block], delta, own_weights, iterations, tolerance)
        if progress is not None:
            progress(len(starts[block]))
        return result

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(blocks) == 1 or workers == 1 or design.size * len(starts) < FOR_THREADS:
        parts = list(map(one, blocks))
    else:
        with ThreadPoolExecutor(max_workers=workers) as pool:
            parts = list(pool.map(one, blocks))
    theta, values, converged = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Solutions(theta, values, converged)


def _newton(
    design: Floats,
    log_loss: Floats,
    starts: Floats,
    delta: float,
    weights: Floats | None,
    iterations: int,
    tolerance: float,
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """One chunk of `solve`; fits that have converged leave the computation."""
    theta = starts.copy()
    size, parameters = theta.shape
    values = objective(design, log_loss, theta, delta, weights)
    damping = np.full(size, 1.0)
    growth = np.full(size, 2.0)
    converged = np.zeros(size, dtype=bool)
    active = np.flatnonzero(np.isfinite(values))
    diagonal = np.arange(parameters)
    for _ in range(iterations):
        if not len(active):
            break
        own_losses = log_loss[active] if log_loss.ndim == 2 else log_loss
        own_weights = None if weights is None else weights[active]
        gradient, newton, majorant = curvature(design, own_losses, theta[active], delta, own_weights)
        scale = np.einsum("spp->sp", majorant)
        matrix = newton + damping[active, None, None] * majorant
        matrix[:, diagonal, diagonal] += RIDGE * scale + 1e-300 + 1e-14 * scale.max(axis=1, keepdims=True)
        step = -_solve_each(matrix, gradient)
        longest = np.abs(step).max(axis=1, keepdims=True)
        step *= np.minimum(1.0, LONGEST_STEP / np.maximum(longest, 1e-300))
        trial = theta[active] + step
        value = objective(design, own_losses, trial, delta, own_weights)
        expected = -(np.einsum("sp,sp->s", gradient, step) + np.einsum("sp,spq,sq->s", step, newton, step) / 2)
        gain = values[active] - value
        better = gain > 0
        good = better & (gain > 0.5 * np.abs(expected))
        accepted = active[better]
        theta[accepted], values[accepted] = trial[better], value[better]
        damping[active[good]] *= 0.2
        damping[active[~better]] *= growth[active[~better]]
        growth[active[better]] = 2.0
        growth[active[~better]] *= 2.0
        np.clip(damping, FLATTEST, STEEPEST, out=damping)
        # how much the safe method could still gain; at most damping's bound, nothing can be gained at this precision
        slope = np.abs(np.einsum("sp,sp->s", gradient, step))
        limit = tolerance * np.abs(values[active]) + 1e-30
        done = (slope < limit) | (~better & (damping[active] >= STEEPEST))
        converged[active[done]] = True
        active = active[~done]
    return theta, values, converged


def _solve_each(matrices: Floats, vectors: Floats) -> Floats:
    """The solution [S, P] of every system [S, P, P]; zero for one that is singular, whose damping then grows."""
    try:
        return np.asarray(np.linalg.solve(matrices, vectors[:, :, None])[:, :, 0], dtype=np.float64)
    except np.linalg.LinAlgError:
        solutions = np.zeros_like(vectors)
        for position, (matrix, vector) in enumerate(zip(matrices, vectors, strict=True)):
            try:
                solutions[position] = np.linalg.solve(matrix, vector)
            except np.linalg.LinAlgError:
                continue
        return solutions


def curvature(
    design: Floats, log_loss: Floats, theta: Floats, delta: float, weights: Floats | None = None
) -> tuple[Floats, Floats, Floats]:
    """Gradient [S, P], Newton matrix [S, P, P] and reweighted least squares' [S, P, P] of the objective.

    The Newton matrix is exact: the second derivative of a log-sum-exp of linear forms is the covariance of the features under
    the terms' shares.
    """
    predicted, shares = log_sum_exp(design, theta)
    residuals = predicted - log_loss
    size = np.abs(residuals)
    slope = np.clip(residuals, -delta, delta)
    inside = (size <= delta).astype(np.float64)
    safe = delta / np.maximum(size, delta)
    if weights is not None:
        slope, inside, safe = slope * weights, inside * weights, safe * weights
    mean = term_mean(shares, design)  # [S, M, P]
    turned = mean.transpose(0, 2, 1)
    gradient = np.matmul(turned, slope[:, :, None])[:, :, 0]
    newton: Floats = np.matmul(turned, mean * (inside - slope)[:, :, None])
    for share, features in zip(shares, design, strict=True):
        used = np.flatnonzero(features.any(axis=0))
        products = features[:, used, None] * features[:, None, used]  # [M, U, U]
        block = np.matmul(slope * share, products.reshape(len(features), -1)).reshape(-1, len(used), len(used))
        newton[:, used[:, None], used[None, :]] += block
    majorant: Floats = np.matmul(turned, mean * safe[:, :, None])
    return gradient, newton, majorant
