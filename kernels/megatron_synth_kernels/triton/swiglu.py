"""SwiGLU in Triton: gate and up read where the linear layer left them, their gradients written into one buffer.

N rows of 2F channels. Reads and writes, in elements per row: forward 3 F, backward 5 F. Only the input is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_synth_kernels.launch import as_rows, ceil_div, power_of_two
from megatron_synth_kernels.triton.math import rounded, sigmoid

_BLOCK = 1024  # channels of a program: with 4 warps one 16-byte access per thread and operand in bf16
_WARPS = 4


@triton.jit
def swiglu_forward_kernel(x_ptr, out_ptr, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK channels of one row."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(x_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    out = gate * sigmoid(gate) * up
    tl.store(out_ptr + row * WIDTH + column, rounded(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(grad_ptr, x_ptr, grad_x_ptr, grad_stride, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK channels of one row."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(x_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    # silu(x) = x s with s = 1 / (1 + exp(-x)):  silu' = s (1 + x (1 - s))
    gated = sigmoid(gate)
    grad_gate = grad * gated * up * (1.0 + gate * (1.0 - gated))
    grad_up = grad * gated * gate
    out_ptr = grad_x_ptr + row * (2 * WIDTH) + column
    tl.store(out_ptr, rounded(grad_gate, grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + WIDTH, rounded(grad_up, grad_x_ptr.dtype.element_ty), mask=mask)


def _launch(rows: int, width: int) -> tuple[tuple[int], int]:
    block = min(_BLOCK, power_of_two(width))
    return (rows * ceil_div(width, block),), block


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        x = as_rows(gate_and_up)
        width = x.shape[1] // 2
        out = torch.empty((*gate_and_up.shape[:-1], width), dtype=x.dtype, device=x.device)
        if out.numel():
            grid, block = _launch(x.shape[0], width)
            swiglu_forward_kernel[grid](x, out, x.stride(0), WIDTH=width, BLOCK=block, num_warps=_WARPS)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient(grad, x)


def gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Of x [N, 2F], from grad [..., F], that of the output: [..., 2F]."""
    width = x.shape[1] // 2
    grad_x = torch.empty((*grad.shape[:-1], 2 * width), dtype=x.dtype, device=x.device)
    if grad.numel():
        lines = as_rows(grad)
        grid, block = _launch(x.shape[0], width)
        swiglu_backward_kernel[grid](lines, x, grad_x, lines.stride(0), x.stride(0), WIDTH=width, BLOCK=block, num_warps=_WARPS)
    return grad_x


def swiglu(gate_and_up: Tensor) -> Tensor:
    """As swiglu.swiglu: [..., 2F] -> [..., F]."""
    assert gate_and_up.shape[-1] % 2 == 0
    return _SwiGLU.apply(gate_and_up)  # type: ignore[no-any-return, no-untyped-call]
