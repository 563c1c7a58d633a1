"""The mixture of lowest predicted loss, and those that cannot be told from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.fit import ShareFit
from megatron_synth.study.search.space import CANDIDATES, Space

Objective = Callable[[Floats], Floats]
"""Losses [C] of mixtures [C, K]."""
STARTS = 16
_STEPS = (0.1, 0.03, 0.01, 0.003, 0.001)
_PARTS = (0.05, 0.15, 0.3, 0.6)


@dataclass(frozen=True)
class Optimum:
    """The best mixture by an objective.

    shares: [K]. loss: there.
    near: lowest and highest share by source among mixtures whose loss is within the noise of it.
    at_bound: sources whose share is at a bound, and what set it.
    """

    shares: Floats
    loss: float
    near: dict[str, tuple[float, float]]
    at_bound: dict[str, str]


def objective_of(
    fits: Mapping[str, ShareFit],
    how: str = "mean",
    *,
    weights: Mapping[str, float] | None = None,
    n_params: float | None = None,
    tokens: float | None = None,
) -> Objective:
    """What is to be as low as possible, from the laws of several domains.

    Args:
        fits: by domain; of one domain, or of an aggregate that was fitted as such, just that.
        how: `mean`, `worst` (the highest loss) or `weighted`.
        weights: by domain, with `weighted`; they are divided by their sum.
        n_params: size at which mixtures are compared, for laws that know it.
        tokens: budget, likewise.

    Raises:
        UserError: no domain, an unknown one, or weights that are none.
    """
    if not fits or how not in ("mean", "worst", "weighted"):
        raise UserError(f"target: expected mean, worst or weighted over one domain or more, got '{how}' over {len(fits)}")
    names = list(fits)
    shares = np.full(len(names), 1 / len(names))
    if how == "weighted":
        unknown = [name for name in weights or {} if name not in fits]
        if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise UserError(f"target: weights of {', '.join(names)} are needed, 0 or more, got {dict(weights or {})}")
        shares = np.array([weights.get(name, 0.0) for name in names]) / sum(weights.values())

    def objective(mixtures: Floats) -> Floats:
        losses = np.stack([fit.predict(fit.points.at(mixtures, n_params, tokens)) for fit in fits.values()])
        return np.asarray(losses.max(axis=0) if how == "worst" else shares @ losses)

    return objective


def minimize(space: Space, objective: Objective, *, noise: float, smooth: bool = True, seed: int = 0) -> Optimum:
    """The mixture of lowest objective in a space.

    From the best of many random mixtures, each improved by SciPy's SLSQP (Kraft 1988) where the objective is smooth, and by
    exchanges between two sources with steps down to a thousandth.

    Args:
        space: where to look.
        objective: what is to be low.
        noise: relative; mixtures whose loss is above the lowest by less are as good.
        smooth: whether it has slopes (trees have none).
        seed: of the random mixtures.
    """
    drawn = np.vstack([space.center, space.draw(CANDIDATES, seed)])
    losses = objective(drawn)
    starts = drawn[np.argsort(losses, kind="stable")[:STARTS]]
    ends = [_slsqp(space, objective, start) for start in starts] if smooth else list(starts)
    best = min(ends, key=lambda shares: float(objective(shares[None])[0]))
    best = _exchanged(space, objective, best)
    lowest = float(objective(best[None])[0])
    between = np.vstack([best + part * (drawn - best) for part in (*_PARTS, 1.0)])
    good = np.vstack([best, between[objective(between) <= lowest * (1 + noise)]])
    near = {name: (float(column.min()), float(column.max())) for name, column in zip(space.sources, good.T, strict=True)}
    at_bound = {}
    for place, name in enumerate(space.sources):
        if best[place] >= space.upper[place] - 5e-4 and space.upper[place] < 1:
            at_bound[name] = space.why.get(name, "as asked")
    return Optimum(best, lowest, near, at_bound)


def _slsqp(space: Space, objective: Objective, start: Floats) -> Floats:
    """A local minimum; slopes by differences, all sources in one call. The start where it finds nothing lower."""
    from scipy.optimize import minimize as scipy_minimize

    step = 1e-5
    shifts = step * np.eye(len(start))

    def value(shares: Floats) -> tuple[float, Floats]:
        inside = np.clip(shares, 0, 1)
        losses = objective(np.vstack([inside, inside + shifts]))
        return float(losses[0]), (losses[1:] - losses[0]) / step

    found = scipy_minimize(
        value,
        start,
        jac=True,
        method="SLSQP",
        bounds=list(zip(space.lower, space.upper, strict=True)),
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1, "jac": np.ones_like},
        options={"maxiter": 100, "ftol": 1e-9},
    )
    shares = np.clip(found.x, space.lower, space.upper)
    ended = np.isfinite(shares).all() and abs(shares.sum() - 1) < 1e-6
    return np.asarray(shares if ended and objective(shares[None])[0] <= objective(start[None])[0] else start)


def _exchanged(space: Space, objective: Objective, start: Floats) -> Floats:
    """A mixture that no exchange between two sources improves."""
    size = len(start)
    pairs = np.array([(one, other) for one in range(size) for other in range(size) if one != other])
    best, lowest = start, float(objective(start[None])[0])
    for step in _STEPS:
        for _ in range(200):
            room = np.minimum(space.upper[pairs[:, 0]] - best[pairs[:, 0]], best[pairs[:, 1]] - space.lower[pairs[:, 1]])
            amount = np.minimum(step, room)
            moved = np.tile(best, (len(pairs), 1))
            rows = np.arange(len(pairs))
            moved[rows, pairs[:, 0]] += amount
            moved[rows, pairs[:, 1]] -= amount
            losses = objective(moved)
            place = int(losses.argmin())
            if losses[place] >= lowest - 1e-12:
                break
            best, lowest = moved[place], float(losses[place])
    return best
