"""Validation loss per domain: every token of a domain once, whatever the layout; and the scores of answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_synth.core.log import say
from megatron_synth.data.loading.loader import validation_batches, validation_windows
from megatron_synth.data.loading.run_data import RunData
from megatron_synth.data.loading.values import Values
from megatron_synth.data.shards.source import Source
from megatron_synth.data.token_bytes import token_bytes
from megatron_synth.parallel.average import Average
from megatron_synth.parallel.plan import Layout
from megatron_synth.parallel.wrap import whole_weights
from megatron_synth.train.answers import score
from megatron_synth.train.batch import (
    LABELS,
    LOSS,
    NUM_SUMS,
    SAMPLES,
    TensorBatch,
    filled,
    labels_that_count,
    needs_boundaries,
    part_of,
    reading,
    to_device,
)
from megatron_synth.train.record import metrics
from megatron_synth.train.step import Pipeline

BYTES = NUM_SUMS
"""Row of an evaluation's sums, after those of a step: bytes of the labels that count."""


@dataclass(frozen=True)
class _Sums:
    """Of a domain, over all ranks."""

    loss: float
    labels: int
    text_bytes: float
    """NaN where they are not known."""

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.loss + other.loss, self.labels + other.labels, self.text_bytes + other.text_bytes)

    @property
    def mean(self) -> float | None:
        """Nats per label; None: there is none."""
        return self.loss / self.labels if self.labels else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss / math.log(2) / self.text_bytes if self.text_bytes > 0 else None


@torch.no_grad()
def evaluate(
    pipeline: Pipeline,
    data: RunData,
    layout: Layout,
    stop_requested: Callable[[], bool] = lambda: False,
    average: Average | None = None,
) -> metrics.Record | None:
    """Mean loss per label in nats and bits per byte, of each domain and of all, and the scores of answers.

    Bits per byte = loss / ln 2 x labels / bytes, where the bytes are those of the text that these labels are. They are known
    where the tokenizer is, and gives text back as it was. A mean over nothing is None.

    Args:
        pipeline: the model.
        data: whose domains.
        layout: of the ranks.
        stop_requested: asked at every batch; any rank's yes ends the evaluation on all.
        average: of the weights, which is then evaluated too.

    Returns:
        Metric names to values, equal on every rank; `eval/tokens/<domain>` says how many labels were evaluated. Those of the
        average begin with `ema/` in place of `eval/`. None: it was stopped.
    """
    stop = _Stop(stop_requested, pipeline.ranks.device)
    with whole_weights(pipeline.chunks):
        result = _evaluate(pipeline, data, layout, stop)
        if result is None or average is None:
            return result
        with average.as_weights():
            beside = _evaluate(pipeline, data, layout, stop)
    if beside is None:
        return None
    return result | {
        metrics.EMA + name.removeprefix(metrics.EVAL): value
        for name, value in beside.items()
        if not name.startswith(metrics.EVAL_DOMAIN_TOKENS)
    }


def _evaluate(pipeline: Pipeline, data: RunData, layout: Layout, stop: _Stop) -> metrics.Record | None:
    """`evaluate` of the weights as they are, with whole weights."""
    result: metrics.Record = {}
    total, by_value = _Sums(0.0, 0, 0.0), None
    for name, source in data.validation.items():
        found = _domain(pipeline, source, layout, data.values, _table(data, pipeline.ranks.device), stop)
        if found is None:
            return None
        sums, of_domain = found
        if of_domain is not None:
            by_value = of_domain if by_value is None else by_value + of_domain
        result[metrics.EVAL_DOMAIN_LOSS + name] = sums.mean
        result[metrics.EVAL_DOMAIN_TOKENS + name] = sums.labels
        if sums.bits_per_byte is not None:
            result[metrics.EVAL_DOMAIN_BPB + name] = sums.bits_per_byte
        if not sums.labels:
            say(f"warning: data.validation.{name}: no label counts (data.eod_mask_loss, prompts): it has no loss")
        total += sums
    for name, domain in data.answers.items():
        scores = score(pipeline, layout, domain, stop.asked)
        if scores is None:
            return None
        result[metrics.EVAL_ANSWERS_BPB + name] = scores.bits_per_byte
        for prefix, value in (
            (metrics.EVAL_ACCURACY, scores.accuracy),
            (metrics.EVAL_ACCURACY_PER_BYTE, scores.accuracy_per_byte),
            (metrics.EVAL_RANK, scores.rank),
        ):
            if value is not None:
                result[prefix + name] = value
    if data.validation:
        result[metrics.EVAL_LOSS] = total.mean
    if data.values is not None and by_value is not None:
        result |= metrics.losses_by(metrics.EVAL_LOSS_BY, data.values.names, *by_value.tolist())
    if total.bits_per_byte is not None:
        result[metrics.EVAL_BPB] = total.bits_per_byte
    return result


class _Stop:
    """Whether some rank was asked to stop, agreed on at every batch."""

    def __init__(self, requested: Callable[[], bool], device: torch.device):
        self._requested, self._device = requested, device
        self._before: Tensor | None = None

    def asked(self) -> bool:
        """To be asked by all ranks. On a GPU the answer is that of the batch before: it is there, and nothing waits for it."""
        now = torch.full((), float(self._requested()), device=self._device)
        torch.distributed.all_reduce(now)
        answer, self._before = (self._before if self._device.type == "cuda" else now), now
        return answer is not None and answer.item() > 0


def _domain(
    pipeline: Pipeline, source: Source, layout: Layout, values: Values | None, table: Tensor | None, stop: _Stop
) -> tuple[_Sums, Tensor | None] | None:
    """Sums over all ranks, and by value of the documents where these are told apart; None: some rank was asked to stop."""
    train, data, batches = pipeline.config.train, pipeline.config.data, pipeline.config.eval.batches
    limit = batches * train.global_batch_size if batches else None
    windows, _ = validation_windows(source, train.sequence_length, limit)
    ranks = pipeline.ranks
    part = part_of(ranks, pipeline.config)
    stream = validation_batches(
        source,
        train.sequence_length,
        train.micro_batch_size,
        ranks.data_rank,
        layout.data,
        limit,
        with_boundaries=needs_boundaries(data, [source]),
        with_tokens=ranks.needs_tokens,
        values=None if values is None or not ranks.reports_loss else values.of(source),
    )
    by_value = None if values is None else torch.zeros((2, len(values.names)), dtype=torch.float64, device=ranks.device)
    pipeline.num_values = 0 if values is None else len(values.names)
    sums = torch.zeros((NUM_SUMS + 1, 1), dtype=torch.float64, device=ranks.device)
    while True:
        with reading(layout):
            read = list(islice(stream, layout.num_microbatches))
        if not read:
            break
        rounds = [to_device(batch, ranks.device, data, batch.valid, part) for batch in read]
        if stop.asked():
            return None
        sums[:NUM_SUMS] += pipeline.forward(filled(rounds, layout.pipeline if layout.virtual > 1 else 1), 1, backward=False)
        if by_value is not None and pipeline.by_value is not None:
            by_value += pipeline.by_value
        if ranks.reports_loss:
            for batch in rounds:
                sums[BYTES] += _text_bytes(batch, table)
    torch.distributed.all_reduce(sums)
    if by_value is not None:
        torch.distributed.all_reduce(by_value)
    rows, labels = int(sums[SAMPLES]), int(sums[LABELS])
    assert rows == windows, f"{source.name}: {rows} windows evaluated, {windows} expected"
    return _Sums(float(sums[LOSS]), labels, float(sums[BYTES])), by_value


# ---- bytes


def _text_bytes(batch: TensorBatch, table: Tensor | None) -> Tensor | float:
    """Bytes of the labels of a batch that count. table: as `_table` returns it."""
    if table is None:
        return math.nan
    labels, inputs = batch.all_labels, batch.all_inputs
    sizes = table[0, labels] - table[1, labels] * table[2, inputs]
    return sizes.where(labels_that_count(batch).view_as(sizes), 0).sum()


def _table(data: RunData, device: torch.device) -> Tensor | None:
    """By token id, int64 [3, V]: bytes, those that are no text at the begin of a document, 1 for the end of a document.

    None: they are not known.
    """
    if data.tokenizer is None:
        return None
    table = _read_table(data.tokenizer, data.eod_id, data.vocab_size)
    return None if table is None else table.to(device)


@cache
def _read_table(tokenizer: Path, eod_id: int | None, vocab_size: int) -> Tensor | None:
    try:
        known = token_bytes(tokenizer, eod_id)
    except ValueError as error:
        say(f"warning: bits per byte are not known: {error}")  # once, as this function is called once
        return None
    table = np.zeros((3, max(vocab_size, known.sizes.size)), np.int64)
    table[0, : known.sizes.size], table[1, : known.sizes.size] = known.sizes, known.added
    if eod_id is not None:
        table[2, eod_id] = 1
    return torch.from_numpy(table)
