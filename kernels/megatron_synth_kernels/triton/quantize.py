"""FP8 quantizers for Hopper: one read of the tensor, both orders and the scales written.

N rows, K columns. A program takes a tile of 128 x 128 at most, so block scales never cross programs. Results are those of
fp8.py, bit for bit.

What limits these kernels are instructions as much as memory. Where blocks are scaled, a tile is loaded in quarters, of every
fourth row each, so that a thread has four neighbors of a row and four of a column: both orders are written in words. Scales
are powers of two, so they are made of the bits of exponents, without a division.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_synth_kernels.launch import ceil_div
from megatron_synth_kernels.registry import interpreted
from megatron_synth_kernels.torch.fp8 import BLOCK, LARGEST, Pair, Quantized, Scaling, check_blocks
from megatron_synth_kernels.triton.math import widened

_INTERPRETED = tl.constexpr(interpreted())
FORMATS = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


@triton.jit
def magnitude_bits(values):
    """The bits of |values|, in int32: in the order of the magnitudes, with NaN above infinity, which a maximum keeps."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_magnitude(values):
    """Of all values, fp32; infinity if one is not finite."""
    return tl.minimum(tl.max(magnitude_bits(values)), 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _encoded(values, FORMAT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Nearest number of a format, ties to even, made bit by bit; |values| are in its range."""
    bits = values.to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits >> 23) & 0xFF) - 127 + BIAS, 1)  # as the format stores it; 1 also for its subnormal numbers
    per_step = ((127 + BIAS + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    steps = (tl.abs(values) * per_step + 8388608.0) - 8388608.0  # 2^23: the sum is rounded to whole numbers
    code = steps.to(tl.int32) + ((exponent - 1) << MANTISSA) + ((bits >> 24) & 0x80)
    return code.to(tl.uint8).to(FORMAT, bitcast=True)


@triton.jit
def saturated(values, LARGEST: tl.constexpr, FORMAT: tl.constexpr):
    """To the nearest number of the format, ties to even. The instruction saturates, and four neighbors become one word.

    Triton's interpreter rounds ties up and loses the carry into the exponent (31.5 becomes 16): there it is done on the bits.
    """
    if _INTERPRETED:
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
        if LARGEST == 448.0:
            return _encoded(values, FORMAT, 3, 7)
        else:
            return _encoded(values, FORMAT, 2, 15)
    elif LARGEST == 448.0:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;"
            " mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f",
            [values],
            dtype=tl.float8e4nv,
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e5m2x2.f32 low, $2, $1; cvt.rn.satfinite.e5m2x2.f32 high, $4, $3;"
            " mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f",
            [values],
            dtype=tl.float8e5,
            is_pure=True,
            pack=4,
        )


@triton.jit
def scale_for(amax, SCALED_TO: tl.constexpr):
    """fp8.scale_for, for blocks of numbers; SCALED_TO is the format's largest number divided by 2^margin."""
    scale = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), amax) * SCALED_TO
    scale = tl.minimum(scale, 8.507059173023462e37)  # 2^126
    return tl.where((amax > 0) & (amax <= 3.4028234663852886e38), scale, 1.0)


@triton.jit
def inverse_of(scale, amax):
    """fp8.inverse_scale."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale) + (amax - amax)  # inf - inf is NaN


@triton.jit
def _exponent_of_scale(amax, LARGEST: tl.constexpr):
    """Of the power of two that is the scale, as fp32 stores it, from the bits of a magnitude.

    A format's largest number is 1.75 x 2^TOP. So 2^(TOP - e) fits for an amax of m x 2^e, and one power less where m > 1.75:
    the sum then carries into the exponent. 0 gets the largest power instead of 1, which makes the same data.
    """
    TOP: tl.constexpr = 8 if LARGEST == 448.0 else 15
    return tl.minimum(254 + TOP - ((amax + 0x1FFFFF) >> 23), 253)  # at most 2^126, as in fp8.py


@triton.jit
def power_of_two_scale(amax, LARGEST: tl.constexpr):
    """fp8.scale_for(power_of_two=True), from `magnitude_bits`."""
    return (_exponent_of_scale(amax, LARGEST) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power_of_two_scale(amax, LARGEST: tl.constexpr):
    """Its fp8.inverse_scale, from `magnitude_bits`."""
    inverse = tl.where(amax == 0, 127, 254 - _exponent_of_scale(amax, LARGEST)) << 23
    return tl.where(amax < 0x7F800000, inverse, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def raise_to(ptr, amax):
    """One number in memory is raised to `amax`, which is not negative: their bits are in the same order as they are."""
    bits = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_max(bits, amax.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def tensor_scale(given_ptr, SCALED_TO: tl.constexpr, FROM_AMAX: tl.constexpr):
    """The scale [1] of a tensor: `given_ptr` holds its magnitude, where FROM_AMAX, or else the scale."""
    given = tl.load(given_ptr + tl.arange(0, 1))
    return scale_for(given, SCALED_TO) if FROM_AMAX else given


@triton.jit
def leave(given_ptr, inverse_scale_ptr, noted_ptr, scale, seen, FROM_AMAX: tl.constexpr, NOTED: tl.constexpr):
    """Write `inverse` and `noted` of fp8.Scaling; every program calls it.

    Args:
        given_ptr: as for `tensor_scale`.
        inverse_scale_ptr: 0 before.
        noted_ptr: used only where NOTED.
        scale: of `tensor_scale`.
        seen: largest magnitude of this program's part; used only where not FROM_AMAX.
        FROM_AMAX: see given_ptr.
        NOTED: see noted_ptr.
    """
    one = tl.arange(0, 1)
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    if FROM_AMAX:
        if first:
            amax = tl.load(given_ptr + one)
            tl.store(inverse_scale_ptr + one, inverse_of(scale, amax))
            if NOTED:
                raise_to(noted_ptr + one, amax)
    else:
        if NOTED:
            raise_to(noted_ptr, seen)
        # the bits of a NaN are above those of all numbers: one program that saw an infinity is enough
        bad = seen > 3.4028234663852886e38
        if first | bad:
            inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
            raise_to(inverse_scale_ptr + one, tl.where(bad, float("nan"), inverse))


@triton.jit
def store_both(
    data, row_ptr, transposed_ptr, n, k, top, left, rows, columns, inside, ROW: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """A tile, as it is into row [n, k] and turned into transposed [k, n]."""
    if ROW:
        tl.store(row_ptr + top.to(tl.int64) * k + left + rows[:, None] * k + columns[None, :], data, mask=inside)
    if TRANSPOSED:
        tile = transposed_ptr + left.to(tl.int64) * n + top
        tl.store(tile + columns[:, None] * n + rows[None, :], tl.trans(data), mask=tl.trans(inside))


@triton.jit
def quarter_of(ptr, stride, PART: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK / 4, BLOCK] of a tile of BLOCK x BLOCK at `ptr`: every fourth row, from PART on."""
    rows, columns = 4 * tl.arange(0, BLOCK // 4) + PART, tl.arange(0, BLOCK)
    return widened(tl.load(ptr + rows[:, None] * stride + columns[None, :]))


@triton.jit
def turned(a, b, c, d, BLOCK: tl.constexpr):
    """The transpose [BLOCK, BLOCK] of four quarters. A thread has four neighbors of a column: they become one word."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))  # [BLOCK / 4, BLOCK, 2, 2]
    return joined.permute(1, 0, 2, 3).reshape(BLOCK, BLOCK)


@triton.jit
def _store_quarter(x, size, tile_ptr, k, PART: tl.constexpr, LARGEST: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a quarter, each with a scale of its own, from their magnitudes [BLOCK / 4]."""
    rows, columns = 4 * tl.arange(0, BLOCK // 4) + PART, tl.arange(0, BLOCK)
    scale = power_of_two_scale(size, LARGEST)
    tl.store(tile_ptr + rows[:, None] * k + columns[None, :], saturated(x * scale[:, None], LARGEST, FORMAT))


@triton.jit
def store_blocks(
    a,
    b,
    c,
    d,
    row_ptr,
    row_scale_ptr,
    transposed_ptr,
    transposed_scale_ptr,
    n,
    k,
    tile_n,
    tile_k,
    LARGEST: tl.constexpr,
    FORMAT: tl.constexpr,
    ROW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of 128 x 128, in quarters: in blocks along its rows into row, in blocks along its columns into transposed."""
    size_a, size_b, size_c, size_d = magnitude_bits(a), magnitude_bits(b), magnitude_bits(c), magnitude_bits(d)
    if ROW:
        tile = row_ptr + tile_n * BLOCK * k + tile_k * BLOCK
        row_a, row_b = tl.max(size_a, axis=1), tl.max(size_b, axis=1)
        row_c, row_d = tl.max(size_c, axis=1), tl.max(size_d, axis=1)
        _store_quarter(a, row_a, tile, k, 0, LARGEST, FORMAT, BLOCK)
        _store_quarter(b, row_b, tile, k, 1, LARGEST, FORMAT, BLOCK)
        _store_quarter(c, row_c, tile, k, 2, LARGEST, FORMAT, BLOCK)
        _store_quarter(d, row_d, tile, k, 3, LARGEST, FORMAT, BLOCK)
        size = tl.join(tl.join(row_a, row_c), tl.join(row_b, row_d)).reshape(BLOCK)
        tl.store(row_scale_ptr + tile_k * n + tile_n * BLOCK + tl.arange(0, BLOCK), inverse_power_of_two_scale(size, LARGEST))
    if TRANSPOSED:
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
        size = tl.max(tl.maximum(tl.maximum(size_a, size_b), tl.maximum(size_c, size_d)), axis=0)
        by = power_of_two_scale(size, LARGEST)[None, :]
        data = saturated(turned(a * by, b * by, c * by, d * by, BLOCK), LARGEST, FORMAT)
        tile = transposed_ptr + tile_k * BLOCK * n + tile_n * BLOCK
        tl.store(tile + columns[:, None] * n + rows[None, :], data)
        tl.store(transposed_scale_ptr + tile_n * k + tile_k * BLOCK + columns, inverse_power_of_two_scale(size, LARGEST))


@triton.jit
def tensorwise_kernel(
    x_ptr,
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
    top, left = tl.program_id(0) * TILE_N, tl.program_id(1) * TILE_K
    rows, columns = tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    inside = (rows < n - top)[:, None] & (columns < k - left)[None, :]
    x_tile = x_ptr + top.to(tl.int64) * x_stride + left
    x = tl.load(x_tile + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tensor_scale(given_ptr, SCALED_TO, FROM_AMAX)
    leave(given_ptr, inverse_scale_ptr, noted_ptr, scale, 0.0 if FROM_AMAX else largest_magnitude(x), FROM_AMAX, NOTED)
    data = saturated(x * scale[:, None], LARGEST, FORMAT)
    store_both(data, row_ptr, transposed_ptr, n, k, top, left, rows, columns, inside, ROW, TRANSPOSED)


@triton.jit
def amax_kernel(x_ptr, amax_ptr, n, k, x_stride, TILE_N: tl.constexpr, TILE_K: tl.constexpr) -> None:
    """amax [1] is raised to the largest magnitude of x [n, k], infinity if x is not finite."""
    top, left = tl.program_id(0) * TILE_N, tl.program_id(1) * TILE_K
    rows, columns = tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    inside = (rows < n - top)[:, None] & (columns < k - left)[None, :]
    x_tile = x_ptr + top.to(tl.int64) * x_stride + left
    x = tl.load(x_tile + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    raise_to(amax_ptr, largest_magnitude(x))


@triton.jit
def transpose_kernel(x_ptr, out_ptr, n, k, TILE_N: tl.constexpr, TILE_K: tl.constexpr) -> None:
    """Bytes x [n, k] -> out [k, n]."""
    top, left = tl.program_id(0) * TILE_N, tl.program_id(1) * TILE_K
    rows, columns = tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    inside = (rows < n - top)[:, None] & (columns < k - left)[None, :]
    x = tl.load(x_ptr + top.to(tl.int64) * k + left + rows[:, None] * k + columns[None, :], mask=inside, other=0)
    tile = out_ptr + left.to(tl.int64) * n + top
    tl.store(tile + columns[:, None] * n + rows[None, :], tl.trans(x), mask=tl.trans(inside))


@triton.jit
def blocks_1x128_kernel(
    x_ptr,
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
    tile_n, tile_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tile = x_ptr + tile_n * BLOCK * x_stride + tile_k * BLOCK
    store_blocks(
        quarter_of(tile, x_stride, 0, BLOCK),
        quarter_of(tile, x_stride, 1, BLOCK),
        quarter_of(tile, x_stride, 2, BLOCK),
        quarter_of(tile, x_stride, 3, BLOCK),
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


@triton.jit
def blocks_128x128_kernel(
    x_ptr,
    row_ptr,
    row_scale_ptr,
    transposed_ptr,
    transposed_scale_ptr,
    n,
    k,
    x_stride,
    row_scale_stride,
    transposed_scale_stride,
    LARGEST: tl.constexpr,
    FORMAT: tl.constexpr,
    ROW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x [n, k] -> row [n, k] and transposed [k, n], with scales [n / 128, k / 128] and [k / 128, n / 128]."""
    tile_n, tile_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tile = x_ptr + tile_n * BLOCK * x_stride + tile_k * BLOCK
    a = quarter_of(tile, x_stride, 0, BLOCK)
    b = quarter_of(tile, x_stride, 1, BLOCK)
    c = quarter_of(tile, x_stride, 2, BLOCK)
    d = quarter_of(tile, x_stride, 3, BLOCK)
    of_two, of_others = tl.maximum(magnitude_bits(a), magnitude_bits(b)), tl.maximum(magnitude_bits(c), magnitude_bits(d))
    size = tl.max(tl.max(tl.maximum(of_two, of_others), axis=1), axis=0, keep_dims=True)  # [1]
    inverse = inverse_power_of_two_scale(size, LARGEST)
    by = power_of_two_scale(size, LARGEST)[:, None]
    one = tl.arange(0, 1)
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    if ROW:
        row_tile = row_ptr + tile_n * BLOCK * k + tile_k * BLOCK
        quarter = row_tile + 4 * tl.arange(0, BLOCK // 4)[:, None] * k + columns[None, :]
        tl.store(quarter, saturated(a * by, LARGEST, FORMAT))
        tl.store(quarter + k, saturated(b * by, LARGEST, FORMAT))
        tl.store(quarter + 2 * k, saturated(c * by, LARGEST, FORMAT))
        tl.store(quarter + 3 * k, saturated(d * by, LARGEST, FORMAT))
        tl.store(row_scale_ptr + tile_n * row_scale_stride + tile_k + one, inverse)
    if TRANSPOSED:
        transposed_tile = transposed_ptr + tile_k * BLOCK * n + tile_n * BLOCK
        data = saturated(turned(a * by, b * by, c * by, d * by, BLOCK), LARGEST, FORMAT)
        tl.store(transposed_tile + columns[:, None] * n + rows[None, :], data)
        tl.store(transposed_scale_ptr + tile_k * transposed_scale_stride + tile_n + one, inverse)


def outputs(
    n: int, k: int, device: torch.device, dtype: torch.dtype, row: bool, transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for [n, k] and [k, n], None where not wanted."""
    make = lambda wanted, *shape: torch.empty(shape, dtype=dtype, device=device) if wanted else None  # noqa: E731
    return make(row, n, k), make(transposed, k, n)


def block_scales(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the scales of [n, k] in blocks of 1 x 128, and of its transpose's, as cuBLASLt reads them."""
    make = lambda *shape: torch.empty(shape, dtype=torch.float32, device=device)  # noqa: E731
    return make(k // BLOCK, n), make(n // BLOCK, k)


def in_blocks(row: Tensor | None, row_scale: Tensor, transposed: Tensor | None, transposed_scale: Tensor) -> Pair:
    """The two results of a kernel that quantizes in blocks of 1 x 128."""
    return (
        None if row is None else Quantized(row, row_scale.t(), (1, BLOCK)),
        None if transposed is None else Quantized(transposed, transposed_scale.t(), (1, BLOCK)),
    )


def options(scaling: Scaling, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels' constants say of a scaling and a format."""
    return {
        "SCALED_TO": LARGEST[dtype] / 2.0**scaling.margin,
        "FROM_AMAX": scaling.amax is not None,
        "NOTED": scaling.noted is not None,
        "LARGEST": LARGEST[dtype],
        "FORMAT": FORMATS[dtype],
    }


def pointers(scaling: Scaling) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """given, inverse and noted of the kernels."""
    return scaling.scale if scaling.amax is None else scaling.amax, scaling.inverse, scaling.noted


def quantize_tensorwise(
    x: Tensor, scaling: Scaling, dtype: torch.dtype, *, row: bool = True, transposed: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """fp8.quantize_tensorwise."""
    n, k = x.shape
    assert x.stride(1) == 1, "rows must be contiguous"
    row_data, transposed_data = outputs(n, k, x.device, dtype, row, transposed)
    tensorwise_kernel[(ceil_div(n, 128), ceil_div(k, 128))](
        *(x, row_data, transposed_data, *pointers(scaling), n, k, x.stride(0)),
        **options(scaling, dtype),
        ROW=row,
        TRANSPOSED=transposed,
        TILE_N=128,
        TILE_K=128,
        num_warps=8,
    )
    return row_data, transposed_data


def amax_of(x: Tensor, out: Tensor | None = None) -> Tensor:
    """fp8.amax_of for [N, K]."""
    n, k = x.shape
    assert x.stride(1) == 1, "rows must be contiguous"
    amax = torch.zeros((), dtype=torch.float32, device=x.device) if out is None else out
    amax_kernel[(ceil_div(n, 64), ceil_div(k, 256))](x, amax, n, k, x.stride(0), TILE_N=64, TILE_K=256, num_warps=8)
    return amax


def transpose(data: Tensor) -> Tensor:
    """fp8.transpose."""
    n, k = data.shape
    assert data.is_contiguous()
    out = torch.empty((k, n), dtype=torch.uint8, device=data.device)
    grid = (ceil_div(n, 128), ceil_div(k, 128))
    transpose_kernel[grid](data.view(torch.uint8), out, n, k, TILE_N=128, TILE_K=128, num_warps=8)
    return out.view(data.dtype)


def quantize_1x128(x: Tensor, dtype: torch.dtype, *, row: bool = True, transposed: bool = True) -> Pair:
    """fp8.quantize_1x128."""
    check_blocks(x)
    n, k = x.shape
    assert x.stride(1) == 1, "rows must be contiguous"
    row_data, transposed_data = outputs(n, k, x.device, dtype, row, transposed)
    row_scale, transposed_scale = block_scales(n, k, x.device)
    blocks_1x128_kernel[(n // BLOCK, k // BLOCK)](
        *(x, row_data, row_scale, transposed_data, transposed_scale, n, k, x.stride(0)),
        LARGEST=LARGEST[dtype],
        FORMAT=FORMATS[dtype],
        ROW=row,
        TRANSPOSED=transposed,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return in_blocks(row_data, row_scale, transposed_data, transposed_scale)


def _square_scales(rows: int, columns: int, device: torch.device) -> Tensor:
    """Memory for the scales of blocks of 128 x 128; what pads a row, if anything does, is 1."""
    padding = -columns % 4
    make = torch.ones if padding else torch.empty
    return make((rows, columns + padding), dtype=torch.float32, device=device)


def quantize_128x128(x: Tensor, dtype: torch.dtype, *, row: bool = True, transposed: bool = True) -> Pair:
    """fp8.quantize_128x128."""
    check_blocks(x)
    n, k = x.shape
    assert x.stride(1) == 1, "rows must be contiguous"
    row_data, transposed_data = outputs(n, k, x.device, dtype, row, transposed)
    tiles_n, tiles_k = n // BLOCK, k // BLOCK
    row_scale = _square_scales(tiles_n, tiles_k, x.device)
    transposed_scale = _square_scales(tiles_k, tiles_n, x.device)
    blocks_128x128_kernel[(tiles_n, tiles_k)](
        *(x, row_data, row_scale, transposed_data, transposed_scale, n, k, x.stride(0)),
        *(row_scale.stride(0), transposed_scale.stride(0)),
        LARGEST=LARGEST[dtype],
        FORMAT=FORMATS[dtype],
        ROW=row,
        TRANSPOSED=transposed,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return (
        None if row_data is None else Quantized(row_data, row_scale, (BLOCK, BLOCK)),
        None if transposed_data is None else Quantized(transposed_data, transposed_scale, (BLOCK, BLOCK)),
    )
