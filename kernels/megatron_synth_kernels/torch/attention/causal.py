"""Causal, grouped-query attention that never materializes S x S scores, over whole rows or within documents.

S tokens, B sequences, A query heads, G key/value heads (A a multiple of G), D channels of a head.
"""

from __future__ import annotations

import inspect
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + causal mask) V, through torch's scaled_dot_product_attention or its flash attention.

    Args:
        query: [S, B, A, D].
        key: [S, B, G, D].
        value: [S, B, G, D].
        scale: factor of the scores, 1 / sqrt(D) as a rule.
        cu_seqlens: int32 [n + 1], ascending places in the line of B x S tokens, row after row, at which documents begin, and
            B x S at the end. Every row begins one; a document may be empty. No token sees another document. None: every row
            is one document.
        max_seqlen: length of the longest document; with cu_seqlens.
        window: tokens that a token sees, itself included, and no further back. None: all of its document.

    Returns:
        [S, B, A * D].
    """
    sequence, batch = query.shape[:2]
    if window is not None and window >= (max_seqlen or sequence):
        window = None
    if window is not None and cu_seqlens is None and query.device.type != "cpu":
        # whole rows are documents to what knows windows
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * sequence
        max_seqlen = sequence
    if cu_seqlens is None and batch > 1 and query.device.type != "cpu":
        # Sequences as more heads of one: torch's flash attention copies what is not [B, S, A, D] in memory, its output and the
        # gradient of it, in every backward pass. As [1, S, B A, D] they lie as it wants them.
        q, k, v = (x.reshape(sequence, 1, -1, query.shape[-1]) for x in (query, key, value))
        one = _whole_rows(q, k, v, scale)  # [1, B A, S, D]
        return one.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
    if cu_seqlens is None:
        out = _whole_rows(query, key, value, scale, window)  # [B, A, S, D]
    elif query.device.type == "cpu":
        out = _one_by_one(query, key, value, scale, cu_seqlens, window)
    elif takes_flash(query):
        assert max_seqlen is not None
        return _flash(query, key, value, scale, cu_seqlens, max_seqlen, window)
    else:
        out = _masked(query, key, value, scale, cu_seqlens, window)
    return out.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


def _by_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[S, B, A or G, D] -> [B, A or G, S, D], contiguous where that gains more than the copies cost: on a CPU."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if query.device.type == "cpu":
        return query.contiguous(), key.contiguous(), value.contiguous()
    return query, key, value


def _whole_rows(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    query, key, value = _by_head(query, key, value)
    return _causal(query, key, value, scale, window)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """[B, A or G, S, D] -> [B, A, S, D]."""
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    mask = None if window is None or length <= window else _band(length, window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


@lru_cache(maxsize=8)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[S, S]: whether the token of a row sees the token of a column, itself or one of the `window` - 1 before it."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - window)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, scale: float, cu_seqlens: Tensor, window: int | None = None
) -> Tensor:
    """One call per document: measured faster than a mask from documents of some 10 tokens on, and no more work than needed."""
    sequence = query.shape[0]
    lengths = [end - begin for begin, end in pairwise(cu_seqlens.tolist()) if end > begin]
    rows = []
    # views of views: the backward pass puts each row together once
    for q, k, v in zip(*(x.unbind(0) for x in _by_head(query, key, value)), strict=True):
        own = _take(lengths, sequence)
        parts = (x.unsqueeze(0).split(own, dim=2) for x in (q, k, v))
        documents = [_causal(a, b, c, scale, window).squeeze(0) for a, b, c in zip(*parts, strict=True)]
        rows.append(documents[0] if len(documents) == 1 else torch.cat(documents, dim=1))
    assert not lengths, "cu_seqlens goes beyond the last row"
    return torch.stack(rows)


def _take(lengths: list[int], total: int) -> list[int]:
    """Removes from the front of `lengths` those that make up `total`."""
    taken = 0
    for number, length in enumerate(lengths, 1):
        taken += length
        if taken >= total:
            assert taken == total, "a document goes on from one row to the next"
            own = lengths[:number]
            del lengths[:number]
            return own
    raise AssertionError("cu_seqlens ends before the last row")


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, cu_seqlens: Tensor, max_seqlen: int, window: int | None = None
) -> Tensor:
    """Flash attention for sequences of unequal length (Dao, 2023, arXiv 2307.08691), in torch since 2.10."""
    sequence, batch = query.shape[:2]
    q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))  # [B S, A or G, D]
    out = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, window)
    return out.reshape(batch, sequence, -1).transpose(0, 1).contiguous()


def takes_flash(query: Tensor) -> bool:
    """Whether torch's flash attention takes heads of this kind, [..., D]."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """[T, A, D], [U, G, D], [U, G, D] -> [T, A, D]: documents by documents, queries being the last tokens of their keys.

    of_queries, of_keys: int32 [n + 1], where documents begin, and T or U at the end; a document may have keys only.
    """
    varlen_attn, must_say_grouped = _varlen()
    out = varlen_attn(
        query,
        key,
        value,
        of_queries,
        of_keys,
        longest_query,
        longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # tokens before, tokens after: causal
        **({"enable_gqa": query.shape[1] != key.shape[1]} if must_say_grouped else {}),
    )
    assert isinstance(out, Tensor)
    return out


@cache
def _varlen() -> tuple[Any, bool]:
    """torch's function, and whether it must be told of grouped queries. Before torch 2.12 it takes them without a word."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _masked(query: Tensor, key: Tensor, value: Tensor, scale: float, cu_seqlens: Tensor, window: int | None = None) -> Tensor:
    """For what flash attention does not take: fp32 above all, and heads of odd sizes.

    The mask is [B, 1, S, S]; nothing waits for the device.
    """
    sequence, batch, grouped = query.shape[0], query.shape[1], query.shape[2] != key.shape[2]
    places = torch.arange(batch * sequence, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, places, right=True).view(batch, 1, sequence)
    same = document.unsqueeze(-1) == document.unsqueeze(-2)
    if window is not None:
        same = same.triu(1 - window)
    query, key, value = _by_head(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=same.tril(), scale=scale, enable_gqa=grouped)
