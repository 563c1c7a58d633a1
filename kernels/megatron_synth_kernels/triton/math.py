"""Arithmetic that the Triton kernels share.

Triton compiles what follows a `return` of a constant branch, too, and wants one type of all returns: hence `else`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_synth_kernels.registry import interpreted

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 -> fp32 or bf16, to the nearest and to even. Triton's interpreter would cut off, so there it is done on the bits."""
    if _INTERPRETED and dtype == tl.bfloat16:
        word = x.to(tl.uint32, bitcast=True)
        up = word + 0x7FFF + ((word >> 16) & 1)
        x = tl.where(tl.abs(x) < float("inf"), (up & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def widened(x):
    """bf16 -> fp32, two numbers from one word in two instructions: compilers make three. Others by a cast."""
    if _INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )


@triton.jit
def packed(x, dtype: tl.constexpr):
    """As `rounded`; two numbers of bf16 become one word."""
    if _INTERPRETED or dtype != tl.bfloat16:
        return rounded(x, dtype)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def through(x, dtype: tl.constexpr):
    """fp32 -> the nearest number of fp32 or bf16, in fp32."""
    if _INTERPRETED or dtype != tl.bfloat16:
        return rounded(x, dtype).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), in fp32, to a few units in the last place; below 2^-126 it is 0.

    tl.sigmoid takes care of results and of denominators beyond the range of normal numbers, which costs 7 instructions of 11.
    Here the sum is at least 1, and a term that is lost beside 1 may as well be 0.
    """
    if _INTERPRETED:
        return tl.sigmoid(x)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )
