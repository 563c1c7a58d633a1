"""Rotary position embedding in Triton: queries and keys in one launch, positions by row or by document.

S tokens, B sequences, A query heads, G key heads, D channels. A program turns all heads of one token, whose cos and sin it
reads once, in fp32. Nothing is kept for the backward pass: the inverse of a rotation is its transpose.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_synth_kernels.launch import power_of_two
from megatron_synth_kernels.torch.rope import ScaledBase, rotary_tables
from megatron_synth_kernels.triton.math import rounded

_TILE = 2048  # pairs of channels that a program turns at a time


@triton.jit
def _turn(
    in_ptr,
    out_ptr,
    in_stride_h,
    out_stride_h,
    cos,
    sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    channel = tl.arange(0, BD)[None, :]
    for first in tl.static_range(0, HEADS, BH):
        head = first + tl.arange(0, BH)[:, None]
        mask = (head < HEADS) & (channel < HALF)
        source = in_ptr + head * in_stride_h + channel
        low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        target = out_ptr + head * out_stride_h + channel
        tl.store(target, rounded(low * cos - high * sin, out_ptr.dtype.element_ty), mask=mask)
        tl.store(target + HALF, rounded(high * cos + low * sin, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel(
    query_ptr,
    key_ptr,
    query_out_ptr,
    key_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    batch,
    query_stride_s,
    query_stride_b,
    query_stride_h,
    key_stride_s,
    key_stride_b,
    key_stride_h,
    query_out_stride_s,
    query_out_stride_b,
    query_out_stride_h,
    key_out_stride_s,
    key_out_stride_b,
    key_out_stride_h,
    positions_stride_b,
    positions_stride_s,
    table_stride,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    POSITIONS: tl.constexpr,
    SIGN: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):
    """All heads of one token."""
    s = (tl.program_id(0) // batch).to(tl.int64)
    b = (tl.program_id(0) % batch).to(tl.int64)
    position = s
    if POSITIONS:
        position = tl.load(positions_ptr + b * positions_stride_b + s * positions_stride_s).to(tl.int64)
    channel = tl.arange(0, CHANNEL_BLOCK)
    cos = tl.load(cos_ptr + position * table_stride + channel, mask=channel < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * table_stride + channel, mask=channel < HALF, other=0.0)[None, :] * SIGN
    _turn(
        query_ptr + s * query_stride_s + b * query_stride_b,
        query_out_ptr + s * query_out_stride_s + b * query_out_stride_b,
        query_stride_h,
        query_out_stride_h,
        cos,
        sin,
        QUERY_HEADS,
        HALF,
        QUERY_BLOCK,
        CHANNEL_BLOCK,
    )
    _turn(
        key_ptr + s * key_stride_s + b * key_stride_b,
        key_out_ptr + s * key_out_stride_s + b * key_out_stride_b,
        key_stride_h,
        key_out_stride_h,
        cos,
        sin,
        KEY_HEADS,
        HALF,
        KEY_BLOCK,
        CHANNEL_BLOCK,
    )


def _rotate(
    query: Tensor, key: Tensor, base: float | ScaledBase, positions: Tensor | None, sign: int, inplace: bool, length: int | None
) -> tuple[Tensor, Tensor]:
    """Both rotated, in their own memory on request and where no two of their elements share a place."""
    sequence, batch, query_heads, channels = query.shape
    key_heads = key.shape[2]
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key)]
    outputs = [x if inplace and _distinct(x) else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    half = channels // 2
    cos, sin = rotary_tables(length or sequence, channels, base, torch.float32, query.device)
    channel_block = power_of_two(half)
    most = max(1, _TILE // channel_block)
    if query.numel():
        rope_kernel[(sequence * batch,)](
            *inputs,
            *outputs,
            cos,
            sin,
            positions,
            batch,
            *(stride for x in (*inputs, *outputs) for stride in x.stride()[:3]),
            *((0, 0) if positions is None else positions.stride()),
            cos.stride(0),
            QUERY_HEADS=query_heads,
            KEY_HEADS=key_heads,
            HALF=half,
            POSITIONS=positions is not None,
            SIGN=sign,
            QUERY_BLOCK=min(most, power_of_two(query_heads)),
            KEY_BLOCK=min(most, power_of_two(key_heads)),
            CHANNEL_BLOCK=channel_block,
            num_warps=4,
        )
    return outputs[0], outputs[1]


def _distinct(x: Tensor) -> bool:
    """Whether every element has a place of its own (an expanded tensor has not), shown by strides that nest."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < reach:
            return False
        reach = stride * (size - 1) + reach
    return True


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        base: float | ScaledBase,
        positions: Tensor | None,
        inplace: bool,
        length: int | None,
    ) -> Any:
        ctx.base, ctx.length = base, length
        ctx.save_for_backward(positions)
        # new tensor objects, so that autograd takes the rotated ones for outputs and not for its inputs
        rotated = _rotate(query.detach(), key.detach(), base, positions, 1, inplace, length)
        return tuple(x.view_as(x) if inplace else x for x in rotated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (positions,) = ctx.saved_tensors
        # gradients may have other readers, so never in place
        return *_rotate(grad_query, grad_key, ctx.base, positions, -1, False, ctx.length), None, None, None, None


def rope(
    query: Tensor,
    key: Tensor,
    base: float | ScaledBase,
    positions: Tensor | None = None,
    inplace: bool = False,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As rope.rope: query [S, B, A, D], key [S, B, G, D], positions [B, S] or None -> both; contiguous unless in place."""
    assert query.shape[-1] % 2 == 0 and query.shape[:2] == key.shape[:2] and query.shape[-1] == key.shape[-1]
    return _Rope.apply(query, key, base, positions, inplace, length)  # type: ignore[no-any-return, no-untyped-call]
