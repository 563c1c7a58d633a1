"""Validation loss per domain: every token of a domain once, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice

import torch

from megatron_synth.data.loading.loader import validation_batches, validation_windows
from megatron_synth.data.shards.source import Source
from megatron_synth.parallel.plan import Layout
from megatron_synth.parallel.wrap import whole_weights
from megatron_synth.train.batch import LABELS, LOSS, NUM_SUMS, SAMPLES, TensorBatch, needs_boundaries, to_device
from megatron_synth.train.record import metrics
from megatron_synth.train.step import Pipeline


@torch.no_grad()
def evaluate(pipeline: Pipeline, domains: Mapping[str, Source], layout: Layout) -> dict[str, float | int]:
    """Mean loss per token in nats and, where the bytes of the text are known, bits per byte, of each domain and of all.

    Bits per byte = loss / ln 2 x tokens / bytes, tokens and bytes being those of the whole domain.

    Returns:
        Metric names to values, equal on every rank; `eval/tokens/<domain>` says how many tokens were evaluated.
    """
    result: dict[str, float | int] = {}
    total_loss = total_tokens = total_bytes = 0.0
    with whole_weights(pipeline.chunks):
        for name, source in domains.items():
            loss, tokens = _domain(pipeline, source, layout)
            result[metrics.EVAL_DOMAIN_LOSS + name] = loss
            result[metrics.EVAL_DOMAIN_TOKENS + name] = tokens
            total_loss += loss * tokens
            total_tokens += tokens
            counts = source.manifest.counts if source.manifest else None
            if counts is None or not counts.text_bytes:
                total_bytes = math.nan
                continue
            text_bytes = tokens * counts.text_bytes / counts.tokens
            result[metrics.EVAL_DOMAIN_BPB + name] = loss * tokens / math.log(2) / text_bytes
            total_bytes += text_bytes
    if total_tokens:
        result[metrics.EVAL_LOSS] = total_loss / total_tokens
        if not math.isnan(total_bytes):
            result[metrics.EVAL_BPB] = total_loss / math.log(2) / total_bytes
    return result


def _domain(pipeline: Pipeline, source: Source, layout: Layout) -> tuple[float, int]:
    """Mean loss per label that counts, and number of these, over all ranks."""
    train, data, batches = pipeline.config.train, pipeline.config.data, pipeline.config.eval.batches
    limit = batches * train.global_batch_size if batches else None
    windows, _ = validation_windows(source, train.sequence_length, limit)
    ranks = pipeline.ranks
    stream = validation_batches(
        source,
        train.sequence_length,
        train.micro_batch_size,
        ranks.data_rank,
        layout.data,
        limit,
        with_boundaries=needs_boundaries(data, [source]),
        with_tokens=ranks.needs_tokens,
    )
    sums = torch.zeros((NUM_SUMS, 1), dtype=torch.float64, device=ranks.device)
    while rounds := [to_device(batch, ranks.device, data, batch.valid) for batch in islice(stream, layout.num_microbatches)]:
        sums += pipeline.forward(_filled(rounds, layout.pipeline if layout.virtual > 1 else 1), 1, backward=False)
    torch.distributed.all_reduce(sums)
    rows, labels = int(sums[SAMPLES]), int(sums[LABELS])
    assert rows == windows, f"{source.name}: {rows} windows evaluated, {windows} expected"
    return float(sums[LOSS]) / max(labels, 1), labels


def _filled(rounds: list[TensorBatch], multiple: int) -> list[TensorBatch]:
    """Micro-batches whose number the interleaved schedule accepts; those added weigh nothing."""
    return rounds + [rounds[-1].padding()] * (-len(rounds) % multiple)
