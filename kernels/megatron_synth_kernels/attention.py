"""Causal, grouped-query attention that never materialises S x S scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * Q K^T + causal mask) V, through torch's scaled_dot_product_attention.

    S tokens, B sequences, A query heads, G key/value heads (A a multiple of G), D channels of a head.

    Args:
        query: [S, B, A, D].
        key: [S, B, G, D].
        value: [S, B, G, D].
        scale: factor of the scores, 1 / sqrt(D) as a rule.

    Returns:
        [S, B, A * D].
    """
    sequence, batch, heads, channels = query.shape
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, A or G, S, D]
    if query.device.type == "cpu":  # its kernel gains more from contiguous heads than the copies cost
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        scale=scale,
        enable_gqa=key.shape[1] != heads,
    )  # [B, A, S, D]
    return out.permute(2, 0, 1, 3).reshape(sequence, batch, heads * channels)
