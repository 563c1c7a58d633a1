"""A micro-batch on the device, and what a step sums up of its losses.

B sequences of a micro-batch, S tokens in k windows of L, K sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_synth.config.errors import RankError, UserError
from megatron_synth.config.schema import NOT_BEGUN, Config, DataConfig, Progress
from megatron_synth.data.loading.loader import Batch, Loader, Tokens, WindowSource, is_packed
from megatron_synth.data.loading.prefetch import Prefetcher
from megatron_synth.data.loading.run_data import RunData
from megatron_synth.data.loading.values import SourceValues
from megatron_synth.model.documents import Documents
from megatron_synth.model.sequence_part import WHOLE, SequencePart
from megatron_synth.parallel.groups import Ranks
from megatron_synth.parallel.plan import Layout

LOSS, Z_LOSS, LABELS, SAMPLES = range(4)
"""Rows of the sums [4, K] that a step leaves behind, each by source: sums over labels of the loss and of the z-loss, number of
labels that count, number of samples."""
NUM_SUMS = 4


@dataclass(frozen=True, eq=False)
class TensorBatch:
    """A micro-batch of one data-parallel rank."""

    tokens: Tensor
    """[B, k (L + 1)] int64, window after window. [B, 0] where no stage of this rank reads any."""
    sources: Tensor
    """[B k] int64."""
    weights: Tensor
    """[B k] fp64: 1 for a window that counts, 0 for padding."""
    documents: Documents | None = None
    """Where documents begin, a window being one that begins; None: each row is one."""
    loss_mask: Tensor | None = None
    """[B, S] bool: labels that count; None: all of them."""
    part: SequencePart = WHOLE
    """Which of the S tokens of a row are this rank's, of c that share it."""
    values: Tensor | None = None
    """[columns, B, S] uint8: number of the value of each label's document; None: losses are not told apart by any."""
    samples: npt.NDArray[np.int64] | None = None
    """[B k] number of each window in the plan, on the host; None for a batch that is not of a plan."""

    @property
    def inputs(self) -> Tensor:
        """[B, S / c]: the first L tokens of each window."""
        return self.part.take(self.all_inputs)

    @property
    def labels(self) -> Tensor:
        """[B, S / c]: the last L tokens of each window."""
        return self.part.take(self.all_labels)

    @property
    def all_inputs(self) -> Tensor:
        """[B, S]: `inputs` of all ranks."""
        return self._of_windows(slice(None, -1))

    @property
    def all_labels(self) -> Tensor:
        """[B, S]: `labels` of all ranks."""
        return self._of_windows(slice(1, None))

    @property
    def own_loss_mask(self) -> Tensor | None:
        """[B, S / c]: the loss mask of this rank's labels."""
        return None if self.loss_mask is None else self.part.take(self.loss_mask)

    def _of_windows(self, part: slice) -> Tensor:
        rows, width = self.tokens.shape
        number = len(self.sources) // rows
        if number == 1:  # a view
            return self.tokens[:, part]
        return self.tokens.view(rows, number, width // number)[..., part].flatten(1)

    def padding(self) -> TensorBatch:
        """The same batch, none of whose rows count."""
        return replace(self, weights=torch.zeros_like(self.weights))


def needs_boundaries(data: DataConfig, sources: Iterable[WindowSource]) -> bool:
    """Whether windows of these sources are read with where documents begin and end: for masks, or for padding."""
    return data.document_masks or data.eod_mask_loss or any(map(is_packed, sources))


def values_for(ranks: Ranks, data: RunData) -> list[SourceValues] | None:
    """Of each source the values of its documents, where this rank reports losses by them."""
    values = data.values
    return None if values is None or not ranks.reports_loss else [values.of(source) for source in data.sources]


@contextmanager
def reading(layout: Layout) -> Iterator[None]:
    """Around reads of data. Where ranks read different rows, what one cannot read is an error of that rank, which tells it.

    Raises:
        RankError: in place of a UserError, where there are several data-parallel ranks.
    """
    try:
        yield
    except UserError as error:
        if layout.data == 1 or isinstance(error, RankError):
            raise
        raise RankError(str(error)) from error


def part_of(ranks: Ranks, config: Config) -> SequencePart:
    """The tokens of every row that are a rank's."""
    return SequencePart(ranks.context_rank, config.parallel.context_parallel_size)


def to_device(
    batch: Batch,
    device: torch.device,
    data: DataConfig,
    valid: npt.NDArray[np.bool_] | None = None,
    part: SequencePart = WHOLE,
) -> TensorBatch:
    """A loader's batch as tensors on the device; `data` says which masks are in use, `part` which tokens are this rank's.

    Tokens may come as int32, half the bytes to move: they are widened on the device.
    """
    rows = len(batch.tokens)

    def move(array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    sources = move(batch.source_ids)
    weights = torch.ones(sources.shape, dtype=torch.float64, device=device) if valid is None else move(valid).double()
    documents, counting = None, batch.learned
    if batch.boundaries is not None and data.document_masks:
        bounds = batch.boundaries
        positions = part.take(move(bounds.position_ids().reshape(rows, -1)))
        documents = Documents(move(bounds.cu_seqlens), bounds.max_seqlen, positions)
    if batch.boundaries is not None:
        bounds = batch.boundaries
        counting = bounds.loss_mask(counting) if data.eod_mask_loss else bounds.padding_mask(counting)
    values = None if batch.values is None else move(batch.values.reshape(len(batch.values), rows, -1))
    loss_mask = None if counting is None else move(counting.reshape(rows, -1))
    return TensorBatch(move(batch.tokens).long(), sources, weights, documents, loss_mask, part, values, batch.samples)


def prefetcher_of(
    config: Config, layout: Layout, ranks: Ranks, data: RunData, progress: Progress = NOT_BEGUN, *, read_ahead: bool = True
) -> Prefetcher:
    """What hands a rank the steps of a run from `progress` on, read ahead into pinned memory where there is a GPU."""
    on_gpu = ranks.device.type == "cuda"
    loader = Loader(
        data.plan,
        data.sources,
        sequence_length=config.train.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=ranks.data_rank,
        data_parallel_size=layout.data,
        windows_per_sequence=config.data.windows_per_sequence,
        with_boundaries=needs_boundaries(config.data, data.sources),
        with_tokens=ranks.needs_tokens,
        values=values_for(ranks, data),
        dtype=np.int32 if on_gpu else np.int64,  # a copy in place of a widening, where none is made
    )

    def buffer(shape: tuple[int, int], dtype: np.dtype[Any]) -> Tokens:
        return torch.from_numpy(np.empty(0, dtype)).new_empty(shape, pin_memory=on_gpu).numpy()

    def size(first_sample: int) -> int:
        return config.samples_of_step(config.step_after(first_sample, progress))

    threads, end = int(read_ahead), config.samples_at_end(progress)
    return Prefetcher(loader, size, threads=threads, end_sample=end, allocate=buffer)


def filled(rounds: list[TensorBatch], multiple: int) -> list[TensorBatch]:
    """Micro-batches whose number the interleaved schedule accepts; those added weigh nothing."""
    return rounds + [rounds[-1].padding()] * (-len(rounds) % multiple)


def labels_that_count(batch: TensorBatch) -> Tensor:
    """[B k, S / k] bool, window by window: labels of this rank whose losses count."""
    windows = len(batch.sources)
    counts = (batch.weights[:, None] > 0).expand(windows, batch.tokens.numel() // windows - 1)
    if batch.part.size > 1:
        rows = len(batch.tokens)
        own = counts.new_ones((rows, counts.numel() // rows // batch.part.size))
        counts = counts & batch.part.put(own).view(windows, -1)
    return counts if batch.loss_mask is None else counts & batch.loss_mask.reshape(windows, -1)


def sums_per_source(losses: Tensor, z_losses: Tensor | None, batch: TensorBatch, num_sources: int) -> tuple[Tensor, Tensor]:
    """Per-token losses and z-losses [B, S / c] -> sums [4, K] fp64 by source, and [B k, 2] fp64 by window: loss and labels.

    Of c ranks that share the sequence each sums up its own tokens, and the first counts the samples.
    """
    windows = len(batch.sources), -1
    counts = labels_that_count(batch)
    sums = torch.zeros((NUM_SUMS, num_sources), dtype=torch.float64, device=losses.device)
    of_windows: list[Tensor] = []
    # a NaN in a padded row or at a masked label must not survive: it is left out, not multiplied by 0
    for row, values in ((LOSS, losses), (Z_LOSS, z_losses)):
        if values is not None:
            kept = batch.part.put(values.detach()).reshape(windows).where(counts, 0.0)
            of_windows.append(kept.sum(dim=1, dtype=torch.float64))
            sums[row].index_add_(0, batch.sources, of_windows[-1])
    labels = counts.sum(dim=1, dtype=torch.float64)
    sums[LABELS].index_add_(0, batch.sources, labels)
    if batch.part.rank == 0:
        sums[SAMPLES].index_add_(0, batch.sources, batch.weights)
    return sums, torch.stack([of_windows[0], labels], dim=1)


def sums_by_value(losses: Tensor, batch: TensorBatch, num_values: int) -> Tensor:
    """Per-token losses [B, S / c] -> sums [2, V] fp64 by value: of the loss over labels that count, and their number.

    V values of all columns: a label is counted once in each column that its source has.
    """
    assert batch.values is not None
    counts = labels_that_count(batch).reshape(-1)
    kept = batch.part.put(losses.detach()).reshape(-1).where(counts, 0.0).double()
    # one place more, for labels whose source does not have the column
    sums = torch.zeros((2, num_values + 1), dtype=torch.float64, device=losses.device)
    for of_column in batch.values:
        numbers = of_column.reshape(-1).long().clamp(max=num_values)
        sums[0].index_add_(0, numbers, kept)
        sums[1].index_add_(0, numbers, counts.double())
    return sums[:, :-1]
