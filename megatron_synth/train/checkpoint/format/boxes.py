"""A flat range of a tensor, as boxes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The values [begin, end) of a tensor in row-major order as boxes, in that order: (offset, shape) of each."""
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:  # within one row
        parts = [(last, begin - last * row, end - last * row)]
    else:
        parts = [(first - 1, begin - (first - 1) * row, row)] if begin < first * row else []
    for place, low, high in parts:
        for offset, box in boxes(shape[1:], low, high):
            yield (place, *offset), (1, *box)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if first <= last:
        for offset, box in boxes(shape[1:], 0, end - last * row):
            yield (last, *offset), (1, *box)
