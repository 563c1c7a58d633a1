"""Cross-validation of a law over shares, and intervals from it.

Runs of one mixture stay in one fold, so that a law is judged by mixtures that it has not seen. Intervals are those of CV+
(Barber, Candes, Ramdas and Tibshirani 2021, Annals of Statistics 49, 486-507): each run's error by the law fitted without it,
around what that law predicts for the new mixture. They assume no law, only that new mixtures are drawn as those of the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.laws import FittedShareLaw, ShareLaw
from megatron_synth.study.fit.shares.points import Mixtures

FOLDS, MANY_FOLDS, FEW_RUNS = 5, 10, 150
"""Folds of a large table; of one below so many runs."""
FEWEST_RANKED = 5
"""Mixtures of one size and budget from which a rank correlation is computed."""


@dataclass(frozen=True)
class Validation:
    """A law judged by runs it was not fitted to.

    fitted: to all runs.
    folds: the law fitted without each fold.
    fold_of: [M] the fold of each run.
    predicted: [M] log losses by the law fitted without the run's fold.
    error: mean absolute relative error of these.
    rank: mean of Spearman's correlations over sizes and budgets; None where no cell has five mixtures.
    """

    law: ShareLaw
    fitted: FittedShareLaw = field(repr=False)
    folds: tuple[FittedShareLaw, ...] = field(repr=False)
    fold_of: NDArray[np.int64] = field(repr=False)
    predicted: Floats = field(repr=False)
    log_loss: Floats = field(repr=False)
    error: float
    rank: float | None

    def interval(self, points: Mixtures, level: float = 90) -> tuple[Floats, Floats]:
        """Lower and upper ends [C] of the loss of a run of each mixture, `level` in percent.

        Raises:
            UserError: there are too few runs for that level.
        """
        runs = len(self.log_loss)
        rank = math.floor((1 - level / 100) * (runs + 1))
        if rank < 1:
            raise UserError(f"an interval of {level:g} % needs at least {math.ceil(100 / (100 - level)) - 1} runs, got {runs}")
        by_fold = np.stack([fold.log_predict(points) for fold in self.folds])  # [folds, C]
        around = by_fold[self.fold_of]  # [M, C]
        misses = np.abs(self.log_loss - self.predicted)[:, None]
        lower = np.partition(around - misses, rank - 1, axis=0)[rank - 1]
        upper = -np.partition(-around - misses, rank - 1, axis=0)[rank - 1]
        return np.exp(lower), np.exp(upper)


def folds_of(points: Mixtures, seed: int) -> NDArray[np.int64]:
    """The fold [M] of each run; runs of one mixture share theirs, where there are enough mixtures for that.

    Raises:
        UserError: fewer than three different settings.
    """
    mixtures = np.unique(np.round(points.shares, 9), axis=0, return_inverse=True)[1].reshape(-1)
    groups = mixtures if mixtures.max() + 1 >= MANY_FOLDS else points.settings
    number = int(groups.max()) + 1
    if number < 3:
        raise UserError(f"a law over shares needs at least 3 different mixtures, got {number}")
    folds = min(number, FOLDS if len(points) >= FEW_RUNS else MANY_FOLDS)
    order = np.random.default_rng(seed).permutation(number)
    fold = np.empty(number, dtype=np.int64)
    fold[order] = np.arange(number) % folds
    return fold[groups]


def cross_validate(law: ShareLaw, points: Mixtures, log_loss: Floats, fold_of: NDArray[np.int64], seed: int) -> Validation:
    """Fit a law to all runs, then without each fold."""
    fitted = law.fit(points, log_loss, seed=seed)
    predicted, folds = np.empty(len(points)), []
    for fold in range(int(fold_of.max()) + 1):
        out = fold_of == fold
        part = law.fit(points.rows(~out), log_loss[~out], warm=fitted, seed=seed)
        predicted[out] = part.log_predict(points.rows(out))
        folds.append(part)
    error = float(np.mean(np.abs(np.expm1(predicted - log_loss))))
    rank = rank_correlation(points, predicted, log_loss)
    return Validation(law, fitted, tuple(folds), fold_of, predicted, log_loss, error, rank)


def rank_correlation(points: Mixtures, predicted: Floats, measured: Floats) -> float | None:
    """Spearman's correlation over the mixtures of one size and budget, averaged over sizes and budgets.

    None where no cell has five runs that differ.
    """
    from scipy.stats import spearmanr

    cells = np.zeros(len(points), dtype=np.int64)
    if points.scales:
        cells = np.unique(np.column_stack(list(points.scales.values())), axis=0, return_inverse=True)[1].reshape(-1)
    found = []
    for cell in np.unique(cells):
        inside = cells == cell
        if inside.sum() >= FEWEST_RANKED and np.ptp(predicted[inside]) > 0 and np.ptp(measured[inside]) > 0:
            found.append(float(spearmanr(predicted[inside], measured[inside]).statistic))
    return float(np.mean(found)) if found else None
