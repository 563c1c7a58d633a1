"""RMSNorm in Triton, alone or with the addition to the residual stream before it; forward and backward.

N rows of H channels. Reads and writes, in elements per row: forward 2 H, with residual 4 H; backward 3 H, with residual 4 H.
Only the inverse root mean square, one fp32 number per row, is kept for the backward pass beside the input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_synth_kernels.launch import as_rows, ceil_div, power_of_two, processors
from megatron_synth_kernels.triton.math import rounded

MAX_HIDDEN = 32768
_TILE = 2048  # elements of a program that holds several short rows


@triton.jit
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    inverse_ptr,
    rows,
    x_stride,
    residual_stride,
    eps,
    HIDDEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows, whole."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    place = row[:, None] * HIDDEN + column[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0)
        # rounded before it is normalized: the norm is that of the stream as the next layers see it
        total = rounded(x + residual.to(tl.float32), total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / HIDDEN + eps)
    out = x * inverse[:, None] * weight[None, :]
    tl.store(out_ptr + place, rounded(out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(inverse_ptr + row, inverse, mask=row < rows)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr,
    total_grad_ptr,
    x_ptr,
    weight_ptr,
    inverse_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    grad_stride,
    total_grad_stride,
    x_stride,
    HIDDEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every so many rows, and their part of the weight's gradient."""
    # with n = x r and r = 1 / sqrt(mean(x^2) + eps):  dx = r (g w - n mean(g w n)),  dw = sum over rows of g n
    step = tl.num_programs(0) * ROWS
    column = tl.arange(0, BLOCK)
    inside = (column < HIDDEN)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    first = tl.program_id(0) * ROWS
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask = (row < rows) & inside
    next_x = tl.load(x_ptr + row * x_stride + column[None, :], mask=mask, other=0.0)
    next_grad = tl.load(grad_ptr + row * grad_stride + column[None, :], mask=mask, other=0.0)
    for _ in range(first, rows, step):
        x, grad = next_x.to(tl.float32), next_grad.to(tl.float32)
        inverse = tl.load(inverse_ptr + row, mask=row < rows, other=0.0)
        place = row * HIDDEN + column[None, :]
        current = mask
        if RESIDUAL:
            total_grad = tl.load(total_grad_ptr + row * total_grad_stride + column[None, :], mask=current, other=0.0)
        # the next row is under way while this one is worked on
        row += step
        mask = (row < rows) & inside
        next_x = tl.load(x_ptr + row * x_stride + column[None, :], mask=mask, other=0.0)
        next_grad = tl.load(grad_ptr + row * grad_stride + column[None, :], mask=mask, other=0.0)
        normalized = x * inverse
        grad_weight += grad * normalized
        grad *= weight
        mean = tl.sum(grad * normalized, axis=1)[:, None] / HIDDEN
        grad_x = (grad - normalized * mean) * inverse
        if RESIDUAL:
            grad_x += total_grad.to(tl.float32)
        tl.store(grad_x_ptr + place, rounded(grad_x, grad_x_ptr.dtype.element_ty), mask=current)
    partial = tl.sum(grad_weight, axis=0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * HIDDEN + column, partial, mask=column < HIDDEN)


@triton.jit
def sum_of_rows_kernel(x_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """x [rows, columns] fp32 -> its sum over rows, [columns], rounded once; the order depends on the shape alone."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < columns)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, rows, ROWS):
        place = x_ptr + (first + row) * columns + column[None, :]
        total += tl.load(place, mask=(first + row < rows) & inside, other=0.0)
    tl.store(out_ptr + column, rounded(tl.sum(total, axis=0), out_ptr.dtype.element_ty), mask=column < columns)


def _sum_of_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, H] fp32 -> [H]: in one launch what torch's sum and its conversion take two for."""
    rows, columns = x.shape
    out = torch.empty(columns, dtype=dtype, device=x.device)
    if rows:
        sum_of_rows_kernel[(ceil_div(columns, 32),)](x, out, rows, columns, ROWS=32, BLOCK=32, num_warps=4)
    else:
        out.zero_()
    return out


def tile_of(hidden: int) -> tuple[int, int, int]:
    """Rows of a program, columns of its tile, warps: 16 elements for each thread."""
    assert hidden <= MAX_HIDDEN, f"RMSNorm over {hidden} channels; at most {MAX_HIDDEN} fit in registers"
    block = power_of_two(hidden)
    rows = max(1, _TILE // block)
    return rows, block, min(32, max(4, rows * block // 512))


class _RMSNorm(torch.autograd.Function):
    """Outputs: the norm and, with a residual, the sum before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
        hidden = x.shape[-1]
        lines = as_rows(x)
        count = lines.shape[0]
        added = None if residual is None else as_rows(residual)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = None if residual is None else torch.empty_like(out)
        inverse = torch.empty(count, dtype=torch.float32, device=x.device)
        rows, block, warps = tile_of(hidden)
        if out.numel():
            rms_norm_forward_kernel[(ceil_div(count, rows),)](
                lines,
                added,
                weight,
                out,
                total,
                inverse,
                count,
                lines.stride(0),
                0 if added is None else added.stride(0),
                eps,
                HIDDEN=hidden,
                RESIDUAL=added is not None,
                ROWS=rows,
                BLOCK=block,
                num_warps=warps,
            )
        ctx.save_for_backward(lines if total is None else total.view(-1, hidden), weight, inverse)
        return out if total is None else (out, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, total_grad: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad_x, grad_weight = gradients(grad, x, weight, inverse, total_grad)
        return grad_x, None if total_grad is None else grad_x, grad_weight, None


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, total_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of x and of the weight.

    Args:
        grad: [..., H], of the norm's output.
        x: [N, H], what was normalized.
        weight: [H].
        inverse: [N], 1 / sqrt(mean(x^2) + eps).
        total_grad: [..., H], of the residual stream, which is added to that of x.
    """
    count, hidden = x.shape
    grad_x = torch.empty(grad.shape, dtype=x.dtype, device=x.device)
    lines = as_rows(grad)
    rest = None if total_grad is None else as_rows(total_grad)
    rows, block, warps = tile_of(hidden)
    # as many programs as run at once, each over many rows; the order of the sum depends on the device alone
    programs = min(ceil_div(count, rows), processors(x.device) * max(1, 16 // warps))
    partial = torch.empty((programs, hidden), dtype=torch.float32, device=x.device)
    if grad.numel():
        rms_norm_backward_kernel[(programs,)](
            lines,
            rest,
            x,
            weight,
            inverse,
            grad_x,
            partial,
            count,
            lines.stride(0),
            0 if rest is None else rest.stride(0),
            x.stride(0),
            HIDDEN=hidden,
            RESIDUAL=rest is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )
    return grad_x, _sum_of_rows(partial, weight.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As norm.rms_norm: x [..., H], weight [H] -> [..., H]."""
    return _RMSNorm.apply(x, None, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As norm.rms_norm_residual: x, residual [..., H], weight [H] -> rms_norm(x + residual), x + residual."""
    return _RMSNorm.apply(x, residual, weight, eps)  # type: ignore[no-any-return, no-untyped-call]
