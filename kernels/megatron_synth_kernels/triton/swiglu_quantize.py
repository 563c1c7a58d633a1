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
from megatron_synth_kernels.triton.math import packed, sigmoid, through, widened
from megatron_synth_kernels.triton.quantize import (
    FORMATS,
    block_scales,
    in_blocks,
    largest_magnitude,
    leave,
    options,
    outputs,
    pointers,
    quarter_of,
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
    return gate * sigmoid(gate) * up


@triton.jit
def _gate_gradient(grad, gate, up):
    # silu(x) = x s with s = 1 / (1 + exp(-x)):  silu' = s (1 + x (1 - s))
    grad, gate, up = grad.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
    gated = sigmoid(gate)
    return grad * gated * up * (1.0 + gate * (1.0 - gated))


@triton.jit
def _up_gradient(grad, gate):
    grad, gate = grad.to(tl.float32), gate.to(tl.float32)
    return grad * sigmoid(gate) * gate


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
    out = through(_output(gate, up), x_ptr.dtype.element_ty)
    seen = 0.0 if FROM_AMAX else largest_magnitude(out)
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
    out = through(_gate_gradient(grad, gate, up), x_ptr.dtype.element_ty)
    seen = 0.0 if FROM_AMAX else largest_magnitude(out)
    if ROW or TRANSPOSED:
        scale = tensor_scale(given_ptr, SCALED_TO, FROM_AMAX)
        data = saturated(out * scale[:, None], LARGEST, FORMAT)
        store_both(data, row_ptr, transposed_ptr, n, 2 * width, top, left, rows, columns, inside, ROW, TRANSPOSED)
    out = through(_up_gradient(grad, gate), x_ptr.dtype.element_ty)
    if not FROM_AMAX:
        seen = tl.maximum(seen, largest_magnitude(out))
    if ROW or TRANSPOSED:
        data = saturated(out * scale[:, None], LARGEST, FORMAT)
        store_both(data, row_ptr, transposed_ptr, n, 2 * width, top, left + width, rows, columns, inside, ROW, TRANSPOSED)
        leave(given_ptr, inverse_scale_ptr, noted_ptr, scale, seen, FROM_AMAX, NOTED)
    else:
        raise_to(noted_ptr, seen)


@triton.jit
def _output_quarter(x_ptr, x_stride, width, PART: tl.constexpr, BLOCK: tl.constexpr):
    """The output in every fourth row of a tile."""
    out = _output(quarter_of(x_ptr, x_stride, PART, BLOCK), quarter_of(x_ptr + width, x_stride, PART, BLOCK))
    return through(out, x_ptr.dtype.element_ty)


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
    tile = x_ptr + tile_n * BLOCK * x_stride + tile_k * BLOCK
    store_blocks(
        _output_quarter(tile, x_stride, width, 0, BLOCK),
        _output_quarter(tile, x_stride, width, 1, BLOCK),
        _output_quarter(tile, x_stride, width, 2, BLOCK),
        _output_quarter(tile, x_stride, width, 3, BLOCK),
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

    A program makes the tile of the gate and then that of up, from what it loads once.
    """
    tile_n, tile_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    gate_tile = x_ptr + tile_n * BLOCK * x_stride + tile_k * BLOCK
    grad_tile = grad_ptr + tile_n * BLOCK * grad_stride + tile_k * BLOCK
    gate_a, grad_a = quarter_of(gate_tile, x_stride, 0, BLOCK), quarter_of(grad_tile, grad_stride, 0, BLOCK)
    gate_b, grad_b = quarter_of(gate_tile, x_stride, 1, BLOCK), quarter_of(grad_tile, grad_stride, 1, BLOCK)
    gate_c, grad_c = quarter_of(gate_tile, x_stride, 2, BLOCK), quarter_of(grad_tile, grad_stride, 2, BLOCK)
    gate_d, grad_d = quarter_of(gate_tile, x_stride, 3, BLOCK), quarter_of(grad_tile, grad_stride, 3, BLOCK)
    # small while they wait: rounded, two in a word
    up_a, up_b = packed(_up_gradient(grad_a, gate_a), dtype), packed(_up_gradient(grad_b, gate_b), dtype)
    up_c, up_d = packed(_up_gradient(grad_c, gate_c), dtype), packed(_up_gradient(grad_d, gate_d), dtype)
    store_blocks(
        through(_gate_gradient(grad_a, gate_a, quarter_of(gate_tile + width, x_stride, 0, BLOCK)), dtype),
        through(_gate_gradient(grad_b, gate_b, quarter_of(gate_tile + width, x_stride, 1, BLOCK)), dtype),
        through(_gate_gradient(grad_c, gate_c, quarter_of(gate_tile + width, x_stride, 2, BLOCK)), dtype),
        through(_gate_gradient(grad_d, gate_d, quarter_of(gate_tile + width, x_stride, 3, BLOCK)), dtype),
        *(row_ptr, row_scale_ptr, transposed_ptr, transposed_scale_ptr),
        *(n, 2 * width, tile_n, tile_k),
        LARGEST=LARGEST,
        FORMAT=FORMAT,
        ROW=ROW,
        TRANSPOSED=TRANSPOSED,
        BLOCK=BLOCK,
    )
    store_blocks(
        widened(up_a),
        widened(up_b),
        widened(up_c),
        widened(up_d),
        *(row_ptr, row_scale_ptr, transposed_ptr, transposed_scale_ptr),
        *(n, 2 * width, tile_n, tile_k + width // BLOCK),
        LARGEST=LARGEST,
        FORMAT=FORMAT,
        ROW=ROW,
        TRANSPOSED=TRANSPOSED,
        BLOCK=BLOCK,
    )


class _OneLaunch(Source):
    """A source whose kernel with one scale finds the largest magnitude, too, and that alone where nothing is to be written.

    operands: [N, ...] each, as the kernels take them, with their row strides. width: F of [N, 2F]. parts: matrices of [N, F]
    beside each other in the one that is quantized.
    """

    _tensorwise: Any
    _blocks: Any
    _tensorwise_warps: int
    _blocks_warps: int
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
        self._blocks[(n // BLOCK, width // BLOCK)](
            *(*self._operands, data, scale, other, other_scale, n, width, *self._strides),
            LARGEST=LARGEST[dtype],
            FORMAT=FORMATS[dtype],
            ROW=row,
            TRANSPOSED=transposed,
            BLOCK=BLOCK,
            num_warps=self._blocks_warps,
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

    _tensorwise, _blocks = swiglu_tensorwise_kernel, swiglu_blocks_kernel
    _tensorwise_warps, _blocks_warps, parts = 8, 8, 1

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
    _tensorwise_warps, _blocks_warps, parts = 16, 16, 2

    def __init__(self, grad: Tensor, gate_and_up: Tensor):
        self._grad, self._x = as_rows(grad), as_rows(gate_and_up)
        super().__init__(self._grad, self._x, width=self._grad.shape[1])

    def value(self) -> Tensor:
        """The matrix itself."""
        from megatron_synth_kernels.triton.swiglu import gradient

        return gradient(self._grad, self._x)
