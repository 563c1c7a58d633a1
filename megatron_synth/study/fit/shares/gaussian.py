"""A Gaussian process over mixtures: smooth in the square roots of the shares, with a length for each source.

Kernel: s^2 exp(-sum_i w_i^2 (x_i - x'_i)^2 / 2) + l^2 x . x' + noise, where x are the square roots of the shares (the first per
cent of a source moves a loss most) and the logarithms of N and D. Hyperparameters maximize the marginal likelihood with wide
normal priors on their logarithms (Rasmussen and Williams 2006, chapter 5). Losses are modeled as logarithms.

scikit-learn's regressor has no priors on hyperparameters, without which 17 lengths are not determined by 64 runs, and builds an
array of M x M x K for its gradients; this one needs products of matrices alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.points import Mixtures

_ITERATIONS, _WARM_ITERATIONS = 60, 8
_JITTER = 1e-8
_WEIGHT_SPREAD, _OTHER_SPREAD = 1.8, 3.0
"""Standard deviations of the priors, of logarithms."""
_REACH = 12.0
"""How far from its prior a logarithm may end."""


@dataclass(frozen=True)
class GaussianProcess:
    """The law; see `LAWS` for the interface."""

    name: str = "gaussian-process"
    formula: str = "log L ~ GP(sqrt(r), log N, log D)"
    source: str = "Rasmussen and Williams 2006; Chen et al. 2026 (olmix) compare it"
    parametric: bool = False
    needs: str | None = None

    def parameters(self, points: Mixtures) -> list[str]:
        """None: its hyperparameters are found by marginal likelihood."""
        return []

    def fit(self, points: Mixtures, log_loss: Floats, *, warm: Any = None, seed: int = 0) -> FittedProcess:
        """Fit to log losses [M]. warm: a fit to a larger part of the same table, whose hyperparameters are the start."""
        from scipy.optimize import minimize

        center, spread = _scaling(points)
        features = (_features(points) - center) / spread
        mean, deviation = float(log_loss.mean()), max(float(log_loss.std()), 1e-9)
        target = (log_loss - mean) / deviation
        prior = _prior(features.shape[1])
        found = minimize(
            lambda theta: _negative_likelihood(theta, features, target, prior),
            prior if warm is None else warm.theta,
            jac=True,
            method="L-BFGS-B",
            bounds=[(start - _REACH, start + _REACH) for start in prior],
            options={"maxiter": _ITERATIONS if warm is None else _WARM_ITERATIONS},
        )
        return FittedProcess(self, np.asarray(found.x), features, (center, spread), (mean, deviation), target, points)


@dataclass(frozen=True)
class FittedProcess:
    """A fitted process. theta: logarithms of K weights, s, noise and l."""

    law: GaussianProcess
    theta: Floats
    features: Floats = field(repr=False)
    scaling: tuple[Floats, Floats] = field(repr=False)
    outcome: tuple[float, float]
    target: Floats = field(repr=False)
    points: Mixtures = field(repr=False)

    def log_predict(self, points: Mixtures) -> Floats:
        """The logarithm [M] of the predicted loss."""
        between = _kernel(self.theta, self._scaled(points), self.features)
        return np.asarray(self.outcome[0] + self.outcome[1] * (between @ self._solved))

    def deviation(self, points: Mixtures) -> Floats:
        """Standard deviation [M] of the law's value, without the noise of a run, of log losses."""
        from scipy.linalg import solve_triangular

        scaled = self._scaled(points)
        explained = solve_triangular(self._factor, _kernel(self.theta, self.features, scaled), lower=True)
        weight, linear = np.exp(2 * self.theta[-3]), np.exp(2 * self.theta[-1])
        own = weight + linear * (scaled**2).sum(axis=1)
        return np.asarray(self.outcome[1] * np.sqrt(np.maximum(own - (explained**2).sum(axis=0), 1e-12)))

    def draws(self, points: Mixtures, count: int, seed: int) -> Floats:
        """Log losses [count, M], drawn from the process at all M mixtures together, without the noise of a run."""
        from scipy.linalg import solve_triangular

        scaled = self._scaled(points)
        explained = solve_triangular(self._factor, _kernel(self.theta, self.features, scaled), lower=True)
        values, axes = np.linalg.eigh(_kernel(self.theta, scaled, scaled) - explained.T @ explained)
        random = np.random.default_rng(seed).standard_normal((count, len(values)))
        around = (random * np.sqrt(np.maximum(values, 0))) @ axes.T
        return np.asarray(self.log_predict(points) + self.outcome[1] * around)

    @property
    def noise(self) -> float:
        """Standard deviation of log losses of runs around the law."""
        return float(self.outcome[1] * np.exp(self.theta[-2]))

    def with_run(self, point: Mixtures, log_loss: float) -> FittedProcess:
        """The process with one more run, hyperparameters as they are."""
        features = np.vstack([self.features, self._scaled(point)])
        target = np.append(self.target, (log_loss - self.outcome[0]) / self.outcome[1])
        return FittedProcess(self.law, self.theta, features, self.scaling, self.outcome, target, self.points)

    def to_json(self) -> dict[str, Any]:
        """Hyperparameters; the weight of a source says how fast the loss changes along its share."""
        names = [*self.points.sources, *self.points.scales]
        weights = np.exp(self.theta[: len(names)]) / self.scaling[1]
        return {"weights": dict(zip(names, map(float, weights), strict=True)), "noise": self.noise}

    def _scaled(self, points: Mixtures) -> Floats:
        return np.asarray((_features(points) - self.scaling[0]) / self.scaling[1])

    @cached_property
    def _solved(self) -> Floats:
        """The inverse covariance of the runs times what was measured: a search asks for thousands of predictions."""
        from scipy.linalg import cho_solve

        return np.asarray(cho_solve((self._factor, True), self.target))

    @cached_property
    def _factor(self) -> Floats:
        """The lower Cholesky factor of the covariance of the runs."""
        covariance = _kernel(self.theta, self.features, self.features)
        covariance[np.diag_indices_from(covariance)] += np.exp(2 * self.theta[-2]) + _JITTER
        return np.asarray(np.linalg.cholesky(covariance))


def _features(points: Mixtures) -> Floats:
    return np.column_stack([np.sqrt(points.shares), *points.scales.values()])


def _scaling(points: Mixtures) -> tuple[Floats, Floats]:
    """Center and spread of the features; a source that does not vary keeps its unit."""
    features = _features(points)
    spread = features.std(axis=0)
    return features.mean(axis=0), np.where(spread > 1e-9, spread, 1.0)


def _prior(features: int) -> Floats:
    weights = np.full(features, np.log(0.5 / np.sqrt(features)))
    return np.concatenate([weights, [0.0, np.log(0.05), np.log(0.1)]])


def _kernel(theta: Floats, first: Floats, second: Floats) -> Floats:
    """Covariance of the law's values, without noise."""
    return np.asarray(_smooth(theta, first, second) + np.exp(2 * theta[-1]) * (first @ second.T))


def _smooth(theta: Floats, first: Floats, second: Floats) -> Floats:
    one, other = first * np.exp(theta[:-3]), second * np.exp(theta[:-3])
    half = one @ other.T
    half -= 0.5 * (one**2).sum(axis=1)[:, None]
    half -= 0.5 * (other**2).sum(axis=1)
    np.minimum(half, 0, out=half)
    np.exp(half, out=half)
    return np.asarray(half * np.exp(2 * theta[-3]))


def _negative_likelihood(theta: Floats, features: Floats, target: Floats, prior: Floats) -> tuple[float, Floats]:
    """The negative logarithm of the posterior density, and its gradient.

    Slopes in the weights need sum_ij Q_ij (x_id - x_jd)^2 with Q symmetric, which is 2 (q . x_d^2 - x_d . Q x_d) with q the
    sums of Q's rows.
    """
    from scipy.linalg import lapack

    smooth = _smooth(theta, features, features)
    noise, linear = np.exp(2 * theta[-2]), np.exp(2 * theta[-1])
    covariance = smooth + linear * (features @ features.T)
    covariance[np.diag_indices_from(covariance)] += noise + _JITTER
    factor, wrong = lapack.dpotrf(covariance, lower=1)
    if wrong:
        return 1e10, np.zeros_like(theta)
    solved = lapack.dpotrs(factor, target, lower=1)[0]
    inverse = lapack.dpotri(factor, lower=1)[0]
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    spread = np.full(len(theta), _WEIGHT_SPREAD)
    spread[-3:] = _OTHER_SPREAD
    distance = (theta - prior) / spread**2
    value = 0.5 * target @ solved + np.log(np.diag(factor)).sum() + 0.5 * np.sum(distance * (theta - prior))
    outer = np.outer(solved, solved) - inverse
    weighted = outer * smooth
    scaled = features * np.exp(theta[:-3])
    gradient = np.empty_like(theta)
    gradient[:-3] = weighted.sum(axis=1) @ scaled**2 - ((weighted @ scaled) * scaled).sum(axis=0)
    gradient[-3] = -weighted.sum()
    gradient[-2] = -noise * np.trace(outer)
    gradient[-1] = -linear * np.sum((outer @ features) * features)
    return float(value), gradient + distance
