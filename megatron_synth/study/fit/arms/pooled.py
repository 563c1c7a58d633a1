"""The laws of several arms as one fit: parameters that all share, that each has of its own, or that are partially pooled.

A pooled parameter theta_g of arm g (a factor as its logarithm) has the prior Normal(mu, tau^2), mu being free. tau is the mode
of its posterior under a half-normal prior of scale `SPREAD`, found by expectation-maximization: arms that cannot be told apart
draw each other in, and such as differ keep what they have. All is least squares of the log loss, one scatter for all arms;
intervals are of Student's t by the curvature of the posterior (Gelman et al., Bayesian Data Analysis, 2013, chapters 5, 13).

Whether arms share a parameter at all is an F-test: all own against that one shared.

Legend: M runs, G arms, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.catalog import AnyLaw, law_named
from megatron_synth.study.fit.fit import checked_losses, race, start_grid
from megatron_synth.study.fit.laws import Columns, Floats, Law, log_sum_exp, term_mean
from megatron_synth.study.fit.solvers.newton import solve
from megatron_synth.study.fit.solvers.solve import Solver

SPREAD = 0.1
"""Scale of tau's prior: arms of one study differ by some per cent of a floor, and by some hundredths of an exponent."""
LEAST_SQUARES = 1e6  # a delta of Huber's loss that no residual reaches
LEVEL = 90.0
_ROUNDS, _SETTLED = 60, 1e-4
_SMALLEST = 1e-5  # of tau
_STARTS, _FINISH = 150, 8


@dataclass(frozen=True)
class Parameter:
    """A parameter of one arm.

    value, interval: 90 %; factors no longer as logarithms. own: its value in a fit of the arm alone.
    """

    value: float
    interval: tuple[float, float]
    own: float


@dataclass(frozen=True)
class SharedTest:
    """Do arms share a parameter? p: of "they do", by an F-test; freedom: its degrees. value: the shared one."""

    p: float
    freedom: tuple[int, int]
    value: float

    @property
    def differ(self) -> bool:
        """Whether the runs show that they do not, at 5 %."""
        return self.p < 0.05


@dataclass(frozen=True)
class Pooled:
    """The fit.

    arms: by name, parameters by name.
    tau: of pooled parameters, by name. tests: of shared and pooled ones, by name.
    scatter: standard deviation of log losses around the laws. runs: how many.
    """

    law: AnyLaw
    shared: tuple[str, ...]
    pooled: tuple[str, ...]
    arms: dict[str, dict[str, Parameter]]
    tau: dict[str, float]
    tests: dict[str, SharedTest]
    scatter: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        """As pooled.json holds it."""
        return {
            "law": self.law.name,
            "shared": list(self.shared),
            "pooled": list(self.pooled),
            "prior": {
                "mu": "flat",
                "tau": f"half-normal, scale {SPREAD:g}",
                "of": "logarithms of factors, exponents as they are",
            },
            "tau": self.tau,
            "tests_of_sharing": {name: {**one.__dict__, "differ": one.differ} for name, one in self.tests.items()},
            "arms": {arm: {name: dict(one.__dict__) for name, one in found.items()} for arm, found in self.arms.items()},
            "scatter": self.scatter,
            "runs": self.runs,
        }


def fit_arms(
    law: str,
    columns: Mapping[str, Columns],
    loss: Mapping[str, ArrayLike],
    *,
    shared: Sequence[str] = (),
    pooled: Sequence[str] = (),
) -> Pooled:
    """Fit one law to several arms.

    Args:
        law: `data`, `model`, `joint` or `tied`.
        columns: by arm, what the law needs, [M_g] each.
        loss: by arm, [M_g].
        shared: parameters that have one value for all arms.
        pooled: parameters that are partially pooled.

    Raises:
        UserError: fewer than two arms, a name that is no parameter or stands in both lists, or too few runs.
    """
    chosen = law_named(law)
    if not isinstance(chosen, Law) or chosen.optional:
        raise UserError(f"law '{law}' cannot be fitted to several arms at once: data, model, joint or tied")
    for name in (*shared, *pooled):
        if name not in chosen.parameters:
            raise UserError(f"law '{law}' has no parameter '{name}'; it has {', '.join(chosen.parameters)}")
    both = [name for name in shared if name in pooled]
    if both:
        raise UserError(f"parameter {both[0]}: share it or pool it, not both")
    if len(columns) < 2:
        raise UserError(f"laws of several arms need at least two, got {len(columns)}")
    problem = _Problem(chosen, columns, loss)
    own = problem.fit(())
    scatter = np.sqrt(own[1] / max(problem.size - own[2], 1))
    if problem.size <= own[2]:
        raise UserError(
            f"{problem.size} runs for {own[2]} parameters of {len(columns)} arms leave nothing to estimate the scatter from"
        )
    tests = {name: problem.test(name, own) for name in (*shared, *pooled)}
    theta, tau, covariance, freedom, scatter = problem.pool(tuple(shared), tuple(pooled), own[0], float(scatter))
    return Pooled(
        chosen,
        tuple(shared),
        tuple(pooled),
        problem.named(theta, covariance, freedom, tuple(shared), own[0]),
        tau,
        tests,
        scatter,
        problem.size,
    )


class _Problem:
    """The runs of all arms, and designs in which each parameter is shared or own."""

    def __init__(self, law: Law, columns: Mapping[str, Columns], loss: Mapping[str, ArrayLike]):
        self.law, self.arms = law, list(columns)
        parts, logs, arm_of = [], [], []
        self.starts: list[Floats] = []
        for place, arm in enumerate(self.arms):
            losses = checked_losses(loss[arm])
            values = {name: np.asarray(columns[arm][name], dtype=np.float64) for name in law.columns}
            law.check(values)
            reduced = law.reduced(values)
            assert reduced == law
            solver = Solver(law, values, np.log(losses))
            ends = race(solver, start_grid(law, values, np.log(losses), _STARTS), LEAST_SQUARES, _FINISH)
            self.starts.append(ends.theta[int(np.nanargmin(np.where(np.isfinite(ends.objective), ends.objective, np.nan)))])
            parts.append(law.design(values))
            logs.append(np.log(losses))
            arm_of.append(np.full(len(losses), place))
        self.design = np.concatenate(parts, axis=1)  # [K, M, parameters of the law]
        self.log_loss, self.arm_of = np.concatenate(logs), np.concatenate(arm_of)
        self.size = len(self.log_loss)

    def layout(self, shared: Sequence[str]) -> list[tuple[int, int]]:
        """(parameter, arm) of every place of theta; the arm is -1 where all share it."""
        places = []
        for number, name in enumerate(self.law.parameters):
            places += [(number, -1)] if name in shared else [(number, arm) for arm in range(len(self.arms))]
        return places

    def wide(self, shared: Sequence[str]) -> Floats:
        """Features [K, M, P] of all arms."""
        layout = self.layout(shared)
        result = np.zeros((*self.design.shape[:2], len(layout)))
        for place, (number, arm) in enumerate(layout):
            rows = self.arm_of == arm if arm >= 0 else np.ones(self.size, dtype=bool)
            result[:, rows, place] = self.design[:, rows, number]
        return result

    def start(self, shared: Sequence[str]) -> Floats:
        """Theta [P] made of the arms' own fits; a shared parameter starts at their median."""
        own = np.stack(self.starts)
        return np.array([np.median(own[:, number]) if arm < 0 else own[arm, number] for number, arm in self.layout(shared)])

    def fit(self, shared: Sequence[str]) -> tuple[Floats, float, int]:
        """Theta [P], the sum of squares, and P."""
        design = self.wide(shared)
        found = solve(design, self.log_loss, self.start(shared)[None], LEAST_SQUARES, iterations=300, tolerance=1e-13)
        return found.theta[0], 2 * float(found.objective[0]), design.shape[2]

    def test(self, name: str, own: tuple[Floats, float, int]) -> SharedTest:
        """All own against this one shared."""
        from scipy.stats import f as f_distribution

        theta, squares, parameters = self.fit((name,))
        extra, free = own[2] - parameters, self.size - own[2]
        gained = max(squares - own[1], 0.0) / extra
        p = float(f_distribution.sf(gained / (own[1] / free), extra, free)) if own[1] > 0 else float(gained == 0)
        place = self.layout((name,)).index((self.law.parameters.index(name), -1))
        value = float(np.exp(theta[place])) if name in self.law.factors else float(theta[place])
        return SharedTest(p, (extra, free), value)

    def pool(
        self, shared: tuple[str, ...], pooled: tuple[str, ...], own: Floats, scatter: float
    ) -> tuple[Floats, dict[str, float], Floats, float, float]:
        """Theta [P], tau by name, covariance [P, P], degrees of freedom, and the scatter."""
        layout, wide = self.layout(shared), self.wide(shared)
        parameters, terms = len(layout), wide.shape[0]
        places = {
            name: [layout.index((self.law.parameters.index(name), arm)) for arm in range(len(self.arms))] for name in pooled
        }
        # every pooled parameter has its mean as one more place, and a row of prior for each arm
        full = np.zeros((terms, self.size + len(pooled) * len(self.arms), parameters + len(pooled)))
        full[:, : self.size, :parameters] = wide
        targets, prior_of = [self.log_loss], []
        for number, name in enumerate(pooled):
            for arm, place in enumerate(places[name]):
                row = self.size + number * len(self.arms) + arm
                full[:, row, place], full[:, row, parameters + number] = 1.0, -1.0
                prior_of.append(name)
        targets.append(np.full(len(prior_of), np.log(terms)))  # all terms alike: their sum is that many of one
        log_loss = np.concatenate(targets)
        theta = np.concatenate([self.start(shared), np.zeros(len(pooled))])
        for number, name in enumerate(pooled):
            theta[parameters + number] = np.mean(theta[places[name]])
        tau = dict.fromkeys(pooled, SPREAD)
        freedom = float(self.size - parameters)
        covariance = np.eye(len(theta))
        for _ in range(_ROUNDS if pooled else 1):
            weights = np.concatenate([np.ones(self.size), [(scatter / tau[name]) ** 2 for name in prior_of]])
            found = solve(full, log_loss, theta[None], LEAST_SQUARES, weights=weights[None], iterations=300, tolerance=1e-13)
            theta = found.theta[0]
            predicted, shares = log_sum_exp(full, theta[None])
            slopes = term_mean(shares, full)[0] * np.sqrt(weights)[:, None]
            inverse = np.linalg.pinv(slopes.T @ slopes, hermitian=True)
            squares = float(np.sum((predicted[0, : self.size] - self.log_loss) ** 2))
            # degrees of freedom that the runs, not the priors, use
            used = float(np.trace(inverse @ (slopes[: self.size].T @ slopes[: self.size])))
            freedom = max(self.size - used, 1.0)
            scatter = float(np.sqrt(squares / freedom))
            covariance = scatter**2 * inverse
            before = dict(tau)
            for number, name in enumerate(pooled):
                mean = parameters + number
                apart = theta[places[name]] - theta[mean]
                variances = [
                    covariance[place, place] + covariance[mean, mean] - 2 * covariance[place, mean] for place in places[name]
                ]
                tau[name] = _mode(float(np.sum(apart**2) + np.sum(variances)), len(self.arms))
            if all(abs(tau[name] - before[name]) <= _SETTLED * before[name] for name in pooled):
                break
        return theta[:parameters], tau, covariance[:parameters, :parameters], freedom, scatter

    def named(
        self, theta: Floats, covariance: Floats, freedom: float, shared: tuple[str, ...], own: Floats
    ) -> dict[str, dict[str, Parameter]]:
        """Parameters by arm and name."""
        from scipy.stats import t as student

        reach = float(student.ppf(0.5 + LEVEL / 200, freedom)) * np.sqrt(np.maximum(np.diag(covariance), 0))
        layout, alone = self.layout(shared), self.layout(())
        result: dict[str, dict[str, Parameter]] = {}
        for arm, arm_name in enumerate(self.arms):
            result[arm_name] = {}
            for number, name in enumerate(self.law.parameters):
                place = layout.index((number, -1 if name in shared else arm))
                value, single = theta[place], own[alone.index((number, arm))]
                low, high = value - reach[place], value + reach[place]
                if name in self.law.factors:
                    value, single, low, high = np.exp(np.clip([value, single, low, high], -700, 700))
                result[arm_name][name] = Parameter(float(value), (float(low), float(high)), float(single))
        return result


def _mode(squares: float, arms: int) -> float:
    """The tau of highest density, given the expected sum of squared distances from the mean, under the half-normal prior."""
    less = arms - 1
    variance = SPREAD**2 / 2 * (-less + np.sqrt(less**2 + 4 * squares / SPREAD**2))
    return float(max(np.sqrt(variance), _SMALLEST))
