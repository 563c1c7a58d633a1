"""Scaling laws as sums of log-linear terms.

Every law here is L = sum over k of exp(x_k . theta): each term's logarithm is linear in the internal parameters theta, which
are the logarithms of the factors (a = log A) and the exponents as they are. So log L is a log-sum-exp of linear forms: one
gradient and one curvature serve all laws, prediction never overflows, and no factor can become negative.

Legend: M points, S parameter vectors (starts, bootstraps), P parameters, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError

Floats = NDArray[np.float64]
Columns = Mapping[str, ArrayLike]

N_PARAMS, TOKENS, RATIO, UNIQUE_TOKENS = "n_params", "tokens", "ratio", "unique_tokens"
COLUMNS = (N_PARAMS, TOKENS, RATIO)
FLOPS_PER_PARAMETER_AND_TOKEN = 6.0  # compute C = 6 N D, as the papers of these laws count it

# what a parameter is multiplied with in the logarithm of a term
FEATURES: dict[str, tuple[str | None, Callable[[Floats], Floats]]] = {
    "1": (None, np.ones_like),
    "-log N": (N_PARAMS, lambda n: -np.log(n)),
    "-log D": (TOKENS, lambda d: -np.log(d)),
    "r": (RATIO, lambda r: r),
    "r^2": (RATIO, lambda r: r * r),
    "-r": (RATIO, lambda r: -r),
    "r-1": (RATIO, lambda r: r - 1),
}


class Parametrized(Protocol):
    """What names the places of theta."""

    @property
    def name(self) -> str:
        """As the command line names the law."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the order of theta."""

    @property
    def factors(self) -> frozenset[str]:
        """Those that stand in theta as logarithms."""


def named_parameters(law: Parametrized, theta: ArrayLike) -> dict[str, Any]:
    """Theta [P] or [..., P] as named parameters, factors no longer as logarithms."""
    array = np.asarray(theta, dtype=np.float64)
    named = {}
    for position, name in enumerate(law.parameters):
        value = np.exp(array[..., position]) if name in law.factors else array[..., position]
        named[name] = float(value) if array.ndim == 1 else value
    return named


def theta_of(law: Parametrized, params: Mapping[str, float]) -> Floats:
    """The theta [P] of named parameters.

    Raises:
        UserError: one has no value.
    """
    missing = [name for name in law.parameters if name not in params]
    if missing:
        raise UserError(f"law '{law.name}': no value for {', '.join(missing)}")
    return np.array([np.log(params[name]) if name in law.factors else params[name] for name in law.parameters])


@dataclass(frozen=True)
class Law:
    """A law: its terms, each a map from parameter to the feature that it multiplies in the term's logarithm.

    name: as the command line names it.
    formula: for people.
    factors: the parameters that stand as a logarithm in theta; all others stand as they are.
    source: the paper it is from, and what is ours.
    starts: a grid of starting values per parameter (`fit.start_grid`).
    optional: columns that may be constant over the points; their term is then left out (`reduced`).
    """

    name: str
    formula: str
    source: str
    terms: tuple[Mapping[str, str], ...]
    factors: frozenset[str]
    starts: Mapping[str, tuple[float, ...]]
    optional: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of theta."""
        return tuple(sorted({name for term in self.terms for name in term}, key=self._order))

    def _order(self, name: str) -> tuple[int, str]:
        return (name not in self.factors, name)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a prediction needs, in the order of COLUMNS."""
        needed = {FEATURES[feature][0] for term in self.terms for feature in term.values()}
        return tuple(column for column in COLUMNS if column in needed)

    def design(self, columns: Columns) -> Floats:
        """The features [K, M, P] of M points.

        Args:
            columns: values of `n_params`, `tokens` and `ratio` as the law needs them, broadcast against each other.

        Raises:
            UserError: a column is absent, or a value is outside its range (N and D above 0, the ratio in 0..1).
        """
        values = self._values(columns)
        size = len(next(iter(values.values())))
        names = self.parameters
        design = np.zeros((len(self.terms), size, len(names)))
        for k, term in enumerate(self.terms):
            for name, feature in term.items():
                column, function = FEATURES[feature]
                design[k, :, names.index(name)] = 1.0 if column is None else function(values[column])
        return design

    def _values(self, columns: Columns) -> dict[str, Floats]:
        return checked_columns(self.name, self.columns, columns)

    def log_predict(self, theta: ArrayLike, columns: Columns) -> Floats:
        """log L of theta [P] or [S, P] at M points: [M] or [S, M]."""
        vectors = np.atleast_2d(np.asarray(theta, dtype=np.float64))
        values, _ = log_sum_exp(self.design(columns), vectors)
        return values[0] if np.ndim(theta) == 1 else values

    def predict(self, theta: ArrayLike, columns: Columns) -> Floats:
        """L of theta [P] or [S, P] at M points: [M] or [S, M]."""
        return np.exp(self.log_predict(theta, columns))

    def gradient(self, theta: ArrayLike, columns: Columns) -> Floats:
        """d log L / d theta, analytically, of theta [P] or [S, P] at M points: [M, P] or [S, M, P]."""
        vectors, design = np.atleast_2d(np.asarray(theta, dtype=np.float64)), self.design(columns)
        gradient = term_mean(log_sum_exp(design, vectors)[1], design)
        return gradient[0] if np.ndim(theta) == 1 else gradient

    def to_params(self, theta: ArrayLike) -> dict[str, Any]:
        """Theta [P] or [..., P] as named parameters, factors no longer as logarithms."""
        return named_parameters(self, theta)

    def to_theta(self, params: Mapping[str, float]) -> Floats:
        """The theta [P] of named parameters."""
        return theta_of(self, params)

    def check(self, columns: Columns) -> None:
        """UserError if a needed column is absent, or a value is outside its range; optional columns may be absent."""
        law = self
        for column in self.optional:
            law = law if column in columns else law.without(column)
        law._values(columns)

    def without(self, column: str) -> Law:
        """This law without the terms that need a column; the floor then holds what they would have added."""
        assert column in self.optional
        kept = tuple(term for term in self.terms if all(FEATURES[feature][0] != column for feature in term.values()))
        return replace(self, terms=kept)

    def reduced(self, columns: Columns) -> Law:
        """This law for points in which some columns are absent or do not vary.

        All points having one N, its term cannot be told from the floor. Where the law says that N is optional (mixture laws)
        the term is left out, and the floor is the one at that N; D likewise.

        Raises:
            UserError: a column that the law must see vary does not.
        """
        law = self
        for column in self.columns:
            if column not in columns and column in self.optional:
                law = law.without(column)
        for column, values in law._values(columns).items():
            if values.min() < values.max():
                continue
            if column not in self.optional:
                hint = "; fit the law 'data' or 'model' instead" if self.name == "joint" else ""
                raise UserError(
                    f"law '{self.name}' needs points of different {column}; all {len(values)} have {values[0]:g}{hint}"
                )
            law = law.without(column)
        return law


def checked_columns(law: str, needed: Sequence[str], columns: Columns) -> dict[str, Floats]:
    """The needed columns, broadcast against each other.

    Raises:
        UserError: one is absent, or a value is outside its range.
    """
    absent = [name for name in needed if name not in columns]
    if absent:
        raise UserError(f"law '{law}' needs the column{'s' * (len(absent) > 1)} {', '.join(absent)}; got {list(columns)}")
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(columns[name], dtype=np.float64)) for name in needed))
    values = dict(zip(needed, arrays, strict=True))
    for name, array in values.items():
        wrong = ~np.isfinite(array) | ((array < 0) | (array > 1) if name == RATIO else array <= 0)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            expected = "a share from 0 to 1" if name == RATIO else "a number above 0"
            raise UserError(f"column {name}, point {at}: expected {expected}, got {array[at]}")
    return values


def log_sum_exp(design: Floats, theta: Floats) -> tuple[Floats, Floats]:
    """log L [S, M] and the share of each term in L [K, S, M], from features [K, M, P] and theta [S, P]."""
    exponents: Floats = np.matmul(theta, design.transpose(0, 2, 1))  # [K, S, M]
    highest = exponents.max(axis=0)
    shares = np.exp(exponents - highest)
    total = shares.sum(axis=0)
    shares /= total
    return highest + np.log(total), shares


def term_mean(shares: Floats, design: Floats) -> Floats:
    """The gradient [S, M, P] of log L: the features, averaged over the terms by their shares."""
    gradient: Floats = np.zeros((*shares.shape[1:], design.shape[2]))
    for share, features in zip(shares, design, strict=True):
        for position in np.flatnonzero(features.any(axis=0)):  # a term has few parameters
            gradient[:, :, position] += share * features[:, position]
    return gradient


# starts: of a factor, the logarithm of its term's share in the loss at the center of the points; of the others, themselves.
# 6 x 6 x 5 x 5 x 5 = 4,500 starts for the joint law
_SHARE = (-5.0, -4.0, -3.0, -2.0, -1.0, 0.0)
_FLOOR = (-1.5, -0.8, -0.4, -0.2, -0.05)
_EXPONENT = (0.1, 0.25, 0.5, 1.0, 1.8)

_HOFFMANN = "Hoffmann et al. 2022, arXiv 2203.15556, approach 3"

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law(
            name="data",
            formula="L(D) = E + B / D^beta",
            source="arXiv 2510.01631, per arm",
            terms=({"E": "1"}, {"B": "1", "beta": "-log D"}),
            factors=frozenset({"B", "E"}),
            starts={"B": _SHARE, "beta": _EXPONENT, "E": _FLOOR},
        ),
        Law(
            name="model",
            formula="L(N) = E + A / N^alpha",
            source="arXiv 2510.01631, per arm",
            terms=({"E": "1"}, {"A": "1", "alpha": "-log N"}),
            factors=frozenset({"A", "E"}),
            starts={"A": _SHARE, "alpha": _EXPONENT, "E": _FLOOR},
        ),
        Law(
            name="joint",
            formula="L(N, D) = E + A / N^alpha + B / D^beta",
            source=_HOFFMANN,
            terms=({"E": "1"}, {"A": "1", "alpha": "-log N"}, {"B": "1", "beta": "-log D"}),
            factors=frozenset({"A", "B", "E"}),
            starts={"A": _SHARE, "B": _SHARE, "E": _FLOOR, "alpha": _EXPONENT, "beta": _EXPONENT},
        ),
        # Where few sizes were trained at many budgets, A and B are known to a factor only; one exponent for both helps.
        Law(
            name="tied",
            formula="L(N, D) = E + A / N^alpha + B / D^alpha",
            source="Gadre et al. 2024, arXiv 2403.08540: E + (a M^eta + b M^-eta) C^-eta, C = 6 N D, M = D / N, alpha = 2 eta",
            terms=({"E": "1"}, {"A": "1", "alpha": "-log N"}, {"B": "1", "alpha": "-log D"}),
            factors=frozenset({"A", "B", "E"}),
            starts={"A": _SHARE, "B": _SHARE, "E": _FLOOR, "alpha": _EXPONENT},
        ),
        # Ye et al. find c + k exp(t . ratios) for the loss on one domain. With one ratio that is monotone, so it alone has no
        # best ratio inside 0..1. Here every coefficient of the joint law is such an exponential, and the floor's has a second
        # order besides, which is ours: L has a minimum inside where the floor's parabola opens upwards, or where one term falls
        # with the ratio and another rises; and the best ratio moves with N and D as the weights of the terms do.
        # It fails where the exponents themselves change with the ratio, where a small share acts abruptly (the logarithm of
        # each coefficient is smooth, of order two at most), where repetition sets in as D grows, and for more than two sources.
        Law(
            name="mixture",
            formula="L(N, D, r) = E exp(e1 r + e2 r^2) + A exp(a1 r) / N^alpha + B exp(b1 r) / D^beta",
            source=f"Ye et al. 2024, arXiv 2403.16952 (exponential in the ratio), in {_HOFFMANN}; its second order is ours",
            terms=(
                {"E": "1", "e1": "r", "e2": "r^2"},
                {"A": "1", "a1": "r", "alpha": "-log N"},
                {"B": "1", "b1": "r", "beta": "-log D"},
            ),
            factors=frozenset({"A", "B", "E"}),
            starts={
                "A": (-3.0, -1.0),
                "B": (-3.0, -1.0),
                "E": (-0.8, -0.2),
                "alpha": (0.2, 0.6),
                "beta": (0.2, 0.6),
                "a1": (-0.5, 0.5),
                "b1": (-0.5, 0.5),
                "e1": (-0.2, 0.2),
                "e2": (0.0, 0.2),
            },
            optional=(N_PARAMS, TOKENS),
        ),
        # Ye et al.'s "implicit domain aggregation" with two hidden domains, one that each source helps: convex in the ratio, so
        # its minimum is inside 0..1 or at an end. Added to the terms in N and D, as in the additive law of Shukor et al. 2025
        # (arXiv 2507.09404): the best ratio then is one for all N and D. It fails where that is not so, and where a ratio
        # between two others is worse than both. Five numbers describe the ratio, so fewer than five different ratios do not
        # determine them, and the fit says so.
        Law(
            name="mixture-additive",
            formula="L(N, D, r) = E + K exp(-s r) + J exp(-t (1 - r)) + A / N^alpha + B / D^beta",
            source="Ye et al. 2024, arXiv 2403.16952 (two implicit domains), added as in Shukor et al. 2025, arXiv 2507.09404",
            terms=(
                {"E": "1"},
                {"K": "1", "s": "-r"},
                {"J": "1", "t": "r-1"},
                {"A": "1", "alpha": "-log N"},
                {"B": "1", "beta": "-log D"},
            ),
            factors=frozenset({"A", "B", "E", "J", "K"}),
            starts={
                "A": (-3.0, -1.0),
                "B": (-3.0, -1.0),
                "E": (-0.8, -0.2),
                "J": (-5.0, -3.0),
                "K": (-5.0, -3.0),
                "alpha": (0.2, 0.6),
                "beta": (0.2, 0.6),
                "s": (1.0, 6.0),
                "t": (1.0, 6.0),
            },
            optional=(N_PARAMS, TOKENS),
        ),
    )
}
