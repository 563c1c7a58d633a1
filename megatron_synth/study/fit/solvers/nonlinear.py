"""Laws whose terms are no exponentials of linear forms, and laws with parameters held fixed: fitted one start at a time.

`Law` has a batched Newton method for sums of log-linear terms. The laws here give log L and its slopes themselves, and SciPy's
trust-region least squares (Branch, Coleman and Li 1999) minimizes the same objective, the sum of w Huber(log L - log loss).
They have the members of `Law` that a fit uses, so that intervals, hold-outs and diagnostics are the same.

Legend: M points, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Columns, Floats, Law, checked_columns, named_parameters, theta_of
from megatron_synth.study.fit.solvers.newton import Solutions

ValueAndSlopes = Callable[[Floats, Mapping[str, Floats]], tuple[Floats, Floats]]
_STEPS = 400
_PRECISION = 1e-15


@dataclass(frozen=True)
class NonlinearLaw:
    """A law that gives log L [M] and its slopes [M, P] at theta [P].

    parameters: names in the order of theta. factors: those that stand in theta as logarithms.
    starts: starting values of each, in theta; all combinations are tried. Empty where `fit` makes them.
    fixed: values, as people give them, of parameters that are not fitted and not in `parameters`.
    bounds: of parameters that may run away where the points do not determine them, in theta.
    """

    name: str
    formula: str
    source: str
    parameters: tuple[str, ...]
    factors: frozenset[str]
    columns: tuple[str, ...]
    value: ValueAndSlopes
    starts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def check(self, columns: Columns) -> None:
        """UserError if a column is absent, or a value is outside its range."""
        checked_columns(self.name, self.columns, columns)

    def reduced(self, columns: Columns) -> NonlinearLaw:
        """This law; UserError where a column that it needs does not vary."""
        for column, values in checked_columns(self.name, self.columns, columns).items():
            if values.min() == values.max():
                raise UserError(f"law '{self.name}' needs points of different {column}; all {len(values)} have {values[0]:g}")
        return self

    def log_predict(self, theta: ArrayLike, columns: Columns) -> Floats:
        """log L of theta [P] or [S, P] at M points: [M] or [S, M]."""
        points = checked_columns(self.name, self.columns, columns)
        vectors = np.atleast_2d(np.asarray(theta, dtype=np.float64))
        values = np.stack([self.value(vector, points)[0] for vector in vectors])
        return np.asarray(values[0] if np.ndim(theta) == 1 else values)

    def predict(self, theta: ArrayLike, columns: Columns) -> Floats:
        """L of theta [P] or [S, P] at M points: [M] or [S, M]."""
        return np.asarray(np.exp(self.log_predict(theta, columns)))

    def gradient(self, theta: ArrayLike, columns: Columns) -> Floats:
        """d log L / d theta of theta [P] at M points: [M, P]."""
        vector = np.asarray(theta, dtype=np.float64)
        return self.value(vector, checked_columns(self.name, self.columns, columns))[1]

    def to_params(self, theta: ArrayLike) -> dict[str, Any]:
        """Theta [P] or [..., P] as named parameters, factors no longer as logarithms."""
        return named_parameters(self, theta)

    def to_theta(self, params: Mapping[str, float]) -> Floats:
        """The theta [P] of named parameters."""
        return theta_of(self, params)


def solve_each(
    law: NonlinearLaw,
    columns: Mapping[str, Floats],
    log_loss: Floats,
    starts: Floats,
    delta: float,
    *,
    weights: Floats | None = None,
    steps: int = _STEPS,
    progress: Callable[[int], object] | None = None,
) -> Solutions:
    """Minimize from every start [S, P], each with its own weights [S, M] and log losses [S, M] where they are given so."""
    from scipy.optimize import least_squares

    thetas, objectives, converged = [], [], []
    limits = np.array([law.bounds.get(name, (-np.inf, np.inf)) for name in law.parameters]).T
    for place, start in enumerate(starts):
        losses = log_loss[place] if log_loss.ndim == 2 else log_loss
        own = np.ones(len(losses)) if weights is None else weights[place]
        with np.errstate(over="ignore", invalid="ignore"):
            found = least_squares(
                lambda theta, losses=losses: np.nan_to_num(
                    law.value(theta, columns)[0] - losses, nan=1e3, posinf=1e3, neginf=-1e3
                ),
                np.clip(start, *limits),
                bounds=limits,
                jac=lambda theta: np.nan_to_num(law.value(theta, columns)[1]),
                loss=lambda squares, own=own: _weighted_huber(squares, own),
                f_scale=delta,
                x_scale="jac",
                ftol=_PRECISION,
                xtol=_PRECISION,
                gtol=_PRECISION,
                max_nfev=steps,
            )
        thetas.append(found.x)
        objectives.append(float(found.cost))
        converged.append(found.status > 0)
        if progress is not None:
            progress(1)
    return Solutions(np.array(thetas), np.array(objectives), np.array(converged))


def _weighted_huber(squares: Floats, weights: Floats) -> Floats:
    """w rho(z), its first and second derivative in z, where z are the squares of the residuals over delta: [3, M]."""
    roots = np.sqrt(np.maximum(squares, 1.0))
    outside = squares > 1
    value = np.where(outside, 2 * roots - 1, squares)
    slope = np.where(outside, 1 / roots, 1.0)
    curvature = np.where(outside, -0.5 / roots**3, 0.0)
    return np.asarray(weights * np.stack([value, slope, curvature]))


def with_fixed(law: Law | NonlinearLaw, fixed: Mapping[str, float]) -> NonlinearLaw:
    """A law with some parameters at given values; only the others are fitted.

    Args:
        law: any.
        fixed: value by parameter.

    Raises:
        UserError: a name is no parameter, a factor is not above 0, or nothing is left to fit.
    """
    unknown = [name for name in fixed if name not in law.parameters]
    if unknown:
        raise UserError(f"law '{law.name}' has no parameter '{unknown[0]}'; it has {', '.join(law.parameters)}")
    wrong = [name for name, value in fixed.items() if not np.isfinite(value) or (name in law.factors and value <= 0)]
    if wrong:
        raise UserError(f"parameter {wrong[0]}: expected {'a number above 0' if wrong[0] in law.factors else 'a number'}")
    free = tuple(name for name in law.parameters if name not in fixed)
    if not free:
        raise UserError(f"law '{law.name}': every parameter is fixed, nothing is left to fit")
    held = {name: float(np.log(value)) if name in law.factors else float(value) for name, value in fixed.items()}
    places = [law.parameters.index(name) for name in free]
    whole = np.array([held.get(name, 0.0) for name in law.parameters])

    def value(theta: Floats, columns: Mapping[str, Floats]) -> tuple[Floats, Floats]:
        vector = whole.copy()
        vector[places] = theta
        if isinstance(law, NonlinearLaw):
            log, slopes = law.value(vector, columns)
        else:
            log, slopes = law.log_predict(vector, columns), law.gradient(vector, columns)
        return log, slopes[:, places]

    told = ", ".join(f"{name} = {number:g}" for name, number in fixed.items())
    earlier = law.fixed if isinstance(law, NonlinearLaw) else {}
    return NonlinearLaw(
        name=law.name,
        formula=f"{law.formula}; {told}",
        source=law.source,
        parameters=free,
        factors=frozenset(law.factors & set(free)),
        columns=law.columns,
        value=value,
        fixed={**earlier, **fixed},
        bounds={name: ends for name, ends in (law.bounds if isinstance(law, NonlinearLaw) else {}).items() if name in free},
    )
