"""Does the loss rise when each round trains on what the model of the round before has written?

Two contrasts, of log loss, each with an interval that the seeds justify: a round against real text alone, and the slope over
the rounds. A loop that only steps up once, as any change of the text may, is worse than real text and does not collapse; one
whose loss goes on rising does.

Rounds of one seed depend on each other: each inherits what the last one lost, and its luck. So a seed gives one number to each
contrast, a difference or a slope, and the test is Student's over the seeds, whatever the rounds of a seed have in common. The
price is few degrees of freedom, seeds less one; `python -m tests.simulate_rounds` says what is found with how many.

Legend: S seeds, R rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.contrast import Estimate
from megatron_synth.study.fit.fit import checked_losses
from megatron_synth.study.fit.laws import Floats


@dataclass(frozen=True)
class RoundsContrast:
    """A loop beside real text alone.

    by_round: log(loss / that of real text) of each round. rise: slope of log loss per round, over all rounds of the loop; None
    of a single round. p of both is one-sided, of "no worse" and of "does not rise". seeds: how many.
    """

    by_round: tuple[Estimate, ...]
    rise: Estimate | None
    seeds: int
    level: float

    @property
    def last(self) -> Estimate:
        """The last round beside real text."""
        return self.by_round[-1]


def rounds_contrast(real: ArrayLike, rounds: ArrayLike, *, level: float = 90) -> RoundsContrast:
    """Hold a loop against real text.

    Args:
        real: [S] losses of real text alone, by seed.
        rounds: [S, R] losses of the loop's rounds, of the same seeds in the same order.
        level: of the intervals, in percent.

    Raises:
        UserError: fewer than two seeds, or shapes that do not fit.
    """
    base, losses = np.log(checked_losses(real)), np.asarray(rounds, dtype=np.float64)
    if losses.ndim != 2 or len(losses) != len(base) or not losses.shape[1]:
        raise UserError(f"rounds: expected a row of losses for each of {len(base)} seeds, got shape {losses.shape}")
    if len(base) < 2:
        raise UserError("rounds: one seed says nothing of how much chance moves: at least two are needed")
    logs = np.log(checked_losses(losses.ravel())).reshape(losses.shape)
    by_round = tuple(mean_of(difference, level) for difference in (logs - base[:, None]).T)
    number = np.arange(losses.shape[1], dtype=np.float64)
    number -= number.mean()
    rise = mean_of(logs @ number / np.sum(number**2), level) if losses.shape[1] > 1 else None
    return RoundsContrast(by_round, rise, len(base), level)


def mean_of(values: Floats, level: float) -> Estimate:
    """The mean of one number per seed [S], with Student's interval and the one-sided p of "not above 0"."""
    from scipy.stats import t as student

    freedom = len(values) - 1
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    half = float(student.ppf(0.5 + level / 200, freedom)) * error
    p = float(student.sf(mean / error, freedom)) if error > 0 else float(mean <= 0)
    return Estimate(mean, (mean - half, mean + half), p, float(freedom))


@dataclass(frozen=True)
class Spread:
    """How much loss scatters between corpora of one generator, and between seeds of training on one corpus.

    Standard deviations of log loss, by the analysis of variance of a two-way layout with one run in each cell, of random
    effects; 0 where an estimate of a variance is negative. between_corpora, between_seeds, rest: what neither explains.
    p: of "corpora do not differ", by F. corpora, seeds: how many.
    """

    between_corpora: float
    between_seeds: float
    rest: float
    p: float
    corpora: int
    seeds: int


def spread_of(losses: ArrayLike) -> Spread:
    """The components of variance of losses [C, S]: corpora by seeds of training.

    Raises:
        UserError: fewer than two of either.
    """
    from scipy.stats import f as fisher

    table = np.asarray(losses, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise UserError(f"spread: at least two corpora and two seeds are needed, got shape {table.shape}")
    logs = np.log(checked_losses(table.ravel())).reshape(table.shape)
    corpora, seeds = len(logs), logs.size // len(logs)
    rows, columns = logs.mean(axis=1), logs.mean(axis=0)
    left = logs - rows[:, None] - columns[None, :] + logs.mean()
    freedom = (corpora - 1) * (seeds - 1)
    rest = float(np.sum(left**2) / freedom)
    of_corpora, of_seeds = seeds * float(rows.var(ddof=1)), corpora * float(columns.var(ddof=1))
    p = float(fisher.sf(of_corpora / rest, corpora - 1, freedom)) if rest > 0 else 0.0
    return Spread(
        between_corpora=float(np.sqrt(max(of_corpora - rest, 0) / seeds)),
        between_seeds=float(np.sqrt(max(of_seeds - rest, 0) / corpora)),
        rest=float(np.sqrt(rest)),
        p=p,
        corpora=corpora,
        seeds=seeds,
    )
