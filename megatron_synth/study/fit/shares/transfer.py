"""Do mixtures keep their order from one size or budget to another? Rank correlations with what chance leaves open.

Mixtures are drawn again with replacement (Efron and Tibshirani 1993), as those that were run are a sample of all. Noise between
seeds lowers every rank correlation: `ceiling` is the one of the same losses with themselves, measured twice with that noise.

Legend: C mixtures, S draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.noise import noise_floor
from megatron_synth.study.fit.shares.points import Mixtures

DRAWS = 1000
FEWEST = 5
"""Mixtures that both sizes need."""
TRIVIAL = 2e-3
"""Of the shares: mixtures nearer than this in every source are one."""


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation of C mixtures. interval: 90 %. ceiling: what noise between seeds allows at most; None without."""

    value: float
    interval: tuple[float, float]
    mixtures: int
    ceiling: float | None = None

    def __str__(self) -> str:
        low, high = self.interval
        most = "" if self.ceiling is None else f"; noise between seeds allows {self.ceiling:.3f} at most"
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] over {self.mixtures} mixtures{most}"


@dataclass(frozen=True)
class Transfer:
    """The rank correlation between two cells of size and budget, the smaller first."""

    proxy: dict[str, float]
    target: dict[str, float]
    rank: RankCorrelation

    def to_json(self) -> dict[str, Any]:
        """As law.json holds it."""
        return {"proxy": self.proxy, "target": self.target, **self.rank.__dict__}


def rank_of(
    first: Floats, second: Floats, *, noise: float | None = None, draws: int = DRAWS, seed: int = 0
) -> RankCorrelation | None:
    """The rank correlation of C values with C others; None with fewer than five, or where one side does not vary.

    Args:
        first: [C].
        second: [C].
        noise: standard deviation of the logarithm of each value of `second`, for the ceiling.
        draws: for the interval.
        seed: of the draws.
    """
    count = len(first)
    if count < FEWEST or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    random = np.random.default_rng(seed)
    chosen = random.integers(count, size=(draws, count))
    drawn = _spearman(first[chosen], second[chosen])
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [5, 95]) if len(drawn) else (np.nan, np.nan)
    ceiling = None
    if noise is not None:
        again = [np.log(second) + noise * random.standard_normal((200, count)) for _ in range(2)]
        ceiling = float(np.nanmean(_spearman(*again)))
    value = float(_spearman(first[None], second[None])[0])
    return RankCorrelation(value, (float(low), float(high)), count, ceiling)


def _spearman(first: Floats, second: Floats) -> Floats:
    """Spearman's correlations [S] of rows [S, C]; nan where a row does not vary."""
    from scipy.stats import rankdata

    one, other = (rankdata(values, axis=1) for values in (first, second))
    one, other = (values - values.mean(axis=1, keepdims=True) for values in (one, other))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((one * other).sum(axis=1) / np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1)))


def transfers(points: Mixtures, loss: Floats, *, seed: int = 0) -> list[Transfer]:
    """Between all pairs of sizes and budgets at which five mixtures or more were run at both; none where there is one alone.

    Args:
        points: the runs, with their sizes and tokens.
        loss: [M].
        seed: of the draws.
    """
    if not points.scales:
        return []
    noise = noise_floor(list(points.settings), loss)
    mixtures = np.unique(np.round(points.shares / TRIVIAL), axis=0, return_inverse=True)[1].reshape(-1)
    return list(_pairs(points, loss, mixtures, None if noise is None else noise.relative, seed))


def _pairs(points: Mixtures, loss: Floats, mixtures: NDArray[np.int64], noise: float | None, seed: int) -> Iterator[Transfer]:
    scales = np.exp(np.column_stack(list(points.scales.values())))
    names = list(points.scales)
    cells = np.unique(scales, axis=0)
    means: list[dict[int, tuple[float, int]]] = []
    for cell in cells:
        here = np.isclose(scales, cell, rtol=1e-9).all(axis=1)
        found = {}
        for mixture in np.unique(mixtures[here]):
            values = loss[here & (mixtures == mixture)]
            found[int(mixture)] = (float(values.mean()), len(values))
        means.append(found)
    order = np.argsort(cells.prod(axis=1), kind="stable")
    for first, second in combinations(order.tolist(), 2):
        common = sorted(set(means[first]) & set(means[second]))
        if len(common) < FEWEST:
            continue
        one, other = (np.array([means[place][mixture][0] for mixture in common]) for place in (first, second))
        seeds = float(np.mean([means[second][mixture][1] for mixture in common]))
        rank = rank_of(one, other, noise=None if noise is None else noise / np.sqrt(seeds), seed=seed)
        if rank is not None:
            proxy, target = (dict(zip(names, map(float, cells[place]), strict=True)) for place in (first, second))
            yield Transfer(proxy, target, rank)
