"""From the plan to one data-parallel rank's micro-batches.

The order of sources is deterministic, so dealing consecutive samples to ranks would tie ranks to sources (at 50/50 on
8 ranks, half of them would see one source for ever). The samples of an optimizer step are therefore permuted by key
before they are dealt; which samples a step consumes is not changed.

A sample is a window of L inputs and as many labels of one source. A sequence of S inputs is one of them, or k = S / L
that follow each other in the plan, whose counts then are exact to less than two windows in every sequence, and fully
where k is a multiple of the mixture's period. Within the sequence they are permuted by key too, as no source is to have
its own place there. Each window keeps its L + 1 tokens: the label of its last input is the next token of its own source
and not the first of the window beside it, no label is lost, and S inputs have S labels.

What a step holds is a function of its first sample alone. It is worked out for many steps at once when steps are asked
for one after the other, since numpy's cost per call would otherwise be most of the time; that is a cache, not a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.boundaries import Boundaries, BoundaryTable
from megatron_synth.data.loading.dealing import check_rank, deal_steps
from megatron_synth.data.loading.values import SourceValues
from megatron_synth.data.mixing.mixture import MixturePlan, windows_in
from megatron_synth.data.shards import native, places
from megatron_synth.data.shards.indexed import Places, token_code
from megatron_synth.data.shards.source import Source

Int64 = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int64] | npt.NDArray[np.int32]
Allocate = Callable[[tuple[int, int], np.dtype[Any]], Tokens]

LOOK_AHEAD_ROWS = 16384
"""Rows of this rank that are worked out at once when steps follow each other: 1 MB, and 400 kB more per dozen documents
in a row when boundaries are asked for. Fewer would leave numpy's cost per call in the time of a row."""
TABLES = 3
"""Tables of rows that are kept at most: a step and those that are asked for meanwhile may be in one each."""
OPENED_AHEAD = 128
"""Indexes of shards that may be opened at once for rows that are worked out ahead. Each is read and checked when it is first
needed, 20 bytes of it for a document: of many large shards nearly every row needs another one."""


class WindowSource(Protocol):
    """What is asked of a source; `store.Source` has it."""

    @property
    def name(self) -> str:
        """Name in the mixture."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream."""

    def num_windows(self, length: int) -> int:
        """(num_tokens - 1) // length."""

    def read(self, begin: int, out: npt.NDArray[np.integer]) -> None:
        """Fill `out` [N] with the tokens from `begin` on."""

    @property
    def masked(self) -> bool:
        """Whether some of its tokens are read and not learned."""

    def read_learned(self, begin: int, out: npt.NDArray[np.bool_]) -> None:
        """Fill `out` [N] with whether the tokens from `begin` on are learned."""

    def read_window(self, window: int, out: npt.NDArray[np.integer]) -> None:
        """Fill `out` [L + 1] with the tokens from window x L on."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored tokens."""

    @property
    def vocab_size(self) -> int | None:
        """How many token ids there are: `read` refuses others. None: that is not known."""

    @property
    def places(self) -> Places:
        """Where its shards lie in memory."""

    def unreadable(self, shard: int, error: native.BusError) -> UserError:
        """What a failed read of one of the shards means."""

    def open_index(self, shard: int) -> None:
        """Open the index of a shard, so that compiled code finds documents in it."""

    def places_of(self, begins: Int64, length: int) -> tuple[Int64, Int64]:
        """Of each window the number of the shard it lies in, or -1 where only `read` will do; its first token there.

        begins: [N] first token of each window, of `length` + 1, in the stream.
        """

    def document_starts_of(self, begins: Int64, length: int) -> tuple[Int64, Int64]:
        """Ascending offsets in [0, length] of each window at which a document starts, and how many each has."""

    def will_need(self, begin: int, length: int) -> None:
        """Hint that the window will be read soon."""


@dataclass(eq=False, slots=True)  # frozen would take five times as long to make
class Batch:
    """B sequences of k windows of L + 1 tokens: a window's inputs are its tokens 0..L-1, its labels 1..L. S = k L."""

    tokens: Tokens
    """[B, k (L + 1)], window after window; [B, 0] from a loader that reads none."""
    source_ids: Int64
    """[B k] source of each window, an index of the plan's names."""
    samples: Int64
    """[B k] sample number of each window in the plan."""
    boundaries: Boundaries | None = None
    """Where documents begin and end, in B k rows of L. None unless asked for."""
    learned: npt.NDArray[np.bool_] | None = None
    """[B k, L] which labels are learned; None where all are: no source says, or none of the tokens is read."""
    values: npt.NDArray[np.uint8] | None = None
    """[columns, B k, L] number of the value that each label's document has (values.py). None unless asked for."""


@dataclass(eq=False, slots=True, kw_only=True)
class ValidationBatch(Batch):
    """A batch of one domain: source_ids are 0, samples are window numbers."""

    valid: npt.NDArray[np.bool_]
    """[B] False for rows that only fill the batch up: leave them out of every sum."""


@dataclass(frozen=True, eq=False)
class _Table:
    """What one rank gets in some steps that follow each other. A row is a window."""

    first_sample: int
    step_samples: int
    steps: int
    samples: Int64
    source_ids: Int64
    firsts: Int64
    """First token of each row in the stream of its source."""
    shards: Int64
    """Number of the shard that holds all tokens of a row; -1: there is none."""
    copier: native.RowCopier | None
    """Copies rows out of their shards' memory maps; None where nothing is compiled."""
    boundaries: BoundaryTable | None
    starts: tuple[Int64, Int64] | None
    """Where documents start in each row, and where each row's begin among these: [N + 1]. Where values are asked for."""

    @property
    def end(self) -> int:
        """First sample after the table."""
        return self.first_sample + self.steps * self.step_samples

    def step(self, first_sample: int, step_samples: int) -> int | None:
        """Number in this table of the step that begins with `first_sample`; None if it is not here."""
        step, rest = divmod(first_sample - self.first_sample, self.step_samples)
        here = step_samples == self.step_samples and rest == 0 and 0 <= step < self.steps
        return step if here else None


class Loader:
    """One data-parallel rank's view of the plan. Holds no position: the caller keeps the number of samples consumed."""

    def __init__(
        self,
        plan: MixturePlan,
        sources: Sequence[WindowSource],
        *,
        sequence_length: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        windows_per_sequence: int = 1,
        with_boundaries: bool = False,
        with_tokens: bool = True,
        dtype: npt.DTypeLike = np.int64,
        values: Sequence[SourceValues] | None = None,
    ):
        """One rank's loader.

        Args:
            plan: the order of the samples.
            sources: in the plan's order, with the plan's names and numbers of windows.
            sequence_length: S.
            micro_batch_size: B.
            data_parallel_rank: this rank.
            data_parallel_size: of so many.
            windows_per_sequence: k, of S / k tokens each.
            with_boundaries: also tell where documents begin and end.
            with_tokens: read tokens; without, batches carry sources and samples only, for pipeline stages that look at
                neither inputs nor labels.
            dtype: of the tokens delivered, int64 or int32.
            values: of each source; also tell the value of each label's document.
        """
        check_rank(data_parallel_rank, data_parallel_size)
        length, rest = divmod(sequence_length, windows_per_sequence)
        assert rest == 0, (sequence_length, windows_per_sequence)
        shifts = [spec.shift for spec in plan.sources]
        assert set(shifts) <= {0, length}, shifts
        found = [
            (source.name, windows_in(source.num_tokens, length, shifted=shift > 0))
            for source, shift in zip(sources, shifts, strict=True)
        ]
        planned = list(zip(plan.names, plan.num_windows, strict=True))
        assert found == planned, f"sources (name, windows) {found} are not those of the plan {planned}"
        self.plan = plan
        self.sources = tuple(sources)
        self.sequence_length = sequence_length
        self.windows_per_sequence, self.window_length = windows_per_sequence, length
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.with_boundaries = with_boundaries
        self.with_tokens = with_tokens
        self.dtype = np.dtype(dtype)
        assert self.dtype in (np.dtype(np.int64), np.dtype(np.int32)), self.dtype
        self._readers = [source.read for source in sources]
        self._packed = np.array([is_packed(source) for source in sources])
        self._values = values
        self._needs_starts = with_boundaries or values is not None
        self._masked = with_tokens and any(source.masked for source in sources)
        # replaced as a whole, by values that depend on their keys alone: threads may share the object
        self._tables: tuple[_Table, ...] = ()

    def micro_batches(self, first_sample: int, step_samples: int, allocate: Allocate | None = None) -> Iterator[Batch]:
        """This rank's part of the optimizer step that consumes [first_sample, first_sample + step_samples).

        step_samples: global batch size x windows per sequence.
        allocate: gives the array for the tokens of each batch from shape and type; default: a new one each time.
        """
        table, first_row, rows = self._rows(first_sample, step_samples)
        self._tables = tuple(one for one in self._tables if one.end > first_sample)  # what is behind is not read again
        micro = self.micro_batch_size * self.windows_per_sequence
        return map(partial(self._batch, table, allocate or np.empty), range(first_row, first_row + rows, micro))

    def will_need(self, first_sample: int, step_samples: int) -> None:
        """Ask the system to fetch what a step will read from disk, in the background."""
        if self.with_tokens:
            table, first_row, rows = self._rows(first_sample, step_samples)
            part = slice(first_row, first_row + rows)
            for source_id, first in zip(table.source_ids[part].tolist(), table.firsts[part].tolist(), strict=True):
                self.sources[source_id].will_need(first, self.window_length)

    def _rows(self, first_sample: int, step_samples: int) -> tuple[_Table, int, int]:
        """The rows of a step: in which table, from which row on, how many."""
        rows = step_samples // self.data_parallel_size
        for table in self._tables:
            step = table.step(first_sample, step_samples)
            if step is not None:
                break
        else:
            follows = any((table.end, table.step_samples) == (first_sample, step_samples) for table in self._tables)
            # a first step must not wait for those that may follow
            steps = self._rows_ahead() // max(rows, 1) if follows else 1
            end = self.plan.samples
            if end is not None:
                steps = min(steps, (end - first_sample) // step_samples)
            table, step = self._make(first_sample, step_samples, max(steps, 1)), 0
            # those of the steps before, which may be read after the disk was asked for these
            self._tables = (table, *self._tables[: TABLES - 1])
        return table, step * rows, rows

    def _rows_ahead(self) -> int:
        """Rows that are worked out at once: fewer while most of them would open an index of a shard."""
        if not self._needs_starts:
            return LOOK_AHEAD_ROWS
        closed = sum(int(np.count_nonzero(source.places.indexes == 0)) for source in self.sources)
        return LOOK_AHEAD_ROWS if closed <= OPENED_AHEAD else OPENED_AHEAD

    def _make(self, first_sample: int, step_samples: int, steps: int) -> _Table:
        number = self.windows_per_sequence
        assert step_samples % number == 0, (step_samples, number)
        samples = deal_steps(
            self.plan.seed,
            first_sample,
            step_samples // number,
            steps,
            self.micro_batch_size,
            self.data_parallel_rank,
            self.data_parallel_size,
            number,
        )
        samples = self.plan.skips.numbers(samples)
        source_ids, windows, offsets = self.plan.places(samples)
        firsts = windows * self.window_length + offsets
        shards, begins = self._places(source_ids, firsts)
        boundaries, found = None, None
        if self._needs_starts:
            starts, counts = self._document_starts(source_ids, firsts, shards, begins)
        if self.with_boundaries:
            packed = self._packed[source_ids] if self._packed.any() else None
            boundaries = BoundaryTable(starts, counts, self.window_length, self.micro_batch_size * number, packed)
        if self._values is not None:
            found = starts, np.concatenate([[0], np.cumsum(counts)])
        library, copier = native.library(), None
        if library is not None and self.with_tokens:
            maps = [source.places.tokens for source in self.sources]
            codes = [token_code(source.dtype) for source in self.sources]
            vocab_sizes = [source.vocab_size for source in self.sources]
            length, wide = self.window_length + 1, self.dtype.itemsize == 8
            views, rows = [source.places.view for source in self.sources], (source_ids, shards, begins)
            learned = [source.places.learned if source.masked else None for source in self.sources]
            try:
                copier = native.RowCopier(
                    library, maps, codes, vocab_sizes, *rows, length, wide=wide, views=views, learned=learned
                )
            except native.BusError as error:
                raise self._unreadable(source_ids, shards, error) from None
        return _Table(first_sample, step_samples, steps, samples, source_ids, firsts, shards, copier, boundaries, found)

    def _places(self, source_ids: Int64, firsts: Int64) -> tuple[Int64, Int64]:
        """`places_of` for rows of any sources."""
        shards, begins = np.empty_like(firsts), np.empty_like(firsts)
        for source_id in np.unique(source_ids).tolist():
            rows = np.flatnonzero(source_ids == source_id)
            shards[rows], begins[rows] = self.sources[source_id].places_of(firsts[rows], self.window_length)
        return shards, begins

    def _document_starts(self, source_ids: Int64, firsts: Int64, shards: Int64, begins: Int64) -> tuple[Int64, Int64]:
        """`document_starts_of` for rows of any sources."""
        library = native.library()
        if library is not None:

            def unresolved(row: int) -> Int64 | None:
                source = self.sources[int(source_ids[row])]
                if shards[row] >= 0:
                    source.open_index(int(shards[row]))
                    return None
                return source.document_starts_of(firsts[row : row + 1], self.window_length)[0]

            indexes = [source.places.indexes for source in self.sources]
            ends = begins + (self.window_length + 1)
            try:
                return native.document_starts(library, indexes, source_ids, shards, begins, ends, unresolved)
            except native.BusError as error:
                raise self._unreadable(source_ids, shards, error) from None
        rows_of, offsets_of = [], []
        for source_id in np.unique(source_ids).tolist():
            rows = np.flatnonzero(source_ids == source_id)
            offsets, counts = self.sources[source_id].document_starts_of(firsts[rows], self.window_length)
            rows_of.append(np.repeat(rows, counts))
            offsets_of.append(offsets)
        rows = np.concatenate(rows_of)
        by_row = np.argsort(rows, kind="stable")
        return np.concatenate(offsets_of)[by_row], np.bincount(rows, minlength=len(firsts))

    def _batch(self, table: _Table, allocate: Allocate, row: int) -> Batch:
        rows = self.micro_batch_size * self.windows_per_sequence
        part = slice(row, row + rows)
        source_ids = table.source_ids[part]
        boundaries = None if table.boundaries is None else table.boundaries.batch(row // rows)
        if not self.with_tokens:
            return Batch(np.empty((self.micro_batch_size, 0), self.dtype), source_ids, table.samples[part], boundaries)
        length = self.window_length + 1
        tokens = allocate((self.micro_batch_size, self.windows_per_sequence * length), self.dtype)
        learned = np.empty((rows, length - 1), np.bool_) if self._masked else None
        self._fill(table, row, tokens.reshape(rows, length), learned)
        values = None if self._values is None else self._values_of(table, row, rows, self._values)
        return Batch(tokens, source_ids, table.samples[part], boundaries, learned, values)

    def _values_of(self, table: _Table, row: int, rows: int, values: Sequence[SourceValues]) -> npt.NDArray[np.uint8]:
        """`Batch.values` of rows [row, row + rows) of a table."""
        assert table.starts is not None
        offsets, edges = table.starts
        found: npt.NDArray[np.uint8] | None = None
        of_rows = table.source_ids[row : row + rows]
        for source_id in np.unique(of_rows).tolist():
            own = np.flatnonzero(of_rows == source_id)
            parts = [offsets[edges[one] : edges[one + 1]] for one in (row + own).tolist()]
            counts = np.array([len(one) for one in parts])
            firsts = table.firsts[row + own]
            numbers = values[source_id].of_labels(firsts, self.window_length, np.concatenate(parts), counts)
            if found is None:
                found = np.empty((len(numbers), rows, self.window_length), np.uint8)
            found[:, own] = numbers
        assert found is not None
        return found

    def _unreadable(self, source_ids: Int64, shards: Int64, error: native.BusError) -> UserError:
        return self.sources[int(source_ids[error.row])].unreadable(int(shards[error.row]), error)

    def _fill(self, table: _Table, row: int, tokens: Tokens, learned: npt.NDArray[np.bool_] | None) -> None:
        """Rows from `row` on into `tokens` and `learned`: all at once those whose shards are mapped, else each by itself.

        So is a row with an id beyond the vocabulary, which the source then refuses with its file and byte.
        """
        done, end, begin = row, row + len(tokens), native.address_of(tokens)
        mask_at = None if learned is None else native.address_of(learned)
        while True:
            if table.copier is not None:
                try:
                    at = None if mask_at is None else mask_at + (done - row) * self.window_length
                    done = table.copier.copy(done, end, begin + (done - row) * tokens.strides[0], at)
                except native.BusError as error:
                    raise self._unreadable(table.source_ids, table.shards, error) from None
            if done == end:
                return
            source_id, first = int(table.source_ids[done]), int(table.firsts[done])
            try:
                self._readers[source_id](first, tokens[done - row])
            except UserError as error:
                raise UserError(f"{error}; read for sample {table.samples[done]}{self._where(source_id, first)}") from None
            if learned is not None:
                if self.sources[source_id].masked:
                    self.sources[source_id].read_learned(first + 1, learned[done - row])
                else:
                    learned[done - row] = True
            done += 1

    def _where(self, source_id: int, first: int) -> str:
        """Documents of the window that begins at a token of a source, in words; empty where what is damaged does not tell."""
        source = self.sources[source_id]
        try:
            return f", {places.described(source, first, first + self.window_length + 1)}" if isinstance(source, Source) else ""
        except (UserError, OSError):
            return ""


def is_packed(source: WindowSource) -> bool:
    """Whether the windows of a source were packed: they hold padding."""
    manifest = getattr(source, "manifest", None)
    return manifest is not None and manifest.packing is not None


def validation_windows(source: WindowSource, sequence_length: int, max_windows: int | None = None) -> tuple[int, int]:
    """How much of a domain an evaluation covers: (windows, label tokens left out).

    A stream of T tokens has T - 1 labels, since nothing predicts the first. Whole windows cover S x ((T - 1) // S) of
    them; the tail of (T - 1) % S < S labels is left out, as is everything after `max_windows`. Tokens evaluated are
    windows x S, exactly.
    """
    available = source.num_windows(sequence_length)
    if available < 1:
        raise UserError(
            f"data.validation.{source.name}: {source.num_tokens} tokens are not one full window of "
            f"train.sequence_length + 1 = {sequence_length + 1}: use a larger domain or a smaller train.sequence_length"
        )
    windows = available if max_windows is None else min(available, max_windows)
    assert windows > 0
    return windows, source.num_tokens - 1 - windows * sequence_length


def validation_batches(
    source: WindowSource,
    sequence_length: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    max_windows: int | None = None,
    *,
    with_boundaries: bool = False,
    with_tokens: bool = True,
    values: SourceValues | None = None,
) -> Iterator[ValidationBatch]:
    """Every window of a domain once, in order, dealt to the ranks; the first `max_windows` if given.

    Each rank gets the same number of batches, as all must take part in collectives: the rows that are lacking at the
    end repeat the last window and are marked as not valid. Over all ranks the valid rows are each window once, whatever
    the layout. The tail that does not fill a window (fewer than S labels) is left out; `validation_windows` counts it.
    with_boundaries, with_tokens, values: as for a Loader.
    """
    check_rank(data_parallel_rank, data_parallel_size)
    total, _ = validation_windows(source, sequence_length, max_windows)
    stride = micro_batch_size * data_parallel_size

    def read(first: int) -> ValidationBatch:
        slots = first + np.arange(micro_batch_size)
        windows = np.minimum(slots, total - 1)
        tokens = np.empty((micro_batch_size, sequence_length + 1 if with_tokens else 0), dtype=np.int64)
        learned = np.empty((micro_batch_size, sequence_length), np.bool_) if with_tokens and source.masked else None
        for row, window in enumerate(windows.tolist() if with_tokens else []):
            source.read_window(window, tokens[row])
            if learned is not None:
                source.read_learned(window * sequence_length + 1, learned[row])
        boundaries, numbers = None, None
        if with_boundaries or (values is not None and with_tokens):
            starts = source.document_starts_of(windows * sequence_length, sequence_length)
        if values is not None and with_tokens:
            numbers = values.of_labels(windows * sequence_length, sequence_length, *starts)
        if with_boundaries:
            packed = np.ones(micro_batch_size, np.bool_) if is_packed(source) else None
            table = BoundaryTable(*starts, sequence_length, micro_batch_size, packed)
            boundaries = table.batch(0)
        source_ids = np.zeros(micro_batch_size, dtype=np.int64)
        return ValidationBatch(tokens, source_ids, windows, boundaries, learned, numbers, valid=slots < total)

    rounds = range(0, total, stride)
    return (read(first + data_parallel_rank * micro_batch_size) for first in rounds)
