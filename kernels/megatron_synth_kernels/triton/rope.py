"""Rotary position embedding in Triton: queries and keys in one launch, positions by row or by document.

S tokens, B sequences, A query heads, G key heads, D channels. A program turns all heads of one token, whose cos and sin it
reads once, in fp32. Nothing is kept for the backward pass: the inverse of a rotation is its transpose.

Where values come with them, the backward pass carries their gradient along and leaves all three beside each other, in the
order in which a linear layer made them. So nobody has to join them.
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
    in_stride_g,
    in_stride_h,
    out_stride_g,
    out_stride_h,
    cos,
    sin,
    HEADS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """HEADS heads in groups of PER_GROUP."""
    channel = tl.arange(0, BD)[None, :]
    for first in tl.static_range(0, HEADS, BH):
        head = first + tl.arange(0, BH)[:, None]
        mask = (head < HEADS) & (channel < HALF)
        group, place = head // PER_GROUP, head % PER_GROUP
        source = in_ptr + group * in_stride_g + place * in_stride_h + channel
        low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        target = out_ptr + group * out_stride_g + place * out_stride_h + channel
        tl.store(target, rounded(low * cos - high * sin, out_ptr.dtype.element_ty), mask=mask)
        tl.store(target + HALF, rounded(high * cos + low * sin, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _carry(
    in_ptr, out_ptr, in_stride_h, out_stride_h, HEADS: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr
):
    channel = tl.arange(0, BD)[None, :]
    for first in tl.static_range(0, HEADS, BH):
        head = first + tl.arange(0, BH)[:, None]
        mask = (head < HEADS) & (channel < HALF)
        source, target = in_ptr + head * in_stride_h + channel, out_ptr + head * out_stride_h + channel
        tl.store(target, tl.load(source, mask=mask), mask=mask)
        tl.store(target + HALF, tl.load(source + HALF, mask=mask), mask=mask)


@triton.jit
def rope_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    query_out_ptr,
    key_out_ptr,
    value_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    batch,
    query_stride_s,
    query_stride_b,
    query_stride_g,
    query_stride_h,
    key_stride_s,
    key_stride_b,
    key_stride_h,
    value_stride_s,
    value_stride_b,
    value_stride_h,
    query_out_stride_s,
    query_out_stride_b,
    query_out_stride_g,
    query_out_stride_h,
    key_out_stride_s,
    key_out_stride_b,
    key_out_stride_h,
    value_out_stride_s,
    value_out_stride_b,
    value_out_stride_h,
    positions_stride_b,
    positions_stride_s,
    table_stride,
    QUERY_HEADS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    VALUE: tl.constexpr,
    POSITIONS: tl.constexpr,
    SIGN: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):
    """All heads of one token; those of values are copied, where VALUE."""
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
        query_stride_g,
        query_stride_h,
        query_out_stride_g,
        query_out_stride_h,
        cos,
        sin,
        QUERY_HEADS,
        PER_GROUP,
        HALF,
        QUERY_BLOCK,
        CHANNEL_BLOCK,
    )
    _turn(
        key_ptr + s * key_stride_s + b * key_stride_b,
        key_out_ptr + s * key_out_stride_s + b * key_out_stride_b,
        0,
        key_stride_h,
        0,
        key_out_stride_h,
        cos,
        sin,
        KEY_HEADS,
        KEY_HEADS,
        HALF,
        KEY_BLOCK,
        CHANNEL_BLOCK,
    )
    if VALUE:
        _carry(
            value_ptr + s * value_stride_s + b * value_stride_b,
            value_out_ptr + s * value_out_stride_s + b * value_out_stride_b,
            value_stride_h,
            value_out_stride_h,
            KEY_HEADS,
            HALF,
            KEY_BLOCK,
            CHANNEL_BLOCK,
        )


def _launch(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor, Tensor | None],
    base: float | ScaledBase,
    positions: Tensor | None,
    sign: int,
    length: int | None,
) -> None:
    """Queries [S, B, G, A / G, D], keys [S, B, G, D] and values into `outputs`, the first two rotated; last strides are 1."""
    sequence, batch, groups, per_group, channels = inputs[0].shape
    key_heads, half = inputs[1].shape[2], channels // 2
    cos, sin = rotary_tables(length or sequence, channels, base, torch.float32, inputs[0].device)
    channel_block = power_of_two(half)
    most = max(1, _TILE // channel_block)
    if not inputs[0].numel():
        return
    strides: list[int] = []
    for one, ends in zip((*inputs, *outputs), (4, 3, 3, 4, 3, 3), strict=True):
        strides += (0,) * ends if one is None else one.stride()[:ends]
    rope_kernel[(sequence * batch,)](
        *inputs,
        *outputs,
        cos,
        sin,
        positions,
        batch,
        *strides,
        *((0, 0) if positions is None else positions.stride()),
        cos.stride(0),
        QUERY_HEADS=groups * per_group,
        PER_GROUP=per_group,
        KEY_HEADS=key_heads,
        HALF=half,
        VALUE=inputs[2] is not None,
        POSITIONS=positions is not None,
        SIGN=sign,
        QUERY_BLOCK=min(most, power_of_two(groups * per_group)),
        KEY_BLOCK=min(most, power_of_two(key_heads)),
        CHANNEL_BLOCK=channel_block,
        num_warps=4,
    )


def _in_line(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotate(
    query: Tensor, key: Tensor, base: float | ScaledBase, positions: Tensor | None, sign: int, inplace: bool, length: int | None
) -> tuple[Tensor, Tensor]:
    """Both rotated, in their own memory on request and where no two of their elements share a place.

    Queries [S, B, A, D] or, as views of groups, [S, B, G, A / G, D] -> [S, B, A, D]; keys [S, B, G, D] -> the same.
    """
    query, key = _in_line(query), _in_line(key)
    grouped = query if query.dim() == 5 else query.unsqueeze(2)
    stays = inplace and 1 in grouped.shape[2:4] and _distinct(query)  # heads in several groups are not one stride apart
    turned = grouped if stays else torch.empty(grouped.shape, dtype=query.dtype, device=query.device)
    turned_key = key if inplace and _distinct(key) else torch.empty(key.shape, dtype=key.dtype, device=key.device)
    _launch((grouped, key, None), (turned, turned_key, None), base, positions, sign, length)
    return turned.flatten(2, 3), turned_key


def _distinct(x: Tensor) -> bool:
    """Whether every element has a place of its own (an expanded tensor has not), shown by strides that nest."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < reach:
            return False
        reach = stride * (size - 1) + reach
    return True


def _forward(
    ctx: Any, query: Tensor, key: Tensor, base: float | ScaledBase, positions: Tensor | None, inplace: bool, length: int | None
) -> tuple[Tensor, ...]:
    """Both rotated, and what a backward pass needs kept in `ctx`."""
    ctx.base, ctx.length = base, length
    ctx.save_for_backward(positions)
    # new tensor objects, so that autograd takes the rotated ones for outputs and not for its inputs
    rotated = _rotate(query.detach(), key.detach(), base, positions, 1, inplace, length)
    return tuple(x.view_as(x) if inplace else x for x in rotated)


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
        return _forward(ctx, query, key, base, positions, inplace, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (positions,) = ctx.saved_tensors
        # gradients may have other readers, so never in place
        return *_rotate(grad_query, grad_key, ctx.base, positions, -1, False, ctx.length), None, None, None, None


class _JoinedRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        base: float | ScaledBase,
        positions: Tensor | None,
        inplace: bool,
        length: int | None,
    ) -> Any:
        return *_forward(ctx, query, key, base, positions, inplace, length), value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        sequence, batch, groups, channels = grad_key.shape
        per_group = grad_query.shape[2] // groups
        whole = torch.empty((sequence, batch, groups, per_group + 2, channels), dtype=grad_key.dtype, device=grad_key.device)
        outputs = whole[..., :per_group, :], whole[..., per_group, :], whole[..., per_group + 1, :]
        grouped = _in_line(grad_query).unflatten(2, (groups, per_group))
        inputs = grouped, _in_line(grad_key), _in_line(grad_value)
        _launch(inputs, outputs, ctx.base, positions, -1, ctx.length)
        return *outputs, None, None, None, None


def joined_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    base: float | ScaledBase,
    positions: Tensor | None = None,
    inplace: bool = False,
    length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope`, and the values as they are: their three gradients lie side by side, as [S, B, G, A / G + 2, D].

    Args:
        query: [S, B, G, A / G, D].
        key: [S, B, G, D].
        value: [S, B, G, D].
        base: as for `rope`, like all that follow.
        positions: [B, S] or None.
        inplace: whether query and key may be overwritten.
        length: above all positions.

    Returns:
        [S, B, A, D], [S, B, G, D], [S, B, G, D].
    """
    assert query.shape[-1] % 2 == 0 and query.shape[:3] == key.shape[:3] and key.shape == value.shape
    return _JoinedRope.apply(query, key, value, base, positions, inplace, length)  # type: ignore[no-any-return, no-untyped-call]


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


rope.joined = joined_rope  # type: ignore[attr-defined]
