"""Parametric laws over shares: sums of positive terms, fitted by robust least squares of the log loss.

Every law has more parameters than a small table can determine (17 sources: 17 to 36), so each parameter has a normal prior
around its start: a fit minimizes sum Huber(log L - log loss) + (prior / 2) |theta - start|^2, with a weight by law. Huber's
delta follows the scatter of the fit, so that single broken runs do not bend the law. The best of a few starts counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.fit.shares.terms import Bilinear, EffectivePower, EffectiveSum, Exponential, Scale, Term

ROBUST = 3.0
"""Delta of Huber's loss, in standard deviations of the residuals."""
_FLOORS = (0.8, 0.5)
"""Where the floor starts, as parts of the lowest loss."""
_STEPS = 100


@dataclass(frozen=True)
class ParametricLaw:
    """A law of `LAWS`; see `fit` there for its interface."""

    name: str
    formula: str
    source: str
    terms: tuple[Term, ...]
    """Of the mixture alone; terms in N and D are added by the table (`joint`)."""
    floor: bool = True
    scale_by_share: bool = False
    starts: int = 2
    prior: float = 1e-4
    """Weight of the prior beside the sum of squares: at 1e-4 a parameter one away from its start counts as an error of 1 %."""
    parametric: bool = True
    needs: str | None = None

    def joint(self, points: Mixtures) -> tuple[Term, ...]:
        """The terms for a table: with those in N and D where it has sizes and tokens."""
        centers = {name: float(logs.mean()) for name, logs in points.scales.items()}
        if isinstance(self.terms[0], Bilinear):
            sizes = [Scale(name, center) for name, center in centers.items() if name == "n_params"]
            return (Bilinear(centers.get("tokens")), *sizes)
        return (*self.terms, *(Scale(name, center, self.scale_by_share) for name, center in centers.items()))

    def parameters(self, points: Mixtures) -> list[str]:
        """Names of its parameters for such a table."""
        names = [name for term in self.joint(points) for name in term.names(points.sources)]
        return [*(["log E"] if self.floor else []), *names]

    def fit(self, points: Mixtures, log_loss: Floats, *, warm: Any = None, seed: int = 0) -> FittedParametric:
        """Fit to log losses [M]. warm: a fit to a larger part of the same table, whose optimum is the first start."""
        from scipy.optimize import least_squares

        terms = self.joint(points)
        random = np.random.default_rng(seed)
        starts = [self._start(terms, points, log_loss, part, random) for part in _FLOORS[: self.starts]]
        if not self.floor:
            starts = starts[:1]
        center = starts[0]
        if warm is not None:
            starts, center = [warm.theta], warm.center
        best = None
        for start in starts:
            scale = np.inf
            for _ in range(2):  # the second time with the scatter of the first
                found = least_squares(
                    lambda theta: _residuals(self, terms, theta, points, log_loss, center),
                    start,
                    jac=lambda theta: _slopes(self, terms, theta, points),
                    loss="linear" if np.isinf(scale) else "huber",
                    f_scale=1.0 if np.isinf(scale) else scale,
                    max_nfev=_STEPS,
                )
                residuals = found.fun[: len(points)]
                scale = max(ROBUST * 1.4826 * float(np.median(np.abs(residuals))), 1e-6)
                start = found.x
            if best is None or found.cost < best.cost:
                best = found
        assert best is not None
        return FittedParametric(self, terms, np.asarray(best.x), center, points, best.fun[: len(points)], scale)

    def _start(
        self, terms: Sequence[Term], points: Mixtures, log_loss: Floats, part: float, random: np.random.Generator
    ) -> Floats:
        if not self.floor:
            return np.concatenate([term.start(log_loss, points, random) for term in terms])
        floor = part * np.exp(log_loss.min())
        rest = np.log(np.exp(log_loss) - floor)
        return np.concatenate([[np.log(floor)], *(term.start(rest, points, random) for term in terms)])


@dataclass(frozen=True)
class FittedParametric:
    """A fitted parametric law; theta [P]."""

    law: ParametricLaw
    terms: tuple[Term, ...]
    theta: Floats
    center: Floats = field(repr=False)
    points: Mixtures = field(repr=False)
    residuals: Floats = field(repr=False)
    scale: float

    def log_predict(self, points: Mixtures) -> Floats:
        """The logarithm [M] of the predicted loss."""
        return _value(self.terms, self.law.floor, self.theta, points)[0]

    def slopes(self, points: Mixtures) -> Floats:
        """d log L / d theta, [M, P]."""
        return _value(self.terms, self.law.floor, self.theta, points)[1]

    def covariance(self) -> Floats:
        """Of theta [P, P], by least squares with the prior; not of the law being wrong."""
        slopes = self.slopes(self.points)
        bent = np.clip(self.residuals, -self.scale, self.scale)
        variance = float(np.sum(bent**2)) / max(len(bent) - len(self.theta), 1)
        return np.asarray(variance * np.linalg.inv(slopes.T @ slopes + self.law.prior * np.eye(len(self.theta))))

    def draws(self, points: Mixtures, count: int, seed: int) -> Floats:
        """Log losses [count, M] of laws that could as well be the right one: theta is drawn by its covariance."""
        values, axes = np.linalg.eigh(self.covariance())
        random = np.random.default_rng(seed).standard_normal((count, len(values)))
        thetas = self.theta + (random * np.sqrt(np.maximum(values, 0))) @ axes.T
        with np.errstate(over="ignore", invalid="ignore"):
            return np.stack([_value(self.terms, self.law.floor, theta, points)[0] for theta in thetas])

    def to_json(self) -> dict[str, Any]:
        """Parameters with their standard errors."""
        errors = np.sqrt(np.diag(self.covariance()))
        names = self.law.parameters(self.points)
        found = {name: [float(value), float(error)] for name, value, error in zip(names, self.theta, errors, strict=True)}
        return {"parameters": found, "centers": {term.column: term.center for term in self.terms if isinstance(term, Scale)}}


def _value(terms: Sequence[Term], floor: bool, theta: Floats, points: Mixtures) -> tuple[Floats, Floats]:
    """log L [M] and its slopes [M, P]."""
    logs, blocks, at = [], [], 0
    if floor:
        logs.append(np.full(len(points), theta[0]))
        blocks.append(np.ones((len(points), 1)))
        at = 1
    for term in terms:
        count = len(term.names(points.sources))
        log, slopes = term.value(theta[at : at + count], points)
        logs.append(log)
        blocks.append(slopes)
        at += count
    stacked = np.stack(logs)
    highest = stacked.max(axis=0)
    parts = np.exp(stacked - highest)
    total = parts.sum(axis=0)
    parts /= total
    return highest + np.log(total), np.hstack([part[:, None] * block for part, block in zip(parts, blocks, strict=True)])


def _residuals(
    law: ParametricLaw, terms: Sequence[Term], theta: Floats, points: Mixtures, log_loss: Floats, center: Floats
) -> Floats:
    """Residuals [M], then what the prior adds [P]."""
    with np.errstate(over="ignore", invalid="ignore"):
        residuals = _value(terms, law.floor, theta, points)[0] - log_loss
    return np.concatenate([np.nan_to_num(residuals, nan=1e3, posinf=1e3), np.sqrt(law.prior) * (theta - center)])


def _slopes(law: ParametricLaw, terms: Sequence[Term], theta: Floats, points: Mixtures) -> Floats:
    return np.vstack([_value(terms, law.floor, theta, points)[1], np.sqrt(law.prior) * np.eye(len(theta))])


PARAMETRIC = (
    ParametricLaw(
        name="log-linear",
        formula="log L = t . r",
        source="olmix, arXiv 2602.12237, without its constant",
        terms=(Exponential(),),
        floor=False,
    ),
    ParametricLaw(
        name="exponential",
        formula="L = E + exp(t . r)",
        source="Ye et al. 2024, arXiv 2403.16952; olmix's log-linear law (arXiv 2602.12237) is the same",
        terms=(Exponential(),),
        scale_by_share=True,
        prior=1e-6,
    ),
    ParametricLaw(
        name="exponential-2",
        formula="L = E + exp(t1 . r) + exp(t2 . r)",
        source="Ye et al. 2024, arXiv 2403.16952, with two implicit domains",
        terms=(Exponential(0.5, 1.0), Exponential(0.5, 1.0)),
        scale_by_share=True,
        prior=1e-6,
    ),
    ParametricLaw(
        name="power",
        formula="L = E + (d + c . r)^-beta",
        source="ours: a power law in the effective share",
        terms=(EffectivePower(),),
        prior=1e-5,
    ),
    ParametricLaw(
        name="bimix",
        formula="L = (C + B / D^beta) (d + c . r)^-alpha",
        source="Ge et al. 2024, arXiv 2405.14908; weights of other sources and d are ours",
        terms=(Bilinear(None),),
        floor=False,
    ),
    ParametricLaw(
        name="additive",
        formula="L = E + 1 / (d + sum_i c_i r_i^gamma_i)",
        source="Shukor et al. 2025, arXiv 2507.09404; d is ours",
        terms=(EffectiveSum(),),
    ),
)
