"""A larger run predicted from smaller ones: the loss, the interval of what will be measured, and the law that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import compact, human
from megatron_synth.study.fit.bootstrap import interval
from megatron_synth.study.fit.fit import Fit, fit
from megatron_synth.study.fit.laws import N_PARAMS, TOKENS, Floats
from megatron_synth.study.fit.noise import noise_floor

LEVEL = 90.0
LAWS = ("data", "joint", "model", "tied")
"""That can forecast, and what `--law` takes."""
_ENOUGH = 3
_STARTS = 600
_ENOUGH_FREEDOM = 4
"""Degrees of freedom from which the scatter of the arm's own seeds is used."""
SAME = 0.01
"""Budgets are whole steps and sizes whole layers: within this fraction they are the same."""


class Measured(Protocol):
    """What a forecast needs to know of a finished run."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def arm(self) -> str:
        """The mixture."""

    @property
    def n_params(self) -> int:
        """Non-embedding parameters."""

    @property
    def tokens(self) -> int:
        """Tokens trained on."""

    @property
    def loss(self) -> float:
        """The study's aggregate."""

    @property
    def epochs(self) -> float:
        """How often it saw the source that it repeated most."""


@dataclass(frozen=True)
class Target:
    """What is predicted: the mean loss of `runs` runs, which differ in the seed, at one arm, size and budget."""

    arm: str
    size: str
    n_params: int
    tokens: int
    runs: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.arm} at {self.size} and {compact(self.tokens)} tokens"

    def holds(self, row: Measured) -> bool:
        """Whether a run is one of those that are predicted."""
        near = abs(row.n_params / self.n_params - 1) < SAME and abs(row.tokens / self.tokens - 1) < SAME
        return row.arm == self.arm and near


@dataclass(frozen=True)
class Prediction:
    """What a law says of a target.

    interval: of the mean loss of the target's runs, `LEVEL` percent: the law's own and the scatter between seeds.
    law_interval: of the law's value alone.
    noise: standard deviation of log loss between seeds, or around the law where there are none (`noise_from`).
    beyond: how many times larger than the largest run fitted to, by column of the law.
    """

    target: Target
    law: Fit
    loss: float
    interval: tuple[float, float]
    law_interval: tuple[float, float]
    noise: float
    noise_from: str
    beyond: dict[str, float]
    ids: tuple[str, ...]

    @property
    def doubts(self) -> tuple[str, ...]:
        """Codes of what speaks against the law."""
        return tuple(dict.fromkeys(warning.code for warning in self.law.warnings))


def smaller(rows: Sequence[Measured], target: Target) -> list[Measured]:
    """The runs of the target's arm that are no larger in size or budget, and smaller in one of them."""
    top = target.n_params * (1 + SAME), target.tokens * (1 + SAME)
    own = [row for row in rows if row.arm == target.arm and row.n_params <= top[0] and row.tokens <= top[1]]
    return [row for row in own if not target.holds(row)]


def predict(
    rows: Sequence[Measured], target: Target, *, law: str | None = None, bootstraps: int = 1000, seed: int = 0
) -> Prediction:
    """Predict a target from the smaller runs of its arm.

    Without a choice the law is L(D) at the target's size where it has four smaller budgets; else L(N, D), where there are
    three sizes and budgets; else L(D) from three budgets, L(N) at the target's budget, or L(N, D) with one exponent.

    Args:
        rows: finished runs; those of the target and larger ones are left out.
        target: what to predict.
        law: one of `LAWS`.
        bootstraps: draws behind the intervals.
        seed: of the draws.

    Raises:
        UserError: there are too few smaller runs for any law, or they give it no interval.
    """
    own = smaller(rows, target)
    name, used = choose_law(own, target, law)
    columns = {N_PARAMS: [row.n_params for row in used], TOKENS: [row.tokens for row in used]}
    found = fit(
        name,
        {column: np.asarray(values, dtype=np.float64) for column, values in columns.items()},
        [row.loss for row in used],
        starts=_STARTS,
        bootstraps=bootstraps,
        seed=seed,
        epochs=[row.epochs for row in used],
    )
    point = {N_PARAMS: np.array([float(target.n_params)]), TOKENS: np.array([float(target.tokens)])}
    at = {column: point[column] for column in found.law.columns}
    if len(found.theta_samples) < 2 or not found.determines(at)[0]:
        raise UserError(
            f"{target.name}: the law '{name}' has no interval there: {len(used)} runs do not determine it; run more budgets, "
            "sizes or seeds"
        )
    curve = found.predict_samples(at)[:, 0]
    noise, freedom, source = _noise(rows, used, found)
    scattered = curve * np.exp(_scatter(noise, freedom, target.runs, len(curve), seed))
    return Prediction(
        target=target,
        law=found,
        loss=float(found.predict(at)[0]),
        interval=_bounds(scattered),
        law_interval=_bounds(curve),
        noise=noise,
        noise_from=source,
        beyond={column: float(at[column][0] / found.columns[column].max()) for column in found.law.columns},
        ids=tuple(sorted(row.id for row in used)),
    )


def _bounds(values: Floats) -> tuple[float, float]:
    low, high = interval(values, LEVEL)
    return float(low), float(high)


def choose_law(own: Sequence[Measured], target: Target, wanted: str | None = None) -> tuple[str, list[Measured]]:
    """The law for a target, and the runs that it is fitted to, of those of `smaller`.

    Raises:
        UserError: there are too few.
    """
    here = [row for row in own if abs(row.n_params / target.n_params - 1) < SAME]
    now = [row for row in own if abs(row.tokens / target.tokens - 1) < SAME]
    sizes, budgets = len({row.n_params for row in own}), len({row.tokens for row in own})
    own_budgets, own_sizes = len({row.tokens for row in here}), len({row.n_params for row in now})
    possible: list[tuple[bool, str, Sequence[Measured]]] = [
        (own_budgets > _ENOUGH, "data", here),
        (sizes >= _ENOUGH and budgets >= _ENOUGH, "joint", own),
        (own_budgets == _ENOUGH, "data", here),
        (own_sizes >= _ENOUGH, "model", now),
        (sizes > 1 and budgets >= _ENOUGH, "tied", own),
    ]
    for enough, name, rows in possible:
        if enough and wanted in (None, name):
            return name, list(rows)
    raise UserError(
        f"{target.name}: {f'too few smaller runs for the law {wanted!r}' if wanted else 'too few smaller runs for any law'}: "
        f"{own_budgets} budgets at {human(target.n_params)} parameters, {own_sizes} sizes at {compact(target.tokens)} tokens, "
        f"{sizes} sizes and {budgets} budgets in all; three of one are needed"
    )


def _noise(rows: Sequence[Measured], used: Sequence[Measured], law: Fit) -> tuple[float, int, str]:
    """Scatter of one run, its degrees of freedom, and where it was taken from: these seeds, all seeds, or around the law."""
    for chosen, words in ((used, "seeds of these runs"), (rows, "seeds of all arms")):
        found = noise_floor([(row.arm, row.n_params, row.tokens) for row in chosen], [row.loss for row in chosen])
        if found is not None and (found.freedom >= _ENOUGH_FREEDOM or chosen is rows):
            return found.relative, found.freedom, words
    freedom = len(law.points) - len(law.theta)
    return float(np.sqrt(np.sum(law.residuals**2) / freedom)), freedom, "scatter around the law"


def _scatter(noise: float, freedom: int, runs: int, count: int, seed: int) -> Any:
    """Draws [count] of the mean of the runs' scatter: normal, with a size that is known as well as `freedom` says."""
    random = np.random.default_rng([seed, 1])
    scale = noise * np.sqrt(freedom / random.chisquare(freedom, count))
    return scale * random.standard_normal(count) / np.sqrt(runs)
