"""TransformerEngine's attention (2.9 to 2.11) behind our signature; it chooses among its own kernels, cuDNN's above all."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor
from transformer_engine.pytorch import DotProductAttention


@lru_cache(maxsize=8)
def _module(heads: int, groups: int, channels: int, scale: float, layout: str) -> Any:
    return DotProductAttention(
        heads,
        channels,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format=layout,
        attn_mask_type="causal" if layout == "sbhd" else "padding_causal",
        softmax_scale=scale,
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
) -> Tensor:
    """As attention.causal_attention: [S, B, A, D], [S, B, G, D], [S, B, G, D] -> [S, B, A D]."""
    sequence, batch, heads, channels = query.shape
    layout = "sbhd" if cu_seqlens is None else "thd"
    module = _module(heads, key.shape[2], channels, scale, layout)
    seen = (-1 if window is None else window - 1, 0)  # tokens before, tokens after
    if cu_seqlens is None:
        return module(query, key, value, window_size=seen)  # type: ignore[no-any-return]
    lines = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))  # [B S, A or G, D]
    ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens, "max_seqlen_q": max_seqlen, "max_seqlen_kv": max_seqlen}
    out: Tensor = module(*lines, window_size=seen, **ends)
    return out.reshape(batch, sequence, -1).transpose(0, 1).contiguous()
