"""Attention of a part of a row over keys that lie in pieces, on a CPU: a block for each piece, joined by their log-sum-exps.

With o_j and l_j the output and the log-sum-exp of block j alone, l = log sum_j exp(l_j) and o = sum_j exp(l_j - l) o_j; and the
gradients of a block's queries, keys and values are those of attention over the block with o and l in the place of o_j and l_j
(as ring attention has it, arXiv 2310.01889). So nothing is computed twice, no mask is as large as the scores, and of the keys
and values of a row one piece at a time is needed.

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

_UNSEEN = -1e30
"""Added to scores that are not seen: finite, so that nothing becomes NaN, and e to it is 0."""


class Block(NamedTuple):
    """Queries of a chunk against keys of one piece, of one document."""

    row: int
    q0: int
    q1: int
    """Queries [q0, q1) of the chunk."""
    piece: int
    k0: int
    k1: int
    """Keys [k0, k1) of the piece."""
    causal: bool
    """Query n sees keys up to n of the block; else all."""
    mask: Tensor | None = None
    """[queries, keys], where neither says it."""


def blocks_of(first: int, count: int, ends: Sequence[int], length: int, window: int | None) -> Iterator[Block]:
    """The blocks of a chunk's queries; the piece of their own comes last.

    Args:
        first: place of the chunk in its row, a multiple of N.
        count: N; the keys of a row lie in pieces of so many, one after the other.
        ends: where documents begin in the line of all rows, and where the last one ends.
        length: tokens of a row.
        window: tokens that a token sees, itself included.
    """
    for begin, end in pairwise(ends):
        row, start = divmod(begin, length)
        stop = start + end - begin
        assert stop <= length, "a document that goes on in another row"
        q0, q1 = max(start, first), min(stop, first + count)
        if q0 >= q1:
            continue
        for piece in range(start // count, first // count + 1):
            origin = piece * count
            k0, k1 = max(start, origin), min(q1, origin + count)
            own, mask = origin == first, None
            if window is not None:
                if k1 <= q0 - window + 1:
                    continue
                if q1 - 1 - k0 >= window:
                    distance = torch.arange(q0, q1)[:, None] - torch.arange(k0, k1)
                    mask = (distance >= 0) & (distance < window)
            yield Block(row, q0 - first, q1 - first, piece, k0 - origin, k1 - origin, own and mask is None, mask)


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


def add(out: Tensor, lse: Tensor, of_block: Tensor, lse_of_block: Tensor) -> None:
    """Join a block to what others gave, in place: out [n, A, D] and lse [n, A], at first anything finite and -inf."""
    together = torch.logaddexp(lse, lse_of_block)
    out.mul_((lse - together).exp_()[..., None])
    out.addcmul_(of_block.to(out.dtype), (lse_of_block - together).exp_()[..., None])
    lse.copy_(together)


def _batched(x: Tensor) -> Tensor:
    """[n, heads, D] -> [1, heads, n, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _added(block: Block, like: Tensor) -> Tensor | None:
    """The mask as what is added to scores. The log-sum-exp of a query that sees no key of a block then counts for nothing."""
    if block.mask is None:
        return None
    return torch.zeros(block.mask.shape, dtype=like.dtype).masked_fill_(~block.mask, _UNSEEN)
