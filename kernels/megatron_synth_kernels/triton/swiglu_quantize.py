"""SwiGLU and its gradient, quantized while they are made: neither is ever in memory in bf16.

N rows, F channels. A program makes a tile of 128 x 64, or 128 x 128 where blocks are scaled, and writes it both ways. Bytes
per row in bf16: forward 4 F read, 2 F written; backward 6 F read, 4 F written. The largest magnitude alone, which `current`
scaling asks for first, is the same kernel without its writes. Results are those of swiglu.py and fp8.py, one after the
other, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_synth_kernels.launch import as_rows, ceil_div
from megatron_synth_kernels.torch.fp8 import BLOCK, E4M3, LARGEST, Pair, Scaling, Source, check_blocks
from megatron_synth_kernels.triton.math import rounded
from megatron_synth_kernels.triton.quantize import (
    FORMATS,
    block_scales,
    in_blocks,
    leave,
    magnitude,
    options,
    outputs,
    pointers,
    raise_to,
    saturated,
    store_blocks,
    store_both,
    tensor_scale,
)

_TILE_N, _TILE_K = 128, 64


@triton.jit
def _output(gate, up):
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _gate_gradient(grad, gate, up):
    # silu(x) = x s with s = 1 / (1 + exp(-x)):  silu' = s (1 + x (1 - s))
    grad, gate, up = grad.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    return grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))


@triton.jit
def _up_gradient(grad, gate):
    grad, gate = grad.to(tl.float32), gate.to(tl.float32)
    return grad * gate * tl.sigmoid(gate)


@triton.jit
def swiglu_tensorwise_kernel(
    x_ptr,
    row_ptr,
    transposed_ptr,
    given_ptr,
    inverse_scale_ptr,
    noted_ptr,
    n,
    width,
    x_stride,
    SCALED_TO: tl.constexpr,
    FROM_AMAX: tl.constexpr,
    NOTED: tl.constexpr,
    LARGEST: tl.constexpr,
    FORMAT: tl.constexpr,
    ROW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
) -> None:
    """x [n, 2 width] -> row [n, width], transposed [width, n]; without either, `noted` is raised to the magnitude."""
    top, left = tl.program_id(0) * TILE_N, tl.program_id(1) * TILE_K
    rows, columns = tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    inside = (rows < n - top)[:, None] & (columns < width - left)[None, :]
    place = x_ptr + top.to(tl.int64) * x_stride + left + rows[:, None] * x_stride + columns[None, :]
    gate = tl.load(place, mask=inside, other=0.0)
    up = tl.load(place + width, mask=inside, other=0.0)
    out = rounded(_output(gate, up), x_ptr.dtype.element_ty).to(tl.float32)
    seen = 0.0 if FROM_AMAX else tl.max(magnitude(out))
    if ROW or TRANSPOSED:
        scale = tensor_scale(given_ptr, SCALED_TO, FROM_AMAX)
        leave(given_ptr, inverse_scale_ptr, noted_ptr, scale, seen, FROM_AMAX, NOTED)
        data = saturated(out * scale[:, None], LARGEST, FORMAT)
        store_both(data, row_ptr, transposed_ptr, n, width, top, left, rows, columns, inside, ROW, TRANSPOSED)
    else:
        raise_to(noted_ptr, seen)


@triton.jit
def swiglu_gradient_tensorwise_kernel(
    grad_ptr,
    x_ptr,
    row_ptr,
    transposed_ptr,
    given_ptr,
    inverse_scale_ptr,
    noted_ptr,
    n,
    width,
    grad_stride,
    x_stride,
    SCALED_TO: tl.constexpr,
    FROM_AMAX: tl.constexpr,
    NOTED: tl.constexpr,
    LARGEST: tl.constexpr,
    FORMAT: tl.constexpr,
    ROW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
) -> None:
    """grad [n, width], x [n, 2 width] -> row [n, 2 width], transposed [2 width, n], or `noted` alone."""
    top, left = tl.program_id(0) * TILE_N, tl.program_id(1) * TILE_K
    rows, columns = tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    inside = (rows < n - top)[:, None] & (columns < width - left)[None, :]
    place = x_ptr + top.to(tl.int64) * x_stride + left + rows[:, None] * x_stride + columns[None, :]
    gate = tl.load(place, mask=inside, other=0.0)
    up = tl.load(place + width, mask=inside, other=0.0)
    grad_place = grad_ptr + top.to(tl.int64) * grad_stride + left + rows[:, None] * grad_stride + columns[None, :]
    grad = tl.load(grad_place, mask=inside, other=0.0)
    out = rounded(_gate_gradient(grad, gate, up), x_ptr.dtype.element_ty).to(tl.float32)
    seen = 0.0 if FROM_AMAX else tl.max(magnitude(out))
    if ROW or TRANSPOSED:
        scale = tensor_scale(given_ptr, SCALED_TO, FROM_AMAX)
        data = saturated(out * scale[:, None], LARGEST, FORMAT)
        store_both(data, row_ptr, transposed_ptr, n, 2 * width, top, left, rows, columns, inside, ROW, TRANSPOSED)
    out = rounded(_up_gradient(grad, gate), x_ptr.dtype.element_ty).to(tl.float32)
    if not FROM_AMAX:
        seen = tl.maximum(seen, tl.max(magnitude(out)))
    if ROW or TRANSPOSED:
        data = saturated(out * scale[:, None], LARGEST, FORMAT)
        store_both(data, row_ptr, transposed_ptr, n, 2 * width, top, left + width, rows, columns, inside, ROW, TRANSPOSED)
        leave(given_ptr, inverse_scale_ptr, noted_ptr, scale, seen, FROM_AMAX, NOTED)
    else:
        raise_to(noted_ptr, seen)


@triton.jit
def swiglu_blocks_kernel(
    x_ptr,
    row_ptr,
    row_scale_ptr,
    transposed_ptr,
    transposed_scale_ptr,
    n,
    width,
    x_stride,
    LARGEST: tl.constexpr,
    FORMAT: tl.constexpr,
    ROW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x [n, 2 width] -> row [n, width], its scales [width / 128, n]; transposed [width, n], its scales [n / 128, width]."""
    tile_n, tile_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    place = x_ptr + tile_n * BLOCK * x_stride + tile_k * BLOCK + rows[:, None] * x_stride + columns[None, :]
    out = rounded(_output(tl.load(place), tl.load(place + width)), x_ptr.dtype.element_ty).to(tl.float32)
    store_blocks(
        out,
        row_ptr,
        row_scale_ptr,
        transposed_ptr,
        transposed_scale_ptr,
        n,
        width,
        tile_n,
        tile_k,
        LARGEST,
        FORMAT,
        ROW,
        TRANSPOSED,
        BLOCK,
    )


@triton.jit
def swiglu_gradient_blocks_kernel(
    grad_ptr,
    x_ptr,
    row_ptr,
    row_scale_ptr,
    transposed_ptr,
    transposed_scale_ptr,
    n,
    width,
    grad_stride,
    x_stride,
    LARGEST: tl.constexpr,
    FORMAT: tl.constexpr,
    ROW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """grad [n, width], x [n, 2 width] -> row [n, 2 width] and transposed [2 width, n], scales as above.

    A program makes the tile of the gate or that of up; both at once do not fit in registers. The two are neighbors, so what
    both read comes from memory once.
    """
    is_up = tl.program_id(0) % 2
    tile_n, tile_k = (tl.program_id(0) // 2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    place = x_ptr + tile_n * BLOCK * x_stride + tile_k * BLOCK + rows[:, None] * x_stride + columns[None, :]
    grad_place = grad_ptr + tile_n * BLOCK * grad_stride + tile_k * BLOCK + rows[:, None] * grad_stride + columns[None, :]
    gate, grad = tl.load(place), tl.load(grad_place)
    if is_up:
        out = _up_gradient(grad, gate)
    else:
        out = _gate_gradient(grad, gate, tl.load(place + width))
    store_blocks(
        rounded(out, x_ptr.dtype.element_ty).to(tl.float32),
        row_ptr,
        row_scale_ptr,
        transposed_ptr,
        transposed_scale_ptr,
        n,
        2 * width,
        tile_n,
        tile_k + is_up * (width // BLOCK),
        LARGEST,
        FORMAT,
        ROW,
        TRANSPOSED,
        BLOCK,
    )


class _OneLaunch(Source):
    """A source whose kernel with one scale finds the largest magnitude, too, and that alone where nothing is to be written.

    operands: [N, ...] each, as the kernels take them, with their row strides. width: F of [N, 2F]. parts: matrices of [N, F]
    beside each other in the one that is quantized.
    """

    _tensorwise: Any
    _blocks: Any
    _tensorwise_warps: int
    parts: int

    def __init__(self, *operands: Tensor, width: int):
        self._operands = operands
        self._n, self._width = operands[0].shape[0], width
        self._strides = tuple(one.stride(0) for one in operands)

    def amax(self, out: Tensor) -> Tensor:
        """The largest magnitude."""
        self._launch((None, None, out), _MAGNITUDE_ALONE, False, False, torch.float8_e4m3fn)
        return out

    def tensorwise(
        self, scaling: Scaling, dtype: torch.dtype, *, row: bool = True, transposed: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """With one scale."""
        return self._launch(pointers(scaling), options(scaling, dtype), row, transposed, dtype)

    def _launch(
        self,
        scaling: tuple[Tensor | None, Tensor | None, Tensor | None],
        constants: dict[str, Any],
        row: bool,
        transposed: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None]:
        n, width = self._n, self._width
        data, other = outputs(n, self.parts * width, self._operands[0].device, dtype, row, transposed)
        self._tensorwise[(ceil_div(n, _TILE_N), ceil_div(width, _TILE_K))](
            *(*self._operands, data, other, *scaling, n, width, *self._strides),
            **constants,
            ROW=row,
            TRANSPOSED=transposed,
            TILE_N=_TILE_N,
            TILE_K=_TILE_K,
            num_warps=self._tensorwise_warps,
        )
        return data, other

    def blocks(self, dtype: torch.dtype, *, row: bool = True, transposed: bool = True) -> Pair:
        """In blocks of 1 x 128."""
        n, width = self._n, self._width
        check_blocks(self._operands[0][:, :width])
        device = self._operands[0].device
        data, other = outputs(n, self.parts * width, device, dtype, row, transposed)
        scale, other_scale = block_scales(n, self.parts * width, device)
        self._blocks[(self.parts * n // BLOCK, width // BLOCK)](
            *(*self._operands, data, scale, other, other_scale, n, width, *self._strides),
            LARGEST=LARGEST[dtype],
            FORMAT=FORMATS[dtype],
            ROW=row,
            TRANSPOSED=transposed,
            BLOCK=BLOCK,
            num_warps=16,
        )
        return in_blocks(data, scale, other, other_scale)


_MAGNITUDE_ALONE: dict[str, Any] = {
    "SCALED_TO": 1.0,
    "FROM_AMAX": False,
    "NOTED": True,
    "LARGEST": LARGEST[E4M3],
    "FORMAT": FORMATS[E4M3],
}


class SwiGLU(_OneLaunch):
    """swiglu_quantise.SwiGLU."""

    _tensorwise, _blocks, _tensorwise_warps, parts = swiglu_tensorwise_kernel, swiglu_blocks_kernel, 8, 1

    def __init__(self, gate_and_up: Tensor):
        self._x = as_rows(gate_and_up)
        super().__init__(self._x, width=self._x.shape[1] // 2)

    def value(self) -> Tensor:
        """The matrix itself."""
        from megatron_synth_kernels.triton.swiglu import swiglu

        return swiglu(self._x)


class SwiGLUGradient(_OneLaunch):
    """swiglu_quantise.SwiGLUGradient."""

    _tensorwise, _blocks = swiglu_gradient_tensorwise_kernel, swiglu_gradient_blocks_kernel
    _tensorwise_warps, parts = 16, 2

    def __init__(self, grad: Tensor, gate_and_up: Tensor):
        self._grad, self._x = as_rows(grad), as_rows(gate_and_up)
        super().__init__(self._grad, self._x, width=self._grad.shape[1])

    def value(self) -> Tensor:
        """The matrix itself."""
        from megatron_synth_kernels.triton.swiglu import gradient

        return gradient(self._grad, self._x)
