"""Attention of a part of a row over keys that lie in pieces, on a CPU: a block for each piece, joined by their log-sum-exps.

With o_j and l_j the output and the log-sum-exp of block j alone, l = log sum_j exp(l_j) and o = sum_j exp(l_j - l) o_j; and the
gradients of a block's queries, keys and values are those of attention over the block with o and l in the place of o_j and l_j
(as ring attention has it, arXiv 2310.01889). So nothing is computed twice, no mask is as large as the scores, and keys and
values are read where they lie.

Queries are of one chunk, places [first, first + N) of the row; A query heads, G key/value heads, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """Queries [q0, q1) of the chunk against keys [k0, k1) of the row."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    """Query n sees keys up to n of the block; else all."""
    mask: Tensor | None = None
    """[queries, keys], where neither says it."""


def blocks_of(
    first: int, count: int, ends: Sequence[int], length: int, edges: Sequence[int], window: int | None
) -> Iterator[list[Block]]:
    """The blocks of a chunk's queries, by the queries that they share.

    Args:
        first: place of the chunk in its row.
        count: N.
        ends: where documents begin in the line of all rows, and where the last one ends.
        length: tokens of a row.
        edges: places of a row at which pieces of keys begin, from 0, and `length`.
        window: tokens that a token sees, itself included.
    """
    for begin, end in pairwise(ends):
        row, start = divmod(begin, length)
        stop = start + end - begin
        assert stop <= length, "a document that goes on in another row"
        q0, q1 = max(start, first), min(stop, first + count)
        if q0 >= q1:
            continue
        if window is not None and window < q1 - start:
            k0 = max(start, q0 - window + 1)
            distance = torch.arange(q0, q1)[:, None] - torch.arange(k0, q1)
            yield [Block(row, q0 - first, q1 - first, k0, q1, False, (distance >= 0) & (distance < window))]
            continue
        own = [Block(row, q0 - first, q1 - first, q0, q1, True)]
        for low, high in pairwise(edges):
            k0, k1 = max(start, low), min(q0, high)
            if k0 < k1:
                own.append(Block(row, q0 - first, q1 - first, k0, k1, False))
        yield own


def attend(query: Tensor, keys: Tensor, values: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """Output [n, A, D] and log-sum-exp [n, A] of a block. query: [n, A, D]; keys and values: [m, G, D]."""
    out, lse = _forward(*map(_batched, (query, keys, values)), 0.0, block.causal, attn_mask=_added(block, query), scale=scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def gradients(
    grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries [n, A, D], keys and values [m, G, D], from the gradient of the output and what all blocks together gave."""
    query, keys, values = (_batched(x) for x in (query, keys, values))
    shared = query.shape[1] // keys.shape[1]
    if shared > 1:
        keys, values = (x.repeat_interleave(shared, dim=1) for x in (keys, values))
    given = (_batched(grad), query, keys, values, _batched(out), lse.transpose(0, 1).unsqueeze(0))
    found = _backward(*given, 0.0, block.causal, attn_mask=_added(block, query), scale=scale)
    d_query, d_keys, d_values = (x[0].transpose(0, 1) for x in found)
    if shared > 1:
        d_keys, d_values = (x.unflatten(1, (-1, shared)).sum(2) for x in (d_keys, d_values))
    return d_query, d_keys, d_values


def joined(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output [n, A, D] and log-sum-exp [n, A] of blocks together."""
    if len(outs) == 1:
        return outs[0], lses[0]
    lse = torch.logsumexp(torch.stack(list(lses)), dim=0)
    total = torch.zeros_like(outs[0], dtype=lse.dtype)  # fp32 where the numbers have less
    for out, own in zip(outs, lses, strict=True):
        total.addcmul_(out.to(lse.dtype), (own - lse).exp()[..., None])
    return total.to(outs[0].dtype), lse


def _batched(x: Tensor) -> Tensor:
    """[n, heads, D] -> [1, heads, n, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _added(block: Block, like: Tensor) -> Tensor | None:
    """The mask as what is added to scores."""
    if block.mask is None:
        return None
    return torch.zeros(block.mask.shape, dtype=like.dtype).masked_fill_(~block.mask, -torch.inf)
