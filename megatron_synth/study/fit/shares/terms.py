"""Terms of laws over shares: each a positive part of the loss, as its logarithm and that logarithm's slopes.

A law is L = sum over k of exp(g_k(theta, mixture)). Legend: M mixtures, K sources, p parameters of the term. A term's
parameters stand one after the other in the theta of its law.

Sizes and tokens are taken relative to the geometric mean of the table, so that factors of terms in N and D are comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.points import Mixtures

SMALLEST_SHARE = 1e-6
"""Added to shares below a power, where 0 has no logarithm; a power of 0.3 leaves 1.6 % of a whole source."""
_EXPONENT = 0.4  # where exponents of N and D start; published ones are 0.3 to 0.5


class Term(Protocol):
    """One term of a law."""

    def names(self, sources: Sequence[str]) -> list[str]:
        """Names of its p parameters."""
        ...

    def start(self, rest: Floats, points: Mixtures, random: np.random.Generator) -> Floats:
        """Where its parameters [p] start, to explain `rest` [M], the logarithm of what the floor leaves of the loss."""
        ...

    def value(self, theta: Floats, points: Mixtures) -> tuple[Floats, Floats]:
        """The logarithm [M] of the term and its slopes [M, p] in theta [p]."""
        ...


@dataclass(frozen=True)
class Exponential:
    """exp(t . r): Ye et al. 2024 (Data Mixing Laws, arXiv 2403.16952); their factor is in t, as shares sum to 1."""

    part: float = 1.0
    jitter: float = 0.0
    """Scatter of starts, by which several such terms come apart."""

    def names(self, sources: Sequence[str]) -> list[str]:
        """`t[source]` for each."""
        return [f"t[{name}]" for name in sources]

    def start(self, rest: Floats, points: Mixtures, random: np.random.Generator) -> Floats:
        """The ridge regression of `rest` on shares."""
        shares = points.shares
        gram = shares.T @ shares + 1e-3 * np.eye(shares.shape[1])
        slopes = rest.mean() + np.linalg.solve(gram, shares.T @ (rest - rest.mean()))
        return np.asarray(slopes + np.log(self.part) + self.jitter * random.standard_normal(len(slopes)))

    def value(self, theta: Floats, points: Mixtures) -> tuple[Floats, Floats]:
        """As `Term.value`."""
        return points.shares @ theta, points.shares


@dataclass(frozen=True)
class EffectivePower:
    """(d + sum_i c_i r_i)^-beta: a power law in the data that is effective for the domain, with a weight for each source."""

    def names(self, sources: Sequence[str]) -> list[str]:
        """`d`, `beta` and a weight per source, all as logarithms."""
        return ["log d", "log beta", *(f"log c[{name}]" for name in sources)]

    def start(self, rest: Floats, points: Mixtures, random: np.random.Generator) -> Floats:
        """Weights of all sources alike, scattered."""
        weights = -rest.mean() / 0.5 + 0.1 * random.standard_normal(len(points.sources))
        return np.concatenate([[-rest.mean() / 0.5 - 2.0, np.log(0.5)], weights])

    def value(self, theta: Floats, points: Mixtures) -> tuple[Floats, Floats]:
        """As `Term.value`."""
        rest, beta, weights = np.exp(theta[0]), np.exp(theta[1]), np.exp(theta[2:])
        effective = rest + points.shares @ weights
        log = -beta * np.log(effective)
        slope = -beta / effective
        return log, np.column_stack([slope * rest, log, slope[:, None] * points.shares * weights])


@dataclass(frozen=True)
class EffectiveSum:
    """1 / (d + sum_i c_i r_i^gamma_i): the additive law of Shukor et al. 2025 (arXiv 2507.09404); its d is ours."""

    def names(self, sources: Sequence[str]) -> list[str]:
        """`d`, a factor and an exponent per source, all as logarithms."""
        return ["log d", *(f"log c[{name}]" for name in sources), *(f"log gamma[{name}]" for name in sources)]

    def start(self, rest: Floats, points: Mixtures, random: np.random.Generator) -> Floats:
        """All sources alike, scattered, with the power one half."""
        sources = len(points.sources)
        factors = -rest.mean() - 0.5 + 0.1 * random.standard_normal(sources)
        return np.concatenate([[-rest.mean() - 1.0], factors, np.full(sources, np.log(0.5))])

    def value(self, theta: Floats, points: Mixtures) -> tuple[Floats, Floats]:
        """As `Term.value`."""
        sources = len(points.sources)
        logs = np.log(points.shares + SMALLEST_SHARE)
        powers = np.exp(theta[1 + sources :])
        parts = np.exp(theta[1 : 1 + sources] + powers * logs)  # [M, K]
        rest = np.exp(theta[0])
        total = rest + parts.sum(axis=1)
        shares = parts / total[:, None]
        return -np.log(total), np.column_stack([-rest / total, -shares, -shares * logs * powers])


@dataclass(frozen=True)
class Scale:
    """A / N^alpha, or B / D^beta; with `by_share` its factor is exp(a . r), one for each mixture.

    center: the logarithm of N or D that stands for 1.
    """

    column: str
    center: float
    by_share: bool = False

    def names(self, sources: Sequence[str]) -> list[str]:
        """The factor or the factors, and the exponent, all as logarithms."""
        factor, exponent = ("A", "alpha") if self.column == "n_params" else ("B", "beta")
        factors = [f"log {factor}[{name}]" for name in sources] if self.by_share else [f"log {factor}"]
        return [*factors, f"log {exponent}"]

    def start(self, rest: Floats, points: Mixtures, random: np.random.Generator) -> Floats:
        """A third of what the floor leaves, falling with an exponent of 0.4."""
        factors = len(points.sources) if self.by_share else 1
        return np.concatenate([np.full(factors, rest.mean() + np.log(1 / 3)), [np.log(_EXPONENT)]])

    def value(self, theta: Floats, points: Mixtures) -> tuple[Floats, Floats]:
        """As `Term.value`."""
        distance = points.scales[self.column] - self.center
        exponent = np.exp(theta[-1])
        slope = -exponent * distance
        features = points.shares if self.by_share else np.ones((len(points), 1))
        return features @ theta[:-1] + slope, np.column_stack([features, slope])


@dataclass(frozen=True)
class Bilinear:
    """(C + B / D^beta) (d + sum_i c_i r_i)^-alpha: BiMix (Ge et al. 2024, arXiv 2405.14908), a product of data and mixture.

    Published with the domain's own share alone; here the share is a weighted one, as other sources help too. Without tokens the
    first factor is a constant.
    """

    tokens_center: float | None

    def names(self, sources: Sequence[str]) -> list[str]:
        """Those of the mixture, then of the data."""
        data = [] if self.tokens_center is None else ["log B", "log beta"]
        return [*EffectivePower().names(sources), *data]

    def start(self, rest: Floats, points: Mixtures, random: np.random.Generator) -> Floats:
        """The mixture as in the power law with a small exponent; C is 1, as the weights hold its size."""
        mixture = EffectivePower().start(rest, points, random)
        mixture[0], mixture[1] = -rest.mean() / 0.1 - 2.0, np.log(0.1)
        mixture[2:] += -rest.mean() / 0.1 + rest.mean() / 0.5
        return mixture if self.tokens_center is None else np.concatenate([mixture, [np.log(1 / 3), np.log(_EXPONENT)]])

    def value(self, theta: Floats, points: Mixtures) -> tuple[Floats, Floats]:
        """As `Term.value`."""
        if self.tokens_center is None:
            return EffectivePower().value(theta, points)
        log, slopes = EffectivePower().value(theta[:-2], points)
        part, part_slopes = Scale("tokens", self.tokens_center).value(theta[-2:], points)
        weight = np.exp(part) / (1 + np.exp(part))
        return log + np.log1p(np.exp(part)), np.column_stack([slopes, weight[:, None] * part_slopes])
