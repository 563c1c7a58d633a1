"""Causal attention of sequences that ranks share: each has an early and a late part of every row, so that all have equal work.

S tokens of a row, B rows, A query heads, G key/value heads (A a multiple of G), D channels of a head, c ranks. A row is cut
into 2 c chunks; rank r has the chunks r and 2 c - 1 - r, one after the other (as the zigzag order of ring attention does).

On a GPU keys and values of the other ranks are gathered for the time of one layer (Llama 3, arXiv 2407.21783, section 3.3.2),
and once more in the backward pass, which makes the scores again: a rank keeps no more than its own part of anything. With
grouped queries they are a small part of the activations. On a CPU the ranks hand out theirs in turn, so that those of one
rank are there at a time, and scores are made once (in_blocks.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_synth_kernels.torch.attention import in_blocks
from megatron_synth_kernels.torch.attention.causal import takes_flash, varlen_attention


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    group: ProcessGroup,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + causal mask) V of this rank's tokens, over the whole row or within documents.

    Args:
        query: [S / c, B, A, D], the early chunk and the late one.
        key: [S / c, B, G, D].
        value: [S / c, B, G, D].
        scale: factor of the scores.
        group: the c ranks, in order.
        cu_seqlens: int32 [n + 1], ascending places in the line of B x S tokens, row after row, at which documents begin, and
            B x S at the end; of whole rows, equal on all ranks. None: every row is one document.
        window: tokens that a token sees, itself included. None: all of its document.

    Returns:
        [S / c, B, A * D].
    """
    function = _InBlocks if query.device.type == "cpu" else _Context
    out: Tensor = function.apply(query, key, value, scale, group, cu_seqlens, window)  # type: ignore[no-untyped-call]
    return out


class _Context(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        group: ProcessGroup,
        cu_seqlens: Tensor | None,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, cu_seqlens)
        ctx.options = scale, group, window
        whole = _gather(torch.stack((key, value)), group)
        return _own_part(query, whole, scale, group, cu_seqlens, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        query, key, value, cu_seqlens = ctx.saved_tensors
        scale, group, window = ctx.options
        whole = _gather(torch.stack((key, value)), group)
        with torch.enable_grad():
            query, whole = query.detach().requires_grad_(), whole.requires_grad_()
            out = _own_part(query, whole, scale, group, cu_seqlens, window)
        d_query, d_whole = torch.autograd.grad(out, (query, whole), grad)
        d_key, d_value = _scatter(d_whole, group)
        return d_query, d_key, d_value, None, None, None, None


class _InBlocks(torch.autograd.Function):
    """On a CPU: the ranks hand out their keys and values in turn, and each chunk of them is a block of the attention."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        group: ProcessGroup,
        cu_seqlens: Tensor | None,
        window: int | None,
    ) -> Tensor:
        own = torch.stack((key, value))  # kept in their place: the values are a view of a product three times as large
        lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
        out = torch.zeros(query.shape, dtype=lse.dtype)
        blocks = list(_own_blocks(query, group, cu_seqlens, window))
        for rank in range(group.size()):
            pair = _handed_out(own, rank, group)
            for place, keys, block in _of_rank(blocks, rank, group, len(query) // 2):
                of_keys, of_values = pair[:, keys, block.row]
                found = in_blocks.attend(query[place], of_keys, of_values, block, scale)
                in_blocks.add(out[place], lse[place], *found)
        out = out.to(query.dtype).flatten(2)
        ctx.save_for_backward(query, own, cu_seqlens, out, lse)
        ctx.options = scale, group, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        query, own, cu_seqlens, out, lse = ctx.saved_tensors
        scale, group, window = ctx.options
        grad, out = grad.reshape(query.shape), out.view(query.shape)
        d_query, d_own = torch.zeros(query.shape, dtype=query.dtype), own
        blocks = list(_own_blocks(query, group, cu_seqlens, window))
        for rank in range(group.size()):
            pair = _handed_out(own, rank, group)
            d_pair = torch.zeros_like(pair)
            for place, keys, block in _of_rank(blocks, rank, group, len(query) // 2):
                of_keys, of_values = pair[:, keys, block.row]
                given = (grad[place], query[place], of_keys, of_values, out[place], lse[place])
                d_block, *d_of_keys = in_blocks.gradients(*given, block, scale)
                d_query[place] += d_block
                for which, gradient in enumerate(d_of_keys):
                    d_pair[which, keys, block.row] += gradient
            torch.distributed.reduce(d_pair, group=group, group_dst=rank)
            if rank == group.rank():
                d_own = d_pair
        return d_query, d_own[0], d_own[1], None, None, None, None


Placed = tuple[int, in_blocks.Block]


def _own_blocks(query: Tensor, group: ProcessGroup, cu_seqlens: Tensor | None, window: int | None) -> Iterator[Placed]:
    """The blocks of this rank's queries [S / c, B, A, D], each with the first token of its chunk among these."""
    size, rows = group.size(), query.shape[1]
    length, count = query.shape[0] * size, query.shape[0] // 2
    ends = [row * length for row in range(rows + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    for half, chunk in enumerate(chunks_of(group.rank(), size)):
        for block in in_blocks.blocks_of(chunk * count, count, ends, length, window):
            yield half * count, block


def _of_rank(
    blocks: Sequence[Placed], rank: int, group: ProcessGroup, count: int
) -> Iterator[tuple[tuple[slice, int], slice, in_blocks.Block]]:
    """Of the blocks those whose keys a rank has: the place of its queries, its keys among those of that rank, and the block.

    count: tokens of a chunk.
    """
    chunks = chunks_of(rank, group.size())
    for first, block in blocks:
        if block.piece in chunks:
            begin = chunks.index(block.piece) * count
            place = slice(first + block.q0, first + block.q1), block.row
            yield place, slice(begin + block.k0, begin + block.k1), block


def _handed_out(own: Tensor, rank: int, group: ProcessGroup) -> Tensor:
    """[2, S / c, B, G, D]: keys and values of a rank, on all of them."""
    pair = own if rank == group.rank() else torch.empty_like(own)
    torch.distributed.broadcast(pair, group=group, group_src=rank)
    return pair


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The early and the late chunk of a rank, of 2 `size`."""
    return rank, 2 * size - 1 - rank


@lru_cache(maxsize=8)
def _order(size: int, *, back: bool) -> list[int]:
    """Where in the ranks' parts, two chunks each, the chunks of a row are, in order; `back`: the inverse."""
    places = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
    return places if back else sorted(range(2 * size), key=places.__getitem__)


def _gather(part: Tensor, group: ProcessGroup) -> Tensor:
    """[2, S / c, B, G, D] of every rank -> [2, S, B, G, D], the chunks in the order of the row."""
    size = group.size()
    ranks = part.new_empty((size, *part.shape))
    torch.distributed.all_gather_into_tensor(ranks.view(-1), part.contiguous().view(-1), group=group)
    chunks = ranks.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)  # [2 c, 2, S / 2c, B, G, D]
    return torch.cat([chunks[place] for place in _order(size, back=False)], dim=1)


def _scatter(whole: Tensor, group: ProcessGroup) -> Tensor:
    """[2, S, B, G, D] of every rank -> [2, S / c, B, G, D]: the sum over ranks of this rank's part."""
    size = group.size()
    chunks = whole.unflatten(1, (2 * size, -1))  # [2, 2 c, S / 2c, B, G, D]
    ordered = torch.stack([chunks[:, chunk] for chunk in _order(size, back=True)])  # [2 c, 2, S / 2c, ...]
    ranks = ordered.unflatten(0, (size, 2)).transpose(1, 2).flatten(2, 3).contiguous()  # [c, 2, S / c, B, G, D]
    part = torch.empty_like(ranks[0])
    torch.distributed.reduce_scatter_tensor(part.view(-1), ranks.view(-1), group=group)
    return part


def _own_part(
    query: Tensor,
    whole: Tensor,
    scale: float,
    group: ProcessGroup,
    cu_seqlens: Tensor | None,
    window: int | None,
) -> Tensor:
    """query [S / c, B, A, D], keys and values [2, S, B, G, D] -> [S / c, B, A * D]."""
    key, value = whole.unbind(0)
    length, rows = key.shape[0], query.shape[1]
    ends = _rows(rows, length, query.device) if cu_seqlens is None else cu_seqlens
    count = length // (2 * group.size())
    parts = [
        _chunk(q, key[: first + count], value[: first + count], scale, ends, length, first, window)
        for q, first in zip(query.split(count), (chunk * count for chunk in chunks_of(group.rank(), group.size())), strict=True)
    ]
    return torch.cat(parts).flatten(2)


@lru_cache(maxsize=8)
def _rows(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(rows + 1, dtype=torch.int32, device=device) * length


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, scale: float, ends: Tensor, length: int, first: int, window: int | None
) -> Tensor:
    """query [N, B, A, D] of the tokens from `first` on, keys and values [first + N, B, G, D] -> [N, B, A, D].

    In each row documents end in `ends`, of rows of `length` tokens. What of a document lies before `first` has keys only.
    """
    count = query.shape[0]
    row, place = ends // length, ends % length
    of_keys = row * (first + count) + place.clamp(max=first + count)
    of_queries = row * count + (place - first).clamp(0, count)
    q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))  # [B N, A or G, D]
    if takes_flash(query):
        longest = (count, first + count)
        out = varlen_attention(q, k, v, of_queries.int(), of_keys.int(), *longest, scale, window)
    else:
        out = _masked(q, k, v, scale, of_queries, of_keys, query.shape[1], window)
    return out.unflatten(0, (query.shape[1], count)).transpose(0, 1)


@lru_cache(maxsize=64)
def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys]: whether a query, of the last of the keys' tokens, sees a key."""
    before = keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
    return seen if window is None else seen.triu(before + 1 - window)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    of_queries: Tensor,
    of_keys: Tensor,
    rows: int,
    window: int | None,
) -> Tensor:
    """For what flash attention does not take: fp32 above all. The mask is [B, 1, N, first + N]; nothing is waited for."""

    def documents(x: Tensor, ends: Tensor) -> Tensor:
        places = torch.arange(len(x), dtype=ends.dtype, device=ends.device)
        return torch.searchsorted(ends, places, right=True).view(rows, -1)

    # documents without queries are passed over by both: their number is the place of the last end that is not above
    same = documents(query, of_queries).unsqueeze(-1) == documents(key, of_keys).unsqueeze(-2)
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (query, key, value))
    mask = (same & _seen(q.shape[2], k.shape[2], window, query.device)).unsqueeze(1)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)
