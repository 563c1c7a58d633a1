"""A flat range of a tensor as boxes."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_synth.train.checkpoint.format.boxes import boxes


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_boxes_cover_a_range_exactly_and_in_order(shape: list[int], data: st.DataObject) -> None:
    total = math.prod(shape)
    begin = data.draw(st.integers(0, total))
    end = data.draw(st.integers(begin, total))
    values = np.arange(total).reshape(shape)
    found = []
    for offset, box in boxes(shape, begin, end):
        found += values[tuple(slice(at, at + length) for at, length in zip(offset, box, strict=True))].ravel().tolist()
    assert found == list(range(begin, end))
    if len(shape) == 2:
        assert len(list(boxes(shape, begin, end))) <= 3
