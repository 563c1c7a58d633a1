"""The mixtures that may be run: shares that sum to 1, each between its bounds, and designs that fill this space.

Legend: K sources, C mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Floats

CANDIDATES = 4000
"""Mixtures drawn wherever one is chosen among many."""
_SWEEPS = 30
"""Of the sampler, per source."""
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Space:
    """Mixtures of K sources. lower, upper: [K] bounds of the shares; why: what set a bound below 1, by source, for people."""

    sources: tuple[str, ...]
    lower: Floats
    upper: Floats
    why: Mapping[str, str]

    def contains(self, shares: Floats) -> NDArray[np.bool_]:
        """Which of the mixtures [C, K] are inside."""
        inside = (shares >= self.lower - _TOLERANCE) & (shares <= self.upper + _TOLERANCE)
        return np.asarray(inside.all(axis=1) & (np.abs(shares.sum(axis=1) - 1) < 1e-6))

    @property
    def center(self) -> Floats:
        """The mixture [K] that stands equally far between all bounds."""
        room = self.upper - self.lower
        return np.asarray(self.lower + room * (1 - self.lower.sum()) / room.sum() if room.sum() > 0 else self.lower)

    def draw(self, count: int, seed: int) -> Floats:
        """Mixtures [count, K]: half of them uniform in the space, half uniform in faces where some sources have their least.

        By Gibbs sampling: two sources at a time share out anew what they have together.
        """
        random = np.random.default_rng(seed)
        size = len(self.sources)
        upper = np.tile(self.upper, (count, 1))
        for row in range(count // 2):
            keep = random.permutation(size)
            least = int(random.integers(1, size))
            closed = keep[least:]
            upper[row, closed] = self.lower[closed]
            for source in closed:  # open again until the rest can hold the whole
                if upper[row].sum() >= 1:
                    break
                upper[row, source] = self.upper[source]
        shares = _filled(self.lower, upper)
        rows = np.arange(count)
        for _ in range(_SWEEPS * size if size > 1 else 0):
            first = random.integers(size, size=count)
            second = (first + random.integers(1, size, size=count)) % size
            both = shares[rows, first] + shares[rows, second]
            low = np.maximum(self.lower[first], both - upper[rows, second])
            high = np.minimum(upper[rows, first], both - self.lower[second])
            shares[rows, first] = low + random.random(count) * np.maximum(high - low, 0)
            shares[rows, second] = both - shares[rows, first]
        return np.asarray(np.clip(shares, self.lower, self.upper))


def make_space(
    sources: tuple[str, ...],
    *,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    caps: Mapping[str, tuple[float, str]] | None = None,
) -> Space:
    """The space of mixtures between bounds and below caps.

    Args:
        sources: names.
        bounds: lowest and highest share by source.
        caps: highest share by source that its text allows (unique tokens x epochs / budget), and why.

    Raises:
        UserError: a bound is none, a name is no source, or nothing is left.
    """
    given = dict(bounds or {})
    unknown = [name for name in given if name not in sources]
    if unknown:
        raise UserError(f"bounds: no source is called '{unknown[0]}'; there are: {', '.join(sources)}")
    lower, upper, why = np.zeros(len(sources)), np.ones(len(sources)), {}
    for place, name in enumerate(sources):
        low, high = given.get(name, (0.0, 1.0))
        if not 0 <= low <= high <= 1:
            raise UserError(f"bounds: {name}: expected 0 <= lowest <= highest <= 1, got {low:g} and {high:g}")
        cap, reason = (caps or {}).get(name, (1.0, ""))
        lower[place], upper[place] = low, min(high, cap)
        if cap < high:
            why[name] = reason
        elif high < 1:
            why[name] = "as asked"
        if cap < low:
            raise UserError(f"bounds: {name}: at least {low:g} is asked for, and its text allows {cap:.4g} ({reason})")
    if lower.sum() > 1 + _TOLERANCE or upper.sum() < 1 - _TOLERANCE:
        least = lower.sum() > 1
        told = f"the lowest shares sum to {lower.sum():.4g}" if least else f"the highest shares sum to {upper.sum():.4g}"
        rest = "" if least else ": " + "; ".join(f"{name} {reason}" for name, reason in why.items())
        raise UserError(f"no mixture is possible: {told}{rest}")
    return Space(sources, lower, upper, why)


def _filled(lower: Floats, upper: Floats) -> Floats:
    """A mixture [C, K] between the bounds [K] and [C, K]."""
    room = upper - lower
    rest = 1 - lower.sum()
    total = room.sum(axis=1, keepdims=True)
    return np.asarray(lower + room * np.divide(rest, total, out=np.zeros_like(total), where=total > 0))


def space_filling(space: Space, count: int, *, taken: Floats | None = None, seed: int = 0) -> Floats:
    """Mixtures [count, K] far from each other and from those that are taken.

    The farthest candidate from all that are there, again and again (Kennard and Stone 1969, Technometrics 11, 137-148), by
    distance of the square roots of shares, in which the first per cent of a source counts most. The first is the center.
    """
    candidates = np.vstack([space.center, space.draw(CANDIDATES, seed)])
    chosen: list[int] = []
    roots = np.sqrt(candidates)
    nearest = np.full(len(candidates), np.inf)
    for mixture in np.zeros((0, len(space.sources))) if taken is None else taken:
        nearest = np.minimum(nearest, ((roots - np.sqrt(mixture)) ** 2).sum(axis=1))
    for _ in range(count):
        best = int(nearest.argmax()) if np.isfinite(nearest).all() else 0
        chosen.append(best)
        nearest = np.minimum(nearest, ((roots - roots[best]) ** 2).sum(axis=1))
    return np.asarray(candidates[chosen])
