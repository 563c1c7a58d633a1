"""Validation loss per domain: every token of a domain once, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice

import torch

from megatron_synth.data.loader import validation_batches, validation_windows
from megatron_synth.data.store import Source
from megatron_synth.parallel.plan import Layout
from megatron_synth.parallel.wrap import whole_weights
from megatron_synth.train import metrics
from megatron_synth.train.step import Pipeline, TensorBatch, to_device


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
    """Mean loss per token and tokens evaluated, over all ranks."""
    train, batches = pipeline.config.train, pipeline.config.eval.batches
    limit = batches * train.global_batch_size if batches else None
    windows, _ = validation_windows(source, train.sequence_length, limit)
    device = pipeline.ranks.device
    stream = validation_batches(
        source, train.sequence_length, train.micro_batch_size, pipeline.ranks.data_rank, layout.data, limit
    )
    sums = torch.zeros((2, 1), dtype=torch.float64, device=device)
    while rounds := [to_device(batch, device, batch.valid) for batch in islice(stream, layout.num_microbatches)]:
        sums += pipeline.forward(_filled(rounds, layout.pipeline if layout.virtual > 1 else 1), 1, backward=False)
    torch.distributed.all_reduce(sums)
    loss, rows = sums[:, 0].tolist()
    assert rows == windows, f"{source.name}: {rows} windows evaluated, {windows} expected"
    return loss / rows, windows * train.sequence_length


def _filled(rounds: list[TensorBatch], multiple: int) -> list[TensorBatch]:
    """Micro-batches whose number the interleaved schedule accepts; those added weigh nothing."""
    tokens, sources, weights = rounds[-1]
    return rounds + [(tokens, sources, torch.zeros_like(weights))] * (-len(rounds) % multiple)
