"""Arithmetic that the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_synth_kernels.registry import interpreted

_CUTS_OFF = tl.constexpr(interpreted())


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 -> fp32 or bf16, to the nearest and to even. Triton's interpreter would cut off, so there it is done on the bits."""
    if _CUTS_OFF and dtype == tl.bfloat16:
        word = x.to(tl.uint32, bitcast=True)
        up = word + 0x7FFF + ((word >> 16) & 1)
        x = tl.where(tl.abs(x) < float("inf"), (up & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)
