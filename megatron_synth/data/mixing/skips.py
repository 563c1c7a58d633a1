"""Samples that a run leaves out for ever, as ranges of their numbers.

A sample keeps its number whatever is left out. A *position* counts the samples that are consumed: the sample at position p is
the p-th (from 0) of those that stay. Without ranges the two are the same.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


class Skips:
    """Ranges [first, last] of sample numbers, in any order; those that touch are one."""

    def __init__(self, ranges: Sequence[tuple[int, int]] = ()):
        merged: list[list[int]] = []
        for first, last in sorted(ranges):
            assert 0 <= first <= last, (first, last)
            if merged and first <= merged[-1][1] + 1:
                merged[-1][1] = max(merged[-1][1], last)
            else:
                merged.append([first, last])
        self.ranges: tuple[tuple[int, int], ...] = tuple((first, last) for first, last in merged)
        """In order, with at least one sample between two of them."""
        self._firsts = [first for first, _ in merged]
        self._gone = np.cumsum([0, *(last - first + 1 for first, last in merged)], dtype=np.int64)
        """Samples left out by the first so many ranges."""
        self._begins = np.array(self._firsts, dtype=np.int64) - self._gone[:-1]
        """Position at which each range is passed over."""

    def __bool__(self) -> bool:
        return bool(self.ranges)

    @property
    def total(self) -> int:
        """Samples left out in all."""
        return int(self._gone[-1])

    def numbers(self, positions: Int64) -> Int64:
        """The samples at some positions. int64 [N] -> int64 [N]."""
        if not self.ranges:
            return positions
        return positions + self._gone[np.searchsorted(self._begins, positions, side="right")]

    def number(self, position: int) -> int:
        """The sample at a position."""
        return int(self.numbers(np.array([position], dtype=np.int64))[0])

    def position(self, number: int) -> int:
        """Samples with numbers below `number` that stay: the position of that sample, if it does."""
        passed = bisect.bisect_left(self._firsts, number)
        if passed and number <= self.ranges[passed - 1][1]:
            return int(self._begins[passed - 1])
        return number - int(self._gone[passed])

    def end(self, consumed: int) -> int:
        """The number after that of the last sample of the first `consumed`."""
        return self.number(consumed - 1) + 1 if consumed else 0

    def until(self, consumed: int) -> list[tuple[int, int]]:
        """The ranges among or before the first `consumed` samples that stay."""
        end = self.end(consumed)
        return [one for one in self.ranges if one[0] < end]

    def holds(self, number: int) -> bool:
        """Whether a sample is left out."""
        place = bisect.bisect_right(self._firsts, number)
        return place > 0 and number <= self.ranges[place - 1][1]
