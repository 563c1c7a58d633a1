"""What a law over shares is fitted to: the mixture of every run, and where the table has them its size and its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Floats

SUM_TOLERANCE = 0.02
"""How far the shares of a row may be from a sum of 1; published tables are rounded to two or three digits."""


@dataclass(frozen=True)
class Mixtures:
    """Mixtures of K sources.

    sources: [K] names.
    shares: [M, K]; every row sums to 1.
    n_params, tokens: [M] model sizes and training tokens; None where the law is not to see them.
    """

    sources: tuple[str, ...]
    shares: Floats
    n_params: Floats | None = None
    tokens: Floats | None = None

    def __len__(self) -> int:
        return len(self.shares)

    def rows(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Mixtures:
        """The chosen rows."""
        pick = [None if column is None else column[chosen] for column in (self.n_params, self.tokens)]
        return Mixtures(self.sources, self.shares[chosen], *pick)

    @property
    def scales(self) -> dict[str, Floats]:
        """Logarithms [M] of the size and the tokens, those that there are."""
        given = {"n_params": self.n_params, "tokens": self.tokens}
        return {name: np.log(values) for name, values in given.items() if values is not None}

    @property
    def settings(self) -> NDArray[np.int64]:
        """A number [M] per row, equal for rows that differ in the seed alone."""
        columns = [np.round(self.shares, 9), *(column[:, None] for column in self.scales.values())]
        return np.unique(np.hstack(columns), axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def at(self, shares: ArrayLike, n_params: float | None = None, tokens: float | None = None) -> Mixtures:
        """Other mixtures [C, K] of the same sources, at one size and one number of tokens where this has them.

        Raises:
            UserError: the law knows sizes or tokens, and none is given.
        """
        mixtures = np.atleast_2d(np.asarray(shares, dtype=np.float64))
        columns: list[Floats | None] = []
        for name, own, value in (("n_params", self.n_params, n_params), ("tokens", self.tokens, tokens)):
            if own is not None and value is None:
                raise UserError(f"the law knows {name}: say at which {name} mixtures are compared")
            columns.append(None if own is None or value is None else np.full(len(mixtures), float(value)))
        return Mixtures(self.sources, mixtures, *columns)


def normalized(amounts: ArrayLike, where: str = "shares", lines: NDArray[np.int64] | None = None) -> Floats:
    """Shares [M, K] of rows that sum to 1 but for rounding, or of amounts such as tokens, which are divided by their sum.

    Args:
        amounts: [M, K].
        where: what they are, for messages.
        lines: [M] of a file, for messages.

    Raises:
        UserError: a value is negative or not finite; or rows sum to something else, so that a source may be missing.
    """
    values = np.asarray(amounts, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise UserError(f"{where}: expected a row of at least two sources per run, got shape {values.shape}")
    wrong = ~np.isfinite(values) | (values < 0)
    if wrong.any():
        row, column = (int(index) for index in np.argwhere(wrong)[0])
        place = f"row {row}" if lines is None else f"line {lines[row]}"
        raise UserError(f"{where}: {place}, source {column}: expected a share of 0 or more, got {values[row, column]}")
    totals = values.sum(axis=1)
    amount = totals.min() > 1 + SUM_TOLERANCE  # tokens by source
    off = np.flatnonzero(np.abs(totals - 1) > SUM_TOLERANCE)
    if len(off) and not amount:
        place = f"row {off[0]}" if lines is None else f"line {lines[off[0]]}"
        raise UserError(
            f"{where}: the shares of {place} sum to {totals[off[0]]:.4g}, expected 1: is a source missing from --sources?"
        )
    return np.asarray(values / totals[:, None])
