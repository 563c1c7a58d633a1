"""Which law in the ratio, if any: chosen by how it predicts ratios that it was not fitted to.

The best ratio lies between those that were run, where a law alone speaks. So each law is fitted without every ratio in turn,
the lowest and the highest, too, and judged by what it says of the runs there, at all sizes and budgets. Candidates are the laws
`mixture` and `mixture-additive`, and laws over the shares of two sources; beside them stand predictions that need no law
(`baselines`): the nearest ratio at the same size and budget, and the mean. Where the best law is no better, there is no law.
Laws whose errors cannot be told from those of the best are kept beside it: an answer that differs between them is not known
better than they agree.

Legend: M runs, R ratios, S draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.baselines import plain_errors
from megatron_synth.study.fit.fit import Fit, checked_losses, fit, race, start_grid
from megatron_synth.study.fit.laws import N_PARAMS, RATIO, TOKENS, Columns, Floats
from megatron_synth.study.fit.shares.gaussian import FittedProcess
from megatron_synth.study.fit.shares.laws import SHARE_LAWS
from megatron_synth.study.fit.shares.parametric import FittedParametric
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.fit.shares.validation import Validation, cross_validate
from megatron_synth.study.fit.solvers.solve import Solver

RATIO_LAWS = ("mixture", "mixture-additive")
OVER_SHARES = ("exponential", "power", "additive", "gaussian-process")
REJECTING = ("law-rejected", "wild-between-ratios")
"""Doubts for which a law in the ratio is no candidate."""
FEWEST_RATIOS = {"mixture": 4, "mixture-additive": 6}
"""One more than determine the law, as one is left out."""
FEWEST = 4
"""Ratios from which any law can be judged by one that is left out."""
SOURCES = ("the rest", "the source")
_STARTS, _FINISH, _FOLD_STARTS, _FOLD_FINISH = 600, 128, 40, 8
_MOST_FOLDS = 10
_DRAWS = 400


@dataclass(frozen=True)
class Candidate:
    """A law judged by ratios that it was not fitted to.

    error: mean absolute relative error of these. misses: [M], of each run.
    beyond: what it misses there beyond what the scatter of the runs explains, as a part of the loss; 0 for a law that holds.
    fit: of a law in the ratio. over_shares: of a law over shares. One of the two.
    doubts: codes for which it is no candidate; empty where it is one.
    """

    name: str
    error: float
    misses: Floats = field(repr=False)
    beyond: float = 0.0
    fit: Fit | None = None
    over_shares: Validation | None = None
    doubts: tuple[str, ...] = ()

    @property
    def formula(self) -> str:
        """For people."""
        if self.fit is not None:
            return self.fit.law.formula
        assert self.over_shares is not None
        return self.over_shares.law.formula

    def draws(self, ratios: Floats, point: Mapping[str, float], seed: int = 0) -> Floats:
        """Log losses [S, R] at ratios and one N and D: curves that could as well be the law's."""
        if self.fit is not None:
            return np.log(self.fit.predict_samples({RATIO: ratios, **self._known(point)}))
        assert self.over_shares is not None
        fitted = self.over_shares.fitted
        assert isinstance(fitted, FittedProcess | FittedParametric)
        return fitted.draws(self._mixtures(ratios, point), _DRAWS, seed)

    def predict(self, ratios: Floats, point: Mapping[str, float]) -> Floats:
        """The loss [R] at ratios and one N and D."""
        if self.fit is not None:
            return self.fit.predict({RATIO: ratios, **self._known(point)})
        assert self.over_shares is not None
        return np.exp(self.over_shares.fitted.log_predict(self._mixtures(ratios, point)))

    def _known(self, point: Mapping[str, float]) -> dict[str, float]:
        assert self.fit is not None
        return {name: value for name, value in point.items() if name in self.fit.law.columns}

    def _mixtures(self, ratios: Floats, point: Mapping[str, float]) -> Mixtures:
        assert self.over_shares is not None
        fitted = self.over_shares.fitted
        assert isinstance(fitted, FittedProcess | FittedParametric)
        return fitted.points.at(np.column_stack([1 - ratios, ratios]), point.get(N_PARAMS), point.get(TOKENS))


@dataclass(frozen=True)
class RatioChoice:
    """The laws that were tried, and which one answers.

    candidates: by name. skipped: laws that could not be tried, and why.
    baselines: errors of predictions without a law, by name.
    chosen: the law of lowest error among those without a rejecting doubt; None where there is no law.
    near: names of the laws that cannot be told from it, itself first.
    refused: why there is no law; empty where there is one.
    ratios: that were run, in rising order.
    """

    candidates: dict[str, Candidate]
    skipped: dict[str, str]
    baselines: dict[str, float]
    chosen: Candidate | None
    near: tuple[str, ...]
    refused: str
    ratios: tuple[float, ...]

    def told(self) -> str:
        """The choice in a sentence, with errors at ratios that were left out."""
        plain, error = min(self.baselines.items(), key=lambda item: item[1])
        if self.chosen is None:
            return f"no law in the ratio: {self.refused}"
        others = [f"{name} {self.candidates[name].error:.2%}" for name in self.near[1:]]
        beside = f"; not told from it: {', '.join(others)}" if others else ""
        return (
            f"law in the ratio, by cross-validation: {self.chosen.name}, which misses unseen ratios by "
            f"{self.chosen.error:.2%}{beside}; without a law ({plain}) {error:.2%}"
        )

    def to_json(self) -> dict[str, Any]:
        """As law.json holds it."""
        return {
            "chosen": None if self.chosen is None else self.chosen.name,
            "near": list(self.near),
            "refused": self.refused,
            "errors": {name: one.error for name, one in self.candidates.items()},
            "rejected": {name: list(one.doubts) for name, one in self.candidates.items() if one.doubts},
            "without_a_law": self.baselines,
            "skipped": self.skipped,
        }


def choose(
    columns: Columns,
    loss: ArrayLike,
    *,
    bootstraps: int = 1000,
    seed: int = 0,
    rejected: Callable[[Fit], tuple[str, ...]] | None = None,
    fits: Mapping[str, Fit] | None = None,
    **options: Any,
) -> RatioChoice:
    """Try all laws in the ratio on M runs, and choose one or none.

    Args:
        columns: `ratio`, and `n_params` and `tokens` where they vary, each [M].
        loss: [M], above 0.
        bootstraps: behind the laws' intervals.
        seed: of folds and draws.
        rejected: codes for which a fit is no candidate; default those in `REJECTING`.
        fits: fits of laws in the ratio to these runs that there are already, by name.
        options: of `fit`, such as `epochs`.

    Raises:
        UserError: there are fewer than two ratios, or a value is no loss or ratio.
    """
    losses = checked_losses(loss)
    log_loss = np.log(losses)
    used = {name: np.asarray(columns[name], dtype=np.float64) for name in (N_PARAMS, TOKENS, RATIO) if name in columns}
    if RATIO not in used:
        raise UserError("the choice of a law in the ratio needs the column ratio")
    ratios = np.unique(used[RATIO])
    points = _mixtures_of(used)
    fold_of = _folds(used[RATIO], seed)
    scales = np.column_stack(list(points.scales.values())) if points.scales else np.zeros((len(losses), 0))
    baselines = plain_errors(used[RATIO][:, None], scales, log_loss, fold_of)
    if len(ratios) < FEWEST:
        told = f"of {len(ratios)} ratios none can be left out to judge a law by; {FEWEST} are needed"
        return RatioChoice({}, {}, baselines, None, (), told, tuple(map(float, ratios)))
    candidates: dict[str, Candidate] = {}
    skipped: dict[str, str] = {}
    for name in RATIO_LAWS:
        if len(ratios) < FEWEST_RATIOS[name]:
            skipped[name] = f"needs {FEWEST_RATIOS[name]} different ratios, got {len(ratios)}"
            continue
        try:
            found = (fits or {}).get(name) or fit(
                name, used, losses, bootstraps=bootstraps, seed=seed, starts=_STARTS, finish=_FINISH, **options
            )
            misses = _cross_validated(found, fold_of, len(losses))
        except UserError as error:
            skipped[name] = str(error)
            continue
        codes = rejected(found) if rejected else tuple(one.code for one in found.warnings if one.code in REJECTING)
        beyond = _beyond(misses, found.residuals, len(found.theta))
        candidates[name] = Candidate(name, float(misses.mean()), misses, beyond, fit=found, doubts=codes)
    for name in OVER_SHARES:
        try:
            one = cross_validate(SHARE_LAWS[name], points, log_loss, fold_of, seed)
        except (UserError, np.linalg.LinAlgError) as error:
            skipped[name] = str(error)
            continue
        misses = np.abs(np.expm1(one.predicted - log_loss))
        residuals = one.fitted.log_predict(points) - log_loss
        beyond = _beyond(misses, residuals, len(one.law.parameters(points)) or len(ratios))
        candidates[name] = Candidate(name, float(misses.mean()), misses, beyond, over_shares=one)
    return _chosen(candidates, skipped, baselines, tuple(map(float, ratios)))


def _chosen(
    candidates: dict[str, Candidate], skipped: dict[str, str], baselines: dict[str, float], ratios: tuple[float, ...]
) -> RatioChoice:
    able = sorted((one for one in candidates.values() if not one.doubts), key=lambda one: one.error)
    plain, error = min(baselines.items(), key=lambda item: item[1])
    refused = ""
    if not able:
        refused = "every law is rejected"
    elif able[0].error >= error:
        refused = (
            f"ratios that were left out are missed by {able[0].error:.2%} by {able[0].name}, the best law, and by "
            f"{error:.2%} by the {plain} without a law"
        )
    if refused:
        return RatioChoice(candidates, skipped, baselines, None, (), refused, ratios)
    best = able[0]
    near = [best.name]
    for one in able[1:]:
        more = one.misses - best.misses
        if more.mean() <= more.std(ddof=1) / np.sqrt(len(more)) and one.error < error:
            near.append(one.name)
    return RatioChoice(candidates, skipped, baselines, best, tuple(near), "", ratios)


def _folds(ratios: Floats, seed: int) -> NDArray[np.int64]:
    """The fold [M] of each run: runs of one ratio share theirs, and up to ten ratios have one each."""
    place = np.unique(ratios, return_inverse=True)[1].reshape(-1)
    number = int(place.max()) + 1
    if number < 2:
        raise UserError(f"a law in the ratio needs different ratios; all runs have {ratios[0]:g}")
    fold = np.empty(number, dtype=np.int64)
    fold[np.random.default_rng(seed).permutation(number)] = np.arange(number) % min(number, _MOST_FOLDS)
    return fold[place]


def _beyond(misses: Floats, residuals: Floats, parameters: int) -> float:
    """What left-out runs are missed by beyond twice the variance of the runs around the law: a run's own, and the law's."""
    variance = float(np.sum(residuals**2)) / max(len(residuals) - parameters, 1)
    return float(np.sqrt(max(float(np.mean(misses**2)) - 2 * variance, 0.0)))


def _mixtures_of(columns: Mapping[str, Floats]) -> Mixtures:
    """The ratio as shares of two sources, with N and D where they vary."""
    varying = [columns[name] if name in columns and np.ptp(columns[name]) > 0 else None for name in (N_PARAMS, TOKENS)]
    return Mixtures(SOURCES, np.column_stack([1 - columns[RATIO], columns[RATIO]]), *varying)


def _cross_validated(found: Fit, fold_of: NDArray[np.int64], runs: int) -> Floats:
    """Absolute relative errors [M] by fits without each run's fold; of runs that are given twice, that of the first.

    Raises:
        UserError: without a fold, too little is left for the law.
    """
    log_loss = np.log(found.loss)
    grid = np.vstack([found.theta, start_grid(found.law, found.columns, log_loss, _FOLD_STARTS)])
    fold = fold_of[found.points]
    misses = np.full(runs, np.nan)
    for number in np.unique(fold):
        out = fold == number
        kept = {name: values[~out] for name, values in found.columns.items()}
        if len(np.unique(np.stack(list(kept.values())), axis=1).T) < len(found.theta):
            raise UserError("too few settings are left for it without a fold")
        solve = Solver(found.law, kept, log_loss[~out])
        ends = race(solve, grid, found.delta, _FOLD_FINISH)
        theta = ends.theta[np.nanargmin(np.where(np.isfinite(ends.objective), ends.objective, np.nan))]
        predicted = found.law.log_predict(theta, {name: values[out] for name, values in found.columns.items()})
        misses[found.points[out]] = np.abs(np.expm1(np.clip(predicted - log_loss[out], -5, 5)))
    return np.where(np.isnan(misses), np.nanmean(misses), misses)
