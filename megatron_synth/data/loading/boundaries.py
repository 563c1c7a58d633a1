"""Where documents begin and end in a batch, for attention, positions and loss: from the index alone, no token is read.

A batch of B rows of S inputs is one line of B x S positions, row after row. A row begins a stretch, and so does each
document that starts in it: attention must not cross from one stretch to the next. The label of a document's last token
would be the first token of the next document, which nothing predicts: it has no loss.

In windows that were packed the free places are filled with documents of one token, which no text is: these labels, and
the first token of the window after, are known as padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_synth.data.shards import native

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(eq=False, slots=True)  # frozen would take five times as long to make, one for every batch
class Boundaries:
    """The documents of one batch, and arrays made from them when asked for."""

    rows: int
    """B"""
    sequence_length: int
    """S"""
    cu_seqlens: Int32
    """[D + 1] ascending places in the line of B x S positions at which a stretch begins, and B x S at the end: what
    attention kernels for sequences of unequal length take."""
    ends: Int64
    """[E] ascending places in the same line of inputs whose label belongs to another document."""
    ends_at: int | None = None
    """Their address, where it is known."""
    padding: Int64 | None = None
    """Places of inputs whose label is padding of a packed window; None where no source of the run is packed."""

    @property
    def max_seqlen(self) -> int:
        """Length of the longest stretch."""
        return int(np.diff(self.cu_seqlens).max())

    def position_ids(self) -> Int32:
        """[B, S] distance of each input from the start of its stretch."""
        return native.counting(self.cu_seqlens, (self.rows, self.sequence_length))

    def loss_mask(self, learned: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.bool_]:
        """[B, S] False where the label belongs to another document than the input, or not `learned` [B, S], which changes."""
        return native.loss_mask((self.rows, self.sequence_length), self.ends, self.ends_at, learned)

    def padding_mask(self, learned: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.bool_] | None:
        """[B, S] False where the label is padding of a packed window, or is not `learned` [B, S], which changes.

        `learned` where no source of the run is packed.
        """
        if self.padding is None:
            return learned
        return native.loss_mask((self.rows, self.sequence_length), self.padding, counting=learned)


class BoundaryTable:
    """The boundaries of many batches, made at once, handed out one by one."""

    def __init__(
        self,
        offsets: Int64,
        counts: Int64,
        sequence_length: int,
        rows: int,
        packed: npt.NDArray[np.bool_] | None = None,
    ):
        """Boundaries of N / B batches.

        Args:
            offsets: starts of documents in [0, S], row by row, ascending in each.
            counts: [N] how many of them each row has.
            sequence_length: S.
            rows: B, rows of a batch.
            packed: [N] which rows are windows of a packed source; None: the run has none.
        """
        assert len(counts) % rows == 0
        self._padding = None if packed is None else _padding(offsets, counts, sequence_length, rows, packed)
        self._rows, self._length = rows, sequence_length
        self._ends_at: int | None = None
        batches, line = len(counts) // rows, rows * sequence_length
        assert line < 2**31, "cu_seqlens is int32"
        library = native.library()
        if library is not None:
            self._cu_seqlens, edges, self._ends, ends = native.lay_out(library, offsets, counts, sequence_length, rows)
            self._split, self._ends_split = edges.tolist(), ends.tolist()
            self._ends_at = native.address_of(self._ends)
            return
        row_of = np.repeat(np.arange(len(counts)), counts)
        places = row_of % rows * sequence_length + offsets
        # each row begins a stretch, whether a document starts there or not; after the last row of a batch comes its end
        inner = np.flatnonzero((offsets > 0) & (offsets < sequence_length))
        inner_rows = row_of[inner]
        before = np.searchsorted(inner_rows, np.arange(len(counts)))
        first = np.arange(len(counts)) + before + np.arange(len(counts)) // rows
        self._cu_seqlens = np.empty(len(inner) + len(counts) + batches, dtype=np.int32)
        self._cu_seqlens[first] = np.arange(len(counts)) % rows * sequence_length
        self._cu_seqlens[np.arange(len(inner)) + inner_rows + 1 + inner_rows // rows] = places[inner]
        self._split = np.append(first[::rows], len(self._cu_seqlens)).tolist()
        self._cu_seqlens[np.array(self._split[1:], dtype=np.int64) - 1] = line
        # a document that starts at S is the label of the row's last input
        ended = np.flatnonzero(offsets > 0)
        self._ends = places[ended] - 1
        self._ends_split = np.searchsorted(row_of[ended], np.arange(0, len(counts) + 1, rows)).tolist()

    def batch(self, number: int) -> Boundaries:
        """Boundaries of one batch. Costs nothing: all is made already."""
        split, ends = self._split, self._ends_split
        first = ends[number]
        return Boundaries(
            self._rows,
            self._length,
            self._cu_seqlens[split[number] : split[number + 1]],
            self._ends[first : ends[number + 1]],
            None if self._ends_at is None else self._ends_at + 8 * first,
            None if self._padding is None else self._padding[number],
        )


def _padding(offsets: Int64, counts: Int64, sequence_length: int, rows: int, packed: npt.NDArray[np.bool_]) -> list[Int64]:
    """Of each batch the places of inputs whose label begins a document of one token, or a document of the next window."""
    row_of = np.repeat(np.arange(len(counts)), counts)
    alone = np.zeros(len(offsets), np.bool_)
    alone[:-1] = (offsets[1:] == offsets[:-1] + 1) & (row_of[1:] == row_of[:-1])
    found = np.flatnonzero((alone | (offsets == sequence_length)) & (offsets > 0) & packed[row_of])
    places = row_of[found] % rows * sequence_length + offsets[found] - 1
    return np.split(places, np.searchsorted(row_of[found], np.arange(rows, len(counts), rows)))
