"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), the kind that rotates halves."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def rotary_tables(length: int, channels: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position x base^(-2 i / D) for channels i and i + D/2, each [S, 1, 1, D].

    Angles are computed in fp32 and rounded at the end, as in megatron-core and in Hugging Face's Llama.
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), 1.0 / base**exponents)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """The rotation by `sign` times the angle, [S, B, A, D] -> [S, B, A, D] in memory ordered [B, A, S, D]."""
    sequence, batch, heads, channels = x.shape
    half = channels // 2
    # the order in memory that attention reads: a head's tokens one after the other
    out = torch.empty((batch, heads, sequence, channels), dtype=x.dtype, device=x.device).permute(2, 0, 1, 3)
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # the inverse of a rotation is its transpose
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def tables_at(x: Tensor, base: float, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin for x [S, B, A, D] at its positions, [S, 1, 1, D] or, if they are given, [S, B, 1, D]."""
    cos, sin = rotary_tables(x.shape[0], x.shape[-1], base, x.dtype, x.device)
    if positions is None:
        return cos, sin
    own = positions.t()
    return cos[:, 0][own], sin[:, 0][own]


def rotary(x: Tensor, base: float, positions: Tensor | None = None) -> Tensor:
    """Rotate channels (i, i + D/2) of the token at position s by s x base^(-2 i / D).

    Args:
        x: [S, B, A, D]; any strides.
        base: period base.
        positions: [B, S] integers in [0, S). None: each row counts from 0.

    Returns:
        [S, B, A, D], in memory ordered [B, A, S, D].
    """
    return _Rotary.apply(x, *tables_at(x, base, positions))  # type: ignore[no-any-return, no-untyped-call]


def rope(
    query: Tensor, key: Tensor, base: float, positions: Tensor | None = None, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; see `rotary`.

    Args:
        query: [S, B, A, D]; any strides.
        key: [S, B, G, D]; any strides.
        base: period base.
        positions: [B, S] integers in [0, S). None: each row counts from 0.
        inplace: a backend may overwrite query and key: nothing else reads them, nor their backward pass. This one does not.

    Returns:
        [S, B, A, D] and [S, B, G, D], in the order in memory that attention reads on the device.
    """
    return rotary(query, base, positions), rotary(key, base, positions)
