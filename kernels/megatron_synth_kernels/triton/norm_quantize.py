"""RMSNorm, quantized while it is made: its output is never in memory in bf16.

N rows, H channels. Two kernels: the first reads whole rows and leaves one number of each, the inverse root mean square, and on
request the largest magnitude of the output, which `current` scaling asks for first. The second makes tiles of 128 x 128 and
writes them in both orders, which rows alone would do a byte at a time. It begins with the rows that the first ended with:
they are still in the cache. Bytes per row in bf16: 2 H read, up to 2 H read again, 2 H written.
Results are those of norm.py and fp8.py, one after the other, bit for bit: the sum over a row has the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_synth_kernels.launch import as_rows, ceil_div
from megatron_synth_kernels.torch.fp8 import BLOCK, LARGEST, Pair, Scaling, Source, check_blocks
from megatron_synth_kernels.triton.math import through
from megatron_synth_kernels.triton.norm import gradients as gradients
from megatron_synth_kernels.triton.norm import tile_of
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


@triton.jit
def rms_norm_statistics_kernel(
    x_ptr,
    weight_ptr,
    inverse_ptr,
    amax_ptr,
    rows,
    x_stride,
    eps,
    HIDDEN: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ROWS rows, whole -> their inverse [rows]; amax [1] is raised to the largest magnitude of what they become."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / HIDDEN + eps)
    tl.store(inverse_ptr + row, inverse, mask=row < rows)
    if MAGNITUDE:
        weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
        out = x * inverse[:, None] * weight[None, :]
        raise_to(amax_ptr, largest_magnitude(through(out, x_ptr.dtype.element_ty)))


@triton.jit
def rms_norm_tensorwise_kernel(
    x_ptr,
    weight_ptr,
    inverse_ptr,
    row_ptr,
    transposed_ptr,
    given_ptr,
    inverse_scale_ptr,
    noted_ptr,
    n,
    k,
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
    """x [n, k] -> row [n, k], transposed [k, n], with a scale as `tensor_scale` finds it."""
    top, left = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_N, tl.program_id(1) * TILE_K
    rows, columns = tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    inside = (rows < n - top)[:, None] & (columns < k - left)[None, :]
    x_tile = x_ptr + top.to(tl.int64) * x_stride + left
    x = tl.load(x_tile + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + top + rows, mask=rows < n - top, other=0.0)
    weight = tl.load(weight_ptr + left + columns, mask=columns < k - left, other=0.0).to(tl.float32)
    out = through(x * inverse[:, None] * weight[None, :], x_ptr.dtype.element_ty)
    scale = tensor_scale(given_ptr, SCALED_TO, FROM_AMAX)
    leave(given_ptr, inverse_scale_ptr, noted_ptr, scale, 0.0 if FROM_AMAX else largest_magnitude(out), FROM_AMAX, NOTED)
    data = saturated(out * scale[:, None], LARGEST, FORMAT)
    store_both(data, row_ptr, transposed_ptr, n, k, top, left, rows, columns, inside, ROW, TRANSPOSED)


@triton.jit
def _quarter_of(x_ptr, inverse_ptr, weight, x_stride, PART: tl.constexpr, BLOCK: tl.constexpr):
    """The output in every fourth row of a tile."""
    x = quarter_of(x_ptr, x_stride, PART, BLOCK)
    inverse = tl.load(inverse_ptr + 4 * tl.arange(0, BLOCK // 4) + PART)
    return through(x * inverse[:, None] * weight[None, :], x_ptr.dtype.element_ty)


@triton.jit
def rms_norm_blocks_kernel(
    x_ptr,
    weight_ptr,
    inverse_ptr,
    row_ptr,
    row_scale_ptr,
    transposed_ptr,
    transposed_scale_ptr,
    n,
    k,
    x_stride,
    LARGEST: tl.constexpr,
    FORMAT: tl.constexpr,
    ROW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x [n, k] -> row [n, k], scales stored [k / 128, n]; transposed [k, n], scales stored [n / 128, k]."""
    tile_n, tile_k = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64), tl.program_id(1).to(tl.int64)
    weight = tl.load(weight_ptr + tile_k * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tile = x_ptr + tile_n * BLOCK * x_stride + tile_k * BLOCK
    inverse = inverse_ptr + tile_n * BLOCK
    store_blocks(
        _quarter_of(tile, inverse, weight, x_stride, 0, BLOCK),
        _quarter_of(tile, inverse, weight, x_stride, 1, BLOCK),
        _quarter_of(tile, inverse, weight, x_stride, 2, BLOCK),
        _quarter_of(tile, inverse, weight, x_stride, 3, BLOCK),
        row_ptr,
        row_scale_ptr,
        transposed_ptr,
        transposed_scale_ptr,
        n,
        k,
        tile_n,
        tile_k,
        LARGEST,
        FORMAT,
        ROW,
        TRANSPOSED,
        BLOCK,
    )


class Normalized(Source):
    """norm_quantize.Normalized; `inverse` is [N]."""

    def __init__(self, x: Tensor, weight: Tensor, eps: float):
        self._x, self._weight, self._eps = as_rows(x), weight, eps
        self._inverse: Tensor | None = None

    @property
    def inverse(self) -> Tensor:
        """[N] fp32, for `gradients`."""
        if self._inverse is None:
            self._statistics(None)
        assert self._inverse is not None
        return self._inverse

    def value(self) -> Tensor:
        """The matrix itself."""
        from megatron_synth_kernels.triton.norm import rms_norm

        return rms_norm(self._x, self._weight, self._eps)

    def amax(self, out: Tensor) -> Tensor:
        """The largest magnitude; comes with the inverse in one pass."""
        self._statistics(out)
        return out

    def _statistics(self, amax: Tensor | None) -> None:
        x = self._x
        count, hidden = x.shape
        self._inverse = torch.empty(count, dtype=torch.float32, device=x.device)
        rows, block, warps = tile_of(hidden)
        rms_norm_statistics_kernel[(ceil_div(count, rows),)](
            *(x, self._weight, self._inverse, amax, count, x.stride(0), self._eps),
            HIDDEN=hidden,
            MAGNITUDE=amax is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )

    def tensorwise(
        self, scaling: Scaling, dtype: torch.dtype, *, row: bool = True, transposed: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """With one scale."""
        x, inverse = self._x, self.inverse
        n, k = x.shape
        data, other = outputs(n, k, x.device, dtype, row, transposed)
        rms_norm_tensorwise_kernel[(ceil_div(n, 128), ceil_div(k, 128))](
            *(x, self._weight, inverse, data, other, *pointers(scaling), n, k, x.stride(0)),
            **options(scaling, dtype),
            ROW=row,
            TRANSPOSED=transposed,
            TILE_N=128,
            TILE_K=128,
            num_warps=16 if row and transposed else 8,
        )
        return data, other

    def blocks(self, dtype: torch.dtype, *, row: bool = True, transposed: bool = True) -> Pair:
        """In blocks of 1 x 128."""
        x, inverse = self._x, self.inverse
        check_blocks(x)
        n, k = x.shape
        data, other = outputs(n, k, x.device, dtype, row, transposed)
        scale, other_scale = block_scales(n, k, x.device)
        rms_norm_blocks_kernel[(n // BLOCK, k // BLOCK)](
            *(x, self._weight, inverse, data, scale, other, other_scale, n, k, x.stride(0)),
            LARGEST=LARGEST[dtype],
            FORMAT=FORMATS[dtype],
            ROW=row,
            TRANSPOSED=transposed,
            BLOCK=BLOCK,
            num_warps=8,
        )
        return in_blocks(data, scale, other, other_scale)
