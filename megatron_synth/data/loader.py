"""From the plan to one data-parallel rank's micro-batches.

The order of sources is deterministic, so dealing consecutive samples to ranks would tie ranks to sources (at 50/50 on
8 ranks, half of them would see one source for ever). The samples of an optimizer step are therefore permuted by key
before they are dealt; which samples a step consumes is not changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_synth.config.errors import UserError
from megatron_synth.data.mixture import MixturePlan
from megatron_synth.data.permute import derive_key, permute

Int64 = npt.NDArray[np.int64]


class WindowSource(Protocol):
    """What is asked of a source; `store.Source` has it."""

    @property
    def name(self) -> str:
        """Name in the mixture."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream."""

    def num_windows(self, sequence_length: int) -> int:
        """(num_tokens - 1) // sequence_length."""

    def read_window(self, window: int, out: npt.NDArray[np.integer]) -> None:
        """Fill `out` [S + 1] with the tokens from window x S on."""

    def document_starts(self, window: int, sequence_length: int) -> Int64:
        """Ascending offsets in [0, S) of the window at which a document starts."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of S + 1 tokens: inputs are columns 0..S-1, labels columns 1..S."""

    tokens: Int64
    """[B, S + 1]"""
    source_ids: Int64
    """[B] source of each row, an index of the plan's names."""
    samples: Int64
    """[B] sample number of each row in the plan."""
    document_starts: tuple[Int64, ...] = ()
    """Per row, ascending offsets in [0, S) at which a document starts. Empty unless asked for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ValidationBatch(Batch):
    """A batch of one domain: source_ids are 0, samples are window numbers."""

    valid: npt.NDArray[np.bool_]
    """[B] False for rows that only fill the batch up: leave them out of every sum."""


def deal(
    seed: int,
    first_sample: int,
    global_batch_size: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Int64:
    """Samples of one rank in the optimizer step that consumes [first_sample, first_sample + global_batch_size).

    The samples are permuted by key; slot j goes to micro-batch j // (B x ranks), rank (j // B) % ranks, row j % B,
    where B = micro_batch_size. Returns int64 [micro-batches, B]. Over all ranks it is each sample of the step once.
    """
    _check_rank(data_parallel_rank, data_parallel_size)
    if global_batch_size < 1 or global_batch_size % (micro_batch_size * data_parallel_size):
        raise UserError(
            f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {data_parallel_size} data-parallel ranks = {micro_batch_size * data_parallel_size}: "
            "change one of them"
        )
    slots = permute(np.arange(global_batch_size), global_batch_size, derive_key(seed, "step", first_sample))
    mine: Int64 = first_sample + slots.reshape(-1, data_parallel_size, micro_batch_size)[:, data_parallel_rank]
    return mine


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
        with_documents: bool = False,
    ):
        """`sources` in the plan's order, with the plan's names and numbers of windows at this sequence length."""
        _check_rank(data_parallel_rank, data_parallel_size)
        found = [(source.name, source.num_windows(sequence_length)) for source in sources]
        planned = list(zip(plan.names, plan.num_windows, strict=True))
        assert found == planned, f"sources (name, windows) {found} are not those of the plan {planned}"
        self.plan = plan
        self.sources = tuple(sources)
        self.sequence_length = sequence_length
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.with_documents = with_documents

    def micro_batches(self, first_sample: int, global_batch_size: int) -> Iterator[Batch]:
        """This rank's part of the optimizer step that consumes [first_sample, first_sample + global_batch_size)."""
        samples = deal(
            self.plan.seed,
            first_sample,
            global_batch_size,
            micro_batch_size=self.micro_batch_size,
            data_parallel_rank=self.data_parallel_rank,
            data_parallel_size=self.data_parallel_size,
        )
        source_ids, windows = self.plan.locate(samples.reshape(-1))
        return map(self._read, samples, source_ids.reshape(samples.shape), windows.reshape(samples.shape))

    def _read(self, samples: Int64, source_ids: Int64, windows: Int64) -> Batch:
        tokens = np.empty((len(samples), self.sequence_length + 1), dtype=np.int64)
        rows = list(zip(source_ids.tolist(), windows.tolist(), strict=True))
        for row, (source_id, window) in enumerate(rows):
            self.sources[source_id].read_window(window, tokens[row])
        starts: tuple[Int64, ...] = ()
        if self.with_documents:
            length = self.sequence_length
            starts = tuple(self.sources[source_id].document_starts(window, length) for source_id, window in rows)
        return Batch(tokens, source_ids, samples, starts)


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
    with_documents: bool = False,
) -> Iterator[ValidationBatch]:
    """Every window of a domain once, in order, dealt to the ranks; the first `max_windows` if given.

    Each rank gets the same number of batches, as all must take part in collectives: the rows that are lacking at the
    end repeat the last window and are marked as not valid. Over all ranks the valid rows are each window once, whatever
    the layout. The tail that does not fill a window (fewer than S labels) is left out; `validation_windows` counts it.
    """
    _check_rank(data_parallel_rank, data_parallel_size)
    total, _ = validation_windows(source, sequence_length, max_windows)
    stride = micro_batch_size * data_parallel_size

    def read(first: int) -> ValidationBatch:
        slots = first + np.arange(micro_batch_size)
        windows = np.minimum(slots, total - 1)
        tokens = np.empty((micro_batch_size, sequence_length + 1), dtype=np.int64)
        for row, window in enumerate(windows.tolist()):
            source.read_window(window, tokens[row])
        starts: tuple[Int64, ...] = ()
        if with_documents:
            starts = tuple(source.document_starts(window, sequence_length) for window in windows.tolist())
        return ValidationBatch(tokens, np.zeros(micro_batch_size, dtype=np.int64), windows, starts, valid=slots < total)

    rounds = range(0, total, stride)
    return (read(first + data_parallel_rank * micro_batch_size) for first in rounds)


def _check_rank(data_parallel_rank: int, data_parallel_size: int) -> None:
    assert 0 <= data_parallel_rank < data_parallel_size, f"rank {data_parallel_rank} of {data_parallel_size}"
