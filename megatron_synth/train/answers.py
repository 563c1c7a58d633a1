"""Log-likelihoods of answers by a model of any layout: the one path for them.

Requests are packed into rows as documents, with attention within each and positions from 0: a row of S tokens holds many short
ones. The rows do not depend on the layout; ranks share them as those of a validation domain.

B rows of a micro-batch, S tokens of a row, R requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_synth.data.answers import AnswerDomain, Request
from megatron_synth.model.documents import Documents
from megatron_synth.model.objective import Losses
from megatron_synth.parallel.plan import Layout
from megatron_synth.train.batch import TensorBatch, filled, part_of
from megatron_synth.train.step import Pipeline


@dataclass(frozen=True)
class Scores:
    """Of a domain of questions."""

    bits_per_byte: float
    """Of the right answers: their bits over their bytes."""
    questions: int
    accuracy: float | None
    """Share of the questions whose right answer is the likeliest; None: no question has several."""
    accuracy_per_byte: float | None
    """Likewise by log-likelihood over bytes."""
    rank: float | None
    """Mean place of the right answer among the answers by log-likelihood: 1 is the likeliest."""


@torch.no_grad()
def log_likelihoods(
    pipeline: Pipeline, layout: Layout, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False
) -> npt.NDArray[np.float64] | None:
    """Of each request, the sum of the logarithms of the probabilities of the tokens asked for, in nats.

    Args:
        pipeline: the model, with whole weights.
        layout: of the ranks, which call this together.
        requests: of at most S + 1 tokens each.
        stop: asked on all ranks before every round of micro-batches; a yes ends the work on all.

    Returns:
        [R] fp64, equal on every rank; None: it was stopped.
    """
    train, ranks = pipeline.config.train, pipeline.ranks
    rows, size = _packed(requests, train.sequence_length), train.micro_batch_size
    stride = size * layout.data
    firsts = range(ranks.data_rank * size, -(-len(rows) // stride) * stride, stride)  # as many on every rank
    sums = torch.zeros(len(requests), dtype=torch.float64, device=ranks.device)
    for begin in range(0, len(firsts), layout.num_microbatches):
        batches: list[TensorBatch] = [
            _batch(rows[first : first + size], requests, pipeline) for first in firsts[begin : begin + layout.num_microbatches]
        ]
        if stop():
            return None
        kept = pipeline.apply(
            filled(batches, layout.pipeline if layout.virtual > 1 else 1), partial(_by_request, count=len(requests))
        )
        if ranks.reports_loss:
            sums += torch.stack(kept).sum(dim=0)
    torch.distributed.all_reduce(sums)
    return -sums.cpu().numpy()


def score(pipeline: Pipeline, layout: Layout, domain: AnswerDomain, stop: Callable[[], bool] = lambda: False) -> Scores | None:
    """Score a domain's answers; equal on every rank. None: it was stopped."""
    found = log_likelihoods(pipeline, layout, domain.requests, stop)
    return None if found is None else scores_of(domain, found)


def scores_of(domain: AnswerDomain, log_likelihoods: npt.NDArray[np.float64]) -> Scores:
    """Scores from the log-likelihoods [R], in nats, of a domain's answers."""
    right = domain.is_right
    bits = -float(log_likelihoods[right].sum()) / math.log(2) / int(domain.sizes[right].sum())
    by_question = np.split(np.arange(len(right)), np.flatnonzero(np.diff(domain.question)) + 1)
    several = [places for places in by_question if len(places) > 1]
    if not several:
        return Scores(bits, len(by_question), None, None, None)
    hits, hits_per_byte, ranks = [], [], []
    for places in several:
        values, is_right = log_likelihoods[places], right[places]
        hits.append(bool(is_right[np.argmax(values)]))
        hits_per_byte.append(bool(is_right[np.argmax(values / domain.sizes[places])]))
        ranks.append(1 + int((values > values[is_right]).sum()))
    return Scores(bits, len(by_question), float(np.mean(hits)), float(np.mean(hits_per_byte)), float(np.mean(ranks)))


def _packed(requests: Sequence[Request], length: int) -> list[list[int]]:
    """Numbers of the requests of each row, in order: at most S + 1 tokens, where `length` is S."""
    rows: list[list[int]] = []
    left = 0
    for number, request in enumerate(requests):
        needed = len(request.tokens)
        assert 2 <= needed <= length + 1, (needed, length)
        if needed > left:
            rows.append([])
            left = length + 1
        rows[-1].append(number)
        left -= needed
    return rows


@dataclass(frozen=True, eq=False)
class _Batch(TensorBatch):
    """A micro-batch of packed requests; the loss mask has the labels that are asked for."""

    numbers: Tensor | None = None
    """[B, S] int64: the request of each label that is asked for; 0 elsewhere."""


def _batch(rows: Sequence[Sequence[int]], requests: Sequence[Request], pipeline: Pipeline) -> _Batch:
    """Rows of requests on the device; those that are lacking are empty."""
    size, length = pipeline.config.train.micro_batch_size, pipeline.config.train.sequence_length
    device, part = pipeline.ranks.device, part_of(pipeline.ranks, pipeline.config)
    tokens = np.zeros((size, length + 1), np.int64)
    numbers, asked, positions = (np.zeros((size, length), kind) for kind in (np.int64, np.bool_, np.int32))
    begins: list[int] = []  # of requests, and of what is left of a row, in the line of B x S tokens
    for row in range(size):
        place = 0
        for number in rows[row] if row < len(rows) else ():
            request = requests[number]
            end = place + len(request.tokens)
            tokens[row, place:end] = request.tokens
            labels = slice(place + request.begin - 1, end - 1)
            asked[row, labels], numbers[row, labels] = True, number
            begins.append(row * length + place)
            positions[row, place:end] = np.arange(end - place)[: length - place]
            place = end
        if place < length:
            begins.append(row * length + place)
            positions[row, place:] = np.arange(length - place)
    ends = np.array([*begins, size * length], np.int32)

    def move(array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return _Batch(
        move(tokens),
        torch.zeros(size, dtype=torch.int64, device=device),
        torch.ones(size, dtype=torch.float64, device=device),
        Documents(move(ends), int(np.diff(ends).max()), part.take(move(positions))),
        move(asked),
        part,
        numbers=move(numbers),
    )


def _by_request(losses: Losses, batch: TensorBatch, *, count: int) -> Tensor:
    """[B, S / c] losses of the labels -> [R] fp64 sums of those asked for."""
    assert isinstance(batch, _Batch) and batch.numbers is not None and batch.own_loss_mask is not None
    counts = batch.part.put(batch.own_loss_mask) & (batch.weights[:, None] > 0)
    own = batch.part.put(losses.per_token.detach()).double().where(counts, 0.0)
    return own.new_zeros(count).index_add_(0, batch.numbers.flatten(), own.flatten())
