"""How many labels of samples are in the loss, counted again from masks and indexes: no token is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from megatron_synth.data.loading.boundaries import BoundaryTable
from megatron_synth.data.loading.loader import WindowSource, is_packed
from megatron_synth.data.mixing.mixture import MixturePlan

Int64 = npt.NDArray[np.int64]

_SAMPLES = 2**20
"""Samples whose places are worked out at once."""
_LABELS = 2**22
"""Labels that are held at once, a byte each."""


def learned_labels(
    plan: MixturePlan, sources: Sequence[WindowSource], ranges: Iterable[tuple[int, int]], length: int, *, eod_mask_loss: bool
) -> Int64:
    """Labels in the loss by source, int64 [K], of samples that a run consumed.

    Args:
        plan: the order of the samples.
        sources: [K], in the order of the plan.
        ranges: [begin, end) of places in the order that a run consumes them: what `data.skip` leaves out is not counted.
        length: L, labels of a sample.
        eod_mask_loss: whether the first token of a document is no label.

    Raises:
        UserError: a mask or an index cannot be read.
    """
    found = np.zeros(len(sources), dtype=np.int64)
    for begin, end in ranges:
        for first in range(begin, end, _SAMPLES):
            samples = plan.skips.numbers(np.arange(first, min(end, first + _SAMPLES), dtype=np.int64))
            source_ids, windows, offsets = plan.places(samples)
            firsts = windows * length + offsets
            for source_id, source in enumerate(sources):
                found[source_id] += _labels_of(source, firsts[source_ids == source_id], length, eod_mask_loss)
    return found


def _labels_of(source: WindowSource, firsts: Int64, length: int, eod_mask_loss: bool) -> int:
    """Labels in the loss of windows of one source. firsts: [N] first token of each."""
    packed = is_packed(source)
    if not (source.masked or packed or eod_mask_loss):
        return len(firsts) * length
    # in the order of the files: windows of several epochs are read once
    firsts, times = np.unique(firsts, return_counts=True)
    rows, found = max(1, _LABELS // length), 0
    for begin in range(0, len(firsts), rows):
        part = firsts[begin : begin + rows]
        learned = np.ones((len(part), length), np.bool_)
        if source.masked:
            for row, first in enumerate(part.tolist()):
                source.read_learned(first + 1, learned[row])
        counting: npt.NDArray[np.bool_] | None = learned
        if packed or eod_mask_loss:
            starts, counts = source.document_starts_of(part, length)
            of_rows = np.full(len(part), packed) if packed else None
            bounds = BoundaryTable(starts, counts, length, len(part), of_rows).batch(0)
            counting = bounds.loss_mask(learned) if eod_mask_loss else bounds.padding_mask(learned)
        assert counting is not None
        found += int(np.count_nonzero(counting.reshape(len(part), length), axis=1) @ times[begin : begin + rows])
    return found
