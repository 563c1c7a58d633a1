"""FP8: formats, scales, plain-torch quantizers, and the one product that FP8 layers are made of.

Formats (Micikevicius et al., 2022, arXiv 2209.05433): e4m3 reaches 448 with 3 bits of mantissa, e5m2 reaches 57344 with 2.

Scalings: *tensorwise*, one scale for a tensor; *1x128*, one for 128 neighbors along a row; *128x128*, one for a square
block (the two of DeepSeek-V3, arXiv 2412.19437, section 3.3.2). A quantizer multiplies by `scale`, so that the largest
magnitude lands on the largest number of the format; kept beside the data is the inverse, by which the product multiplies.

A quantizer saturates. What is not finite must not be hidden by that: a NaN or an infinity in a tensor makes the kept
scale NaN, and so everything that is computed from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (E4M3, E5M2)}
_LARGEST_SCALE = 2.0**126  # its inverse is still a normal fp32 number


@dataclass(frozen=True)
class Quantized:
    """A matrix [N, K] in FP8, row-major, and what its elements must be multiplied by.

    data: [N, K], contiguous.
    scale: fp32. Tensorwise: []. 1x128: [N, K / 128], in memory [K / 128, N]. 128x128: [N / 128, K / 128 rounded up to a
        multiple of 4], row-major. These are the layouts of cuBLASLt; the last's padding is 1 and means nothing.
    block: rows and columns that share a scale; None: all do.
    """

    data: Tensor
    scale: Tensor
    block: tuple[int, int] | None = None

    def dequantized(self) -> Tensor:
        """The numbers it stands for: [N, K] fp32."""
        if self.block is None:
            return self.data.float() * self.scale
        rows, columns = self.block
        scale = self.scale[:, : self.data.shape[1] // columns]
        return self.data.float() * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


Pair = tuple[Quantized | None, Quantized | None]
"""A matrix and its transpose, None where not wanted."""


@dataclass(frozen=True)
class Scaling:
    """The one scale of a tensor: where its quantizer finds it, and what the quantizer leaves behind.

    All are fp32 [], on the device. So a quantizer does with single numbers what must be done, and nobody launches a kernel
    for one of them. Exactly one of `amax` and `scale` is given.

    inverse: 0 before, and then what the elements must be multiplied by; NaN if the tensor is not finite.
    amax: the largest magnitude, from which the scale follows by `scale_for`.
    scale: the factor, where it is known before the tensor is.
    noted: raised to the largest magnitude; None: nobody asks.
    margin: of `scale_for`.
    """

    inverse: Tensor
    amax: Tensor | None = None
    scale: Tensor | None = None
    noted: Tensor | None = None
    margin: int = 0

    def __post_init__(self) -> None:
        assert (self.amax is None) != (self.scale is None), "a scale is given, or follows from a magnitude"


class Scalars:
    """Zeroed fp32 numbers [] of a device, many from one launch."""

    _PER_SLAB = 1024

    def __init__(self, device: torch.device):
        self._device = device
        self._left: list[Tensor] = []

    def take(self) -> Tensor:
        """The next number. Its slab lives as long as one of its numbers does."""
        if not self._left:
            slab = torch.zeros(self._PER_SLAB, dtype=torch.float32, device=self._device)
            # by `data` each has a version of its own: what autograd saved of one stays good when another is written
            self._left = [number.data for number in slab.unbind()]
        return self._left.pop()


def scale_for(amax: Tensor, dtype: torch.dtype, *, margin: int = 0, power_of_two: bool = False) -> Tensor:
    """The factor that brings `amax` to the largest number of `dtype`, divided by 2^margin: fp32, shape of `amax`.

    1 where amax is 0 or not finite. `power_of_two`: the largest power of two that brings it no further, at most 2^126: scaling
    is then exact but for the format's range.
    """
    if not power_of_two:
        return scale_to(LARGEST[dtype] / 2.0**margin, amax)
    # the largest number is 1.75 x 2^top: for m x 2^e that is 2^(top - e), and one power less where m > 1.75: the sum carries
    top = math.frexp(LARGEST[dtype])[1] - 1
    exponent = 254 + top - ((amax.view(torch.int32) + 0x1FFFFF) >> 23)  # as fp32 stores it
    scale = ((exponent - margin).clamp(max=253) << 23).view(torch.float32)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, 1.0)


def scale_to(largest: float | Tensor, amax: Tensor) -> Tensor:
    """The factor that brings `amax` to `largest`, fp32; 1 where amax is 0 or not finite."""
    scale = (amax.reciprocal() * largest).clamp(max=_LARGEST_SCALE)  # rounded twice; kernels do the same
    return torch.where((amax > 0) & torch.isfinite(amax), scale, 1.0)


def inverse_scale(scale: Tensor, amax: Tensor) -> Tensor:
    """1 / scale, or NaN where `amax` says that the tensor was not finite."""
    return 1.0 / scale + (amax - amax)


def amax_of(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Largest magnitude: [] fp32; infinity if x is not finite, since reductions over ranks may lose a NaN.

    `out`: 0 before, the result after; None: it is made.
    """
    amax = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).nan_to_num(torch.inf, torch.inf)
    return amax if out is None else out.copy_(amax)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Saturate and round to nearest even; overwrites its argument."""
    largest = LARGEST[dtype]
    return values.clamp_(-largest, largest).to(dtype)


def quantize_tensorwise(
    x: Tensor, scaling: Scaling, dtype: torch.dtype, *, row: bool = True, transposed: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """saturate(x * scale) in both orders, in one pass.

    Args:
        x: [N, K], bf16 or fp32, rows contiguous.
        scaling: of x; its `inverse` and `noted` are written.
        dtype: E4M3 or E5M2.
        row: whether the first result is wanted.
        transposed: whether the second is.

    Returns:
        [N, K] and its transpose [K, N], contiguous, None where not wanted.
    """
    amax = amax_of(x) if scaling.amax is None else scaling.amax
    scale = scale_for(amax, dtype, margin=scaling.margin) if scaling.scale is None else scaling.scale
    scaling.inverse.copy_(inverse_scale(scale, amax))
    if scaling.noted is not None:
        torch.maximum(scaling.noted, amax, out=scaling.noted)
    data = _rounded(x.float() * scale, dtype)  # a bf16 tensor times a scalar tensor would be rounded to bf16
    return data if row else None, transpose(data) if transposed else None


def quantize_1x128(x: Tensor, dtype: torch.dtype, *, row: bool = True, transposed: bool = True) -> Pair:
    """x in blocks of 128 along its rows, and x^T in blocks of 128 along *its* rows: two quantizations of the same numbers.

    Scales are powers of two. N and K are multiples of 128.

    Args:
        x: [N, K], bf16 or fp32, rows contiguous.
        dtype: E4M3 or E5M2.
        row: whether the first result is wanted.
        transposed: whether the second is.

    Returns:
        [N, K] with scales [N, K / 128], and [K, N] with scales [K, N / 128]; None where not wanted.
    """
    check_blocks(x)
    return _along_rows(x, dtype) if row else None, _along_rows(x.t(), dtype) if transposed else None


def _along_rows(x: Tensor, dtype: torch.dtype) -> Quantized:
    rows, columns = x.shape
    blocks = x.float().contiguous().view(rows, columns // BLOCK, BLOCK)
    amax = torch.linalg.vector_norm(blocks, torch.inf, dim=2)  # [N, K / 128]
    scale = scale_for(amax, dtype, power_of_two=True)
    data = _rounded(blocks * scale[..., None], dtype).view(rows, columns)
    in_memory = inverse_scale(scale, amax).t().clone(memory_format=torch.contiguous_format)  # strides of one block, too
    return Quantized(data, in_memory.t(), (1, BLOCK))


def quantize_128x128(x: Tensor, dtype: torch.dtype, *, row: bool = True, transposed: bool = True) -> Pair:
    """x in square blocks, and the transpose of the very same numbers. Scales are powers of two; N, K multiples of 128.

    Args:
        x: [N, K], bf16 or fp32, rows contiguous.
        dtype: E4M3 or E5M2.
        row: whether the first result is wanted.
        transposed: whether the second is.

    Returns:
        [N, K] and [K, N], contiguous, each with its scales; None where not wanted.
    """
    check_blocks(x)
    rows, columns = x.shape[0] // BLOCK, x.shape[1] // BLOCK
    blocks = x.float().contiguous().view(rows, BLOCK, columns, BLOCK)
    amax = torch.linalg.vector_norm(blocks, torch.inf, dim=(1, 3))  # [N / 128, K / 128]
    scale = scale_for(amax, dtype, power_of_two=True)
    data = _rounded(blocks * scale[:, None, :, None], dtype).view(x.shape)
    inverse = inverse_scale(scale, amax)
    return (
        Quantized(data, padded_block_scales(inverse), (BLOCK, BLOCK)) if row else None,
        Quantized(transpose(data), padded_block_scales(inverse.t()), (BLOCK, BLOCK)) if transposed else None,
    )


def padded_block_scales(scale: Tensor) -> Tensor:
    """[N / 128, K / 128] with the row length rounded up to a multiple of 4, as cuBLASLt reads it."""
    return F.pad(scale, (0, -scale.shape[1] % 4), value=1.0).contiguous()


def transpose(data: Tensor) -> Tensor:
    """[N, K] FP8 -> [K, N], contiguous. The same bits: a tensorwise scale holds for both."""
    return data.view(torch.uint8).t().contiguous().view(data.dtype)


def check_blocks(x: Tensor) -> None:
    """Assert that x [N, K] is made of whole 128 x 128 blocks."""
    assert x.ndim == 2 and x.shape[0] % BLOCK == 0 and x.shape[1] % BLOCK == 0, f"no whole blocks in {tuple(x.shape)}"


class Source:
    """What is to be quantized: a matrix [N, K] that another operation has yet to make.

    This class is the definition: the matrix is made, in the dtype that it would have had, and then quantized. It is kept for
    further calls, so an instance should not outlive its use. Kernels quantize while they make it, and keep nothing.
    """

    _value: Tensor | None = None

    def _make(self) -> Tensor:
        raise NotImplementedError

    def value(self) -> Tensor:
        """The matrix itself."""
        if self._value is None:
            self._value = self._make()
        return self._value

    def amax(self, out: Tensor) -> Tensor:
        """`amax_of` the matrix, in `out`."""
        return amax_of(self.value(), out)

    def tensorwise(
        self, scaling: Scaling, dtype: torch.dtype, *, row: bool = True, transposed: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """`quantize_tensorwise` of the matrix."""
        return quantize_tensorwise(self.value(), scaling, dtype, row=row, transposed=transposed)

    def blocks(self, dtype: torch.dtype, *, row: bool = True, transposed: bool = True) -> Pair:
        """`quantize_1x128` of the matrix."""
        return quantize_1x128(self.value(), dtype, row=row, transposed=transposed)


def is_emulated(device: torch.device) -> bool:
    """Whether `product` multiplies in fp32: torch's FP8 product on a CPU knows no block scales, takes hundreds of times as
    long as an fp32 one on some processors, and is missing on others.
    """
    return device.type == "cpu"


def product(a: Quantized, b: Quantized, out_dtype: torch.dtype, *, fast_accumulation: bool = False) -> Tensor:
    """A B^T, both operands with the summed axis contiguous: the only order that Hopper's FP8 units take.

    The emulation on a CPU is the definition: FP8 values are exact in fp32, and so are their products; these are summed in
    fp32. Block scales are powers of two and applied before (exactly), tensorwise scales after.

    Args:
        a: [M, K].
        b: [N, K]; not both in e5m2, which no tensor core multiplies.
        out_dtype: bf16 or fp32.
        fast_accumulation: sum in the tensor cores alone (some 14 bits), not with partial sums promoted to fp32.
            Tensorwise only.

    Returns:
        [M, N] in `out_dtype`.
    """
    assert not (a.data.dtype == b.data.dtype == E5M2), "e5m2 x e5m2 is no FP8 product"
    emulated = is_emulated(a.data.device)
    if a.block is None and b.block is None:
        if emulated:
            return (torch.mm(a.data.float(), b.data.float().t()) * (a.scale * b.scale)).to(out_dtype)
        return torch._scaled_mm(
            a.data, b.data.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=out_dtype, use_fast_accum=fast_accumulation
        )
    assert a.block is not None and b.block is not None
    if emulated:
        return torch.mm(a.dequantized(), b.dequantized().t()).to(out_dtype)
    kinds = {(1, BLOCK): F.ScalingType.BlockWise1x128, (BLOCK, BLOCK): F.ScalingType.BlockWise128x128}
    return F.scaled_mm(
        a.data,
        b.data.t(),
        a.scale if a.block == (1, BLOCK) else a.scale.t(),
        kinds[a.block],
        b.scale if b.block == (1, BLOCK) else b.scale.t(),
        kinds[b.block],
        output_dtype=out_dtype,
    )
