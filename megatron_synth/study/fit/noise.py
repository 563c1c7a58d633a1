"""The noise floor from seeds, and tests against it: does a loss stop falling, or rise; which ratios are as good as the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.fit import checked_losses
from megatron_synth.study.fit.laws import Floats


@dataclass(frozen=True)
class Noise:
    """How much the loss scatters between seeds, all else equal.

    relative: pooled standard deviation of log loss, which is that of the loss relative to itself.
    freedom: degrees of freedom it was estimated with (runs less settings).
    interval: 90 % of it, by chi-squared.
    """

    relative: float
    freedom: int
    interval: tuple[float, float]


def noise_floor(settings: Sequence[Any], loss: ArrayLike) -> Noise | None:
    """The scatter between seeds, pooled over settings; None where no setting has two runs.

    Args:
        settings: [M] labels, equal for runs that differ in the seed only.
        loss: [M].
    """
    from scipy.stats import chi2

    losses = checked_losses(loss)
    if len(settings) != len(losses):
        raise UserError(f"noise floor: {len(settings)} settings for {len(losses)} losses")
    groups: dict[Any, list[float]] = {}
    for setting, value in zip(settings, np.log(losses), strict=True):
        groups.setdefault(setting, []).append(float(value))
    freedom = len(losses) - len(groups)
    if freedom < 1:
        return None
    squares = sum(float(np.sum((np.array(values) - np.mean(values)) ** 2)) for values in groups.values())
    low, high = (float(np.sqrt(squares / chi2.ppf(q, freedom))) for q in (0.95, 0.05))
    return Noise(float(np.sqrt(squares / freedom)), freedom, (low, high))


@dataclass(frozen=True)
class Trend:
    """Whether the loss still falls at the upper end of the budgets (or of the shares).

    slope: of log loss per unit of x over the last values of x, by least squares.
    interval: of the slope, `level` percent, two-sided, by Student's t.
    p_falls, p_rises: p-values against "does not fall" and "does not rise", one-sided; small ones are evidence.
    verdict: `falls` or `rises` where that p-value is below (100 - level) / 200, otherwise `undecided`.
    values: the x that were used. runs: how many.
    freedom: of the scatter that the slope is held against.
    noise: that scatter, a standard deviation of log loss.
    """

    slope: float
    interval: tuple[float, float]
    p_falls: float
    p_rises: float
    verdict: str
    values: tuple[float, ...]
    runs: int
    freedom: int
    noise: float
    level: float


def trend(x: ArrayLike, loss: ArrayLike, *, last: int = 3, noise: Noise | None = None, level: float = 90) -> Trend:
    """Test whether the loss falls or rises along x, at its upper end.

    For collapse with the budget give x = log2(tokens) of one arm and one model size: the slope then is per doubling. For
    collapse with the share give x = ratio at one N and D. The scatter that the slope is held against is `noise` where given
    (pooled over a whole study), otherwise that of the seeds at each x, otherwise that around the line, which a curve inflates:
    the test then finds less.

    Args:
        x: [M].
        loss: [M].
        last: over how many of the largest different values of x.
        noise: of the study.
        level: of the interval, in percent.

    Raises:
        UserError: fewer than two values of x, or nothing to estimate the scatter from.
    """
    from scipy.stats import t as student

    position, losses = np.asarray(x, dtype=np.float64), checked_losses(loss)
    if position.shape != losses.shape or not np.isfinite(position).all():
        raise UserError(f"trend: expected {len(losses)} finite numbers x, got shape {position.shape}")
    used = np.unique(position)[-last:]
    if last < 2 or len(used) < 2:
        raise UserError(f"trend: at least two different x are needed, got {len(used)}")
    inside = position >= used[0]
    position, logs = position[inside], np.log(losses[inside])
    centered = position - position.mean()
    spread = float(np.sum(centered**2))
    slope = float(np.sum(centered * logs) / spread)
    scatter, freedom = _scatter(position, logs, slope, noise)
    error = scatter / np.sqrt(spread)
    score = slope / error if error > 0 else np.sign(slope) * np.inf
    p_rises, p_falls = float(student.sf(score, freedom)), float(student.cdf(score, freedom))
    half = float(student.ppf(0.5 + level / 200, freedom)) * error
    limit = (100 - level) / 200
    verdict = "falls" if p_falls < limit else "rises" if p_rises < limit else "undecided"
    return Trend(
        slope=slope,
        interval=(slope - half, slope + half),
        p_falls=p_falls,
        p_rises=p_rises,
        verdict=verdict,
        values=tuple(float(value) for value in used),
        runs=len(logs),
        freedom=freedom,
        noise=scatter,
        level=level,
    )


def _scatter(x: Floats, logs: Floats, slope: float, noise: Noise | None) -> tuple[float, int]:
    if noise is not None:
        return noise.relative, noise.freedom
    own = noise_floor(list(x), np.exp(logs))
    if own is not None:
        return own.relative, own.freedom
    if len(logs) < 3:
        raise UserError(
            "trend: two runs leave nothing to estimate the scatter from; give seeds, a noise floor or more values of x"
        )
    around = logs - logs.mean() - slope * (x - x.mean())
    return float(np.sqrt(np.sum(around**2) / (len(logs) - 2))), len(logs) - 2


@dataclass(frozen=True)
class MeasuredBest:
    """The best of the ratios that were run, at one N and D.

    ratio: of lowest mean loss. loss: that mean.
    band: the ratios whose mean is not distinguishable from the best's: below it by less than the noise floor explains.
    table: per ratio its mean loss, its number of runs and the p-value of "as good as the best".
    """

    ratio: float
    loss: float
    band: tuple[float, ...]
    table: Mapping[float, tuple[float, int, float]]
    level: float


def best_measured(ratio: ArrayLike, loss: ArrayLike, noise: Noise, *, level: float = 90) -> MeasuredBest:
    """Compare ratios at one N and D by Dunnett-like t-tests against the best, Bonferroni-corrected for their number.

    Args:
        ratio: [M].
        loss: [M].
        noise: of the study, from its seeds.
        level: the best ratio among those run is in the band at least this often, in percent.
    """
    from scipy.stats import t as student

    ratios, losses = np.asarray(ratio, dtype=np.float64), checked_losses(loss)
    if ratios.shape != losses.shape:
        raise UserError(f"best ratio: {ratios.shape} ratios for {losses.shape} losses")
    different = np.unique(ratios)
    logs = [np.log(losses[ratios == value]) for value in different]
    means = np.array([values.mean() for values in logs])
    best = int(means.argmin())
    table, band = {}, []
    for value, own, mean in zip(different, logs, means, strict=True):
        error = noise.relative * np.sqrt(1 / len(own) + 1 / len(logs[best]))
        score = (mean - means[best]) / error if error > 0 else (np.inf if mean > means[best] else 0.0)
        p = min(1.0, float(student.sf(score, noise.freedom)) * max(len(different) - 1, 1))
        table[float(value)] = (float(np.exp(mean)), len(own), p)
        if p >= 1 - level / 100 or mean == means[best]:
            band.append(float(value))
    return MeasuredBest(float(different[best]), float(np.exp(means[best])), tuple(band), table, level)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """P-values [T] corrected for there being T of them (S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70)."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values)
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(steps, 1)
    return corrected
