"""Fit laws over shares to runs, choose among them by cross-validation, and say how far to believe the one that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.baselines import plain_errors
from megatron_synth.study.fit.diagnostics import REJECTED, Diagnostic, repetition_ignored
from megatron_synth.study.fit.fit import checked_losses
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.laws import AUTO, SHARE_LAWS, FittedShareLaw, ShareLaw, share_law_named
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.fit.shares.transfer import rank_of
from megatron_synth.study.fit.shares.validation import Validation, cross_validate, folds_of, rank_correlation

LEVEL = 90.0
_SEEN, _OFTEN = 0.01, 5
"""A source is seen in a mixture that has a hundredth of it, and often in five."""
_EXPLAINS = 0.9
"""A law that misses by more than this part of what predictions without a law miss by is doubted."""


@dataclass(frozen=True)
class ShareHoldout:
    """How the law predicts runs that it was not fitted to.

    covered: how many lie inside their interval of 90 %.
    """

    rule: str
    points: int
    mean_absolute_relative_error: float
    worst: float
    mean_relative_error: float
    rank: float | None
    covered: int | None
    rank_interval: tuple[float, float] | None = None
    """Of the rank correlation, 90 %, over draws of the held-out mixtures; None where they are of several sizes or budgets."""

    def to_json(self) -> dict[str, Any]:
        """As law.json holds it."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class ShareFit:
    """A law over shares, chosen and fitted.

    chosen: the validation of the law that predictions come from.
    compared: of every law that was tried, by name.
    skipped: laws that could not be tried, and why.
    points, loss: the M runs fitted to.
    baselines: errors of predictions without a law on the same folds (`baselines`), by name.
    """

    chosen: Validation
    compared: dict[str, Validation]
    skipped: dict[str, str]
    points: Mixtures = field(repr=False)
    loss: Floats = field(repr=False)
    holdout: ShareHoldout | None = None
    warnings: tuple[Diagnostic, ...] = ()
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def no_law(self) -> str:
        """Why there is no law: none is better on unseen mixtures than a prediction without one. Empty where one is."""
        if not self.baselines:
            return ""
        name, error = min(self.baselines.items(), key=lambda item: item[1])
        if self.chosen.error < error:
            return ""
        return (
            f"unseen mixtures are missed by {self.chosen.error:.2%} by {self.law.name}, the best law, and by {error:.2%} by "
            f"the {name} alone"
        )

    @property
    def law(self) -> ShareLaw:
        """The law that was chosen."""
        return self.chosen.law

    @property
    def fitted(self) -> FittedShareLaw:
        """It, fitted to all runs."""
        return self.chosen.fitted

    def predict(self, points: Mixtures) -> Floats:
        """The loss [C] of other mixtures."""
        return np.asarray(np.exp(self.fitted.log_predict(points)))

    def predict_interval(self, points: Mixtures, level: float = LEVEL) -> tuple[Floats, Floats]:
        """Ends [C] of the interval of one run of each mixture; see `validation`."""
        return self.chosen.interval(points, level)

    def to_json(self) -> dict[str, Any]:
        """What law.json holds."""
        names = self.law.parameters(self.points)
        return {
            "law": "shares",
            "chosen": None if self.no_law else self.law.name,
            "no_law": self.no_law,
            "best_law": self.law.name,
            "formula": self.law.formula,
            "source": self.law.source,
            "sources": list(self.points.sources),
            "joint_in": list(self.points.scales),
            "points": len(self.points),
            "number_of_parameters": len(names) if self.law.parametric else None,
            "cross_validation": {
                "folds": len(self.chosen.folds),
                "laws": {name: {"error": one.error, "rank": one.rank} for name, one in self.compared.items()},
                "skipped": self.skipped,
                "without_a_law": self.baselines,
            },
            "fitted": self.fitted.to_json(),
            "holdout": None if self.holdout is None else self.holdout.to_json(),
            "warnings": [{"code": diagnostic.code, "message": diagnostic.message} for diagnostic in self.warnings],
        }


def fit_shares(
    points: Mixtures,
    loss: ArrayLike,
    *,
    law: str | Sequence[str] = AUTO,
    holdout: NDArray[np.bool_] | None = None,
    rule: str = "a given mask",
    epochs: ArrayLike | None = None,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> ShareFit:
    """Fit laws over shares to M runs, and choose the one of lowest cross-validated error.

    Args:
        points: the mixtures of the runs.
        loss: [M], above 0.
        law: a law, several to choose among, or `auto` for all that are installed.
        holdout: mask [M] of runs to predict, not to fit.
        rule: what the hold-out is, for people.
        epochs: [M] or [M, K], how often runs saw their text, for the warning that the law does not know it.
        seed: of folds and starts.
        progress: called with the name of each law before it is fitted.

    Raises:
        UserError: no law can be fitted, or a value is no loss.
    """
    losses = checked_losses(loss)
    if len(losses) != len(points):
        raise UserError(f"loss: {len(losses)} losses for {len(points)} mixtures")
    asked = list(SHARE_LAWS) if law == AUTO else [law] if isinstance(law, str) else list(law)
    laws = [SHARE_LAWS[name] for name in asked] if law == AUTO else [share_law_named(name) for name in asked]
    inside = np.ones(len(losses), dtype=bool) if holdout is None else ~np.asarray(holdout, dtype=bool)
    if not inside.any() or (holdout is not None and inside.all()):
        raise UserError(f"holdout: {rule} holds out {int((~inside).sum())} of {len(losses)} runs; some must be in, some out")
    used, log_loss = _varying(points.rows(inside)), np.log(losses[inside])
    fold_of = folds_of(used, seed)
    compared: dict[str, Validation] = {}
    skipped: dict[str, str] = {}
    for one in laws:
        if one.needs is not None:
            skipped[one.name] = f"needs {one.needs}"
            continue
        if progress is not None:
            progress(one.name)
        compared[one.name] = cross_validate(one, used, log_loss, fold_of, seed)
    chosen = min(compared.values(), key=lambda one: one.error)
    held = None
    if holdout is not None:
        out = Mixtures(points.sources, points.shares, *_same_columns(points, used)).rows(~inside)
        held = _judge(chosen, out, losses[~inside], rule)
    scales = np.column_stack(list(used.scales.values())) if used.scales else np.zeros((len(used), 0))
    baselines = plain_errors(np.sqrt(used.shares), scales, log_loss, fold_of)
    result = ShareFit(chosen, compared, skipped, used, losses[inside], held, baselines=baselines)
    seen = None if epochs is None else np.asarray(epochs, dtype=np.float64)[inside]
    return replace(result, warnings=tuple(_doubts(result, seen)))


def _varying(points: Mixtures) -> Mixtures:
    """The points without a size or a number of tokens that is the same for all."""
    pick = [None if column is None or np.ptp(column) == 0 else column for column in (points.n_params, points.tokens)]
    return Mixtures(points.sources, points.shares, *pick)


def _same_columns(points: Mixtures, used: Mixtures) -> list[Floats | None]:
    pairs = ((points.n_params, used.n_params), (points.tokens, used.tokens))
    return [None if kept is None else own for own, kept in pairs]


def _judge(chosen: Validation, points: Mixtures, losses: Floats, rule: str) -> ShareHoldout:
    predicted = chosen.fitted.log_predict(points)
    errors = np.expm1(predicted - np.log(losses))
    covered = None
    if len(chosen.log_loss) >= 9:
        low, high = chosen.interval(points, LEVEL)
        covered = int(((losses >= low) & (losses <= high)).sum())
    one_cell = all(np.ptp(logs) == 0 for logs in points.scales.values())
    between = rank_of(np.exp(predicted), losses) if one_cell else None
    return ShareHoldout(
        rule=rule,
        points=len(losses),
        mean_absolute_relative_error=float(np.abs(errors).mean()),
        worst=float(np.abs(errors).max()),
        mean_relative_error=float(errors.mean()),
        rank=rank_correlation(points, predicted, np.log(losses)),
        covered=covered,
        rank_interval=None if between is None else between.interval,
    )


def _doubts(fit: ShareFit, epochs: Floats | None) -> Iterator[Diagnostic]:
    """All that speaks against a fit."""
    points, chosen = fit.points, fit.chosen
    number, parameters = int(points.settings.max()) + 1, len(fit.law.parameters(points))
    if number < parameters:
        yield Diagnostic(
            "few-points",
            f"{number} different settings for {parameters} parameters: the rest is decided by the law's priors. Quote no "
            "parameters; the error is that of the cross-validation",
        )
    rare = [name for name, shares in zip(points.sources, points.shares.T, strict=True) if (shares >= _SEEN).sum() < _OFTEN]
    if rare:
        yield Diagnostic(
            "source-rarely-seen",
            f"{', '.join(rare)}: above 1 % in fewer than {_OFTEN} runs, so nothing is known of mixtures that use more",
        )
    plain, error = min(fit.baselines.items(), key=lambda item: item[1])
    if chosen.error > _EXPLAINS * error:
        yield Diagnostic(
            "explains-nothing",
            f"the cross-validated error is {chosen.error:.2%}, that of the {plain} without a law {error:.2%}: choose no "
            "mixture by this law",
        )
    yield from _beyond_noise(fit)
    yield from repetition_ignored(epochs)
    held = fit.holdout
    if held is not None and held.covered is not None:
        from scipy.stats import binom

        if float(binom.cdf(held.covered, held.points, LEVEL / 100)) < REJECTED:
            yield Diagnostic(
                "holdout-missed",
                f"{held.covered} of {held.points} held-out runs lie in their {LEVEL:g} % intervals: they are not like the runs "
                "fitted to",
            )


def _beyond_noise(fit: ShareFit) -> Iterator[Diagnostic]:
    """Whether unseen mixtures are missed by more than seeds scatter."""
    from scipy.stats import f as f_distribution

    log_loss, settings = fit.chosen.log_loss, fit.points.settings
    counts = np.bincount(settings)
    pure = len(log_loss) - len(counts)
    if pure < 1:
        return
    means = np.bincount(settings, log_loss) / counts
    scatter = float(np.sum((log_loss - means[settings]) ** 2)) / pure
    misses = np.bincount(settings, fit.chosen.predicted - log_loss) / counts
    misfit = float(np.mean(counts * misses**2))
    if scatter > 0 and float(f_distribution.sf(misfit / scatter, len(counts), pure)) < REJECTED:
        yield Diagnostic(
            "law-rejected",
            f"unseen mixtures are missed by {np.sqrt(np.mean(misses**2)):.2%}, seeds scatter by {np.sqrt(scatter):.2%}: the "
            "law leaves something out",
        )
