"""The kernels that quantize what they make against the operation and then the quantizer, in Triton's interpreter; run by
test_quantize.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from megatron_synth_kernels.torch import fp8, norm_quantize, swiglu_quantize
from megatron_synth_kernels.torch.fp8 import BLOCK, E4M3, E5M2, Source
from megatron_synth_kernels.triton import (
    norm as triton_norm,
)
from megatron_synth_kernels.triton import (
    norm_quantize as triton_norm_quantize,
)
from megatron_synth_kernels.triton import (
    swiglu as triton_swiglu,
)
from megatron_synth_kernels.triton import (
    swiglu_quantize as triton_swiglu_quantize,
)
from tests.kernels.interpreted_quantize import same
from tests.kernels.test_quantize import bits, by_scale, matrix
from tests.kernels.triton_support import poisoned

EPS = 1e-5


def wide(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows apart in memory, of magnitudes for which neither a sigmoid nor a sum of squares overflows."""
    return matrix(n, k + 16, dtype, seed=seed).clamp(-60, 60)[:, 16:]


def swiglu(n: int, k: int, dtype: torch.dtype) -> tuple[Callable[[], Source], Tensor]:
    x = wide(n, 2 * k, dtype)
    return lambda: triton_swiglu_quantize.SwiGLU(x), triton_swiglu.swiglu(x)


def gradient(n: int, k: int, dtype: torch.dtype) -> tuple[Callable[[], Source], Tensor]:
    x, grad = wide(n, 2 * k, dtype), wide(n, k, dtype, seed=1)
    leaf = x.clone().requires_grad_()
    triton_swiglu.swiglu(leaf).backward(grad)
    assert leaf.grad is not None
    return lambda: triton_swiglu_quantize.SwiGLUGradient(grad, x), leaf.grad


def normalized(n: int, k: int, dtype: torch.dtype) -> tuple[Callable[[], Source], Tensor]:
    x, weight = wide(n, k, dtype), torch.rand(k, generator=torch.Generator().manual_seed(2)).to(dtype)
    return lambda: triton_norm_quantize.Normalized(x, weight, EPS), triton_norm.rms_norm(x, weight, EPS)


# few launches: the interpreter takes a third of a second to begin one
SOURCES = pytest.mark.parametrize(("made", "number_format"), [(swiglu, E4M3), (gradient, E5M2), (normalized, E4M3)])


@SOURCES
def test_one_scale(made: Callable[..., tuple[Callable[[], Source], Tensor]], number_format: torch.dtype) -> None:
    source, expected = made(144, 96, torch.bfloat16)
    with poisoned():
        current = source()
        amax = current.amax(torch.zeros(()))
        assert torch.equal(amax, fp8.amax_of(expected))
        scale = fp8.scale_for(amax, number_format) * 3  # the largest do not fit
        scaling = fp8.Scaling(torch.zeros(()), amax=amax)
        found = current.tensorwise(scaling, number_format)
    defined = fp8.Scaling(torch.zeros(()), amax=amax)
    for ours, theirs in zip(found, fp8.quantize_tensorwise(expected, defined, number_format), strict=True):
        assert ours is not None and theirs is not None and torch.equal(bits(ours), bits(theirs))
    assert torch.equal(scaling.inverse, defined.inverse)
    # delayed scaling asks for no magnitude first
    known = by_scale(source().tensorwise, scale, number_format)
    for ours, theirs in zip(known, by_scale(partial(fp8.quantize_tensorwise, expected), scale, number_format), strict=True):
        assert torch.equal(bits(ours), bits(theirs))
    assert torch.equal(known[3], amax)
    row, nothing, _, seen = by_scale(source().tensorwise, scale, number_format, transposed=False)
    assert nothing is None and torch.equal(bits(row), bits(known[0])) and torch.equal(seen, amax)


@SOURCES
def test_blocks(made: Callable[..., tuple[Callable[[], Source], Tensor]], number_format: torch.dtype) -> None:
    source, expected = made(BLOCK, 2 * BLOCK, torch.bfloat16)
    with poisoned():
        found = source().blocks(number_format)
    for ours, theirs in zip(found, fp8.quantize_1x128(expected, number_format), strict=True):
        same(ours, theirs)


def test_what_is_not_finite_is_reported() -> None:
    x = matrix(32, 64).clamp(-60, 60)
    grad = x[:, :32].clone()
    x[7, 40] = torch.nan
    for source in (
        triton_swiglu_quantize.SwiGLU(x),
        triton_swiglu_quantize.SwiGLUGradient(grad, x),
        triton_norm_quantize.Normalized(x, torch.ones(64), EPS),
    ):
        assert source.amax(torch.zeros(())) == torch.inf


def test_gradients_of_the_norm_are_those_of_the_definition() -> None:
    x, grad, weight = torch.randn(24, 80), torch.randn(24, 80), torch.rand(80)
    ours = triton_norm_quantize.gradients(grad, x, weight, triton_norm_quantize.Normalized(x, weight, EPS).inverse)
    theirs = norm_quantize.gradients(grad, x, weight, norm_quantize.Normalized(x, weight, EPS).inverse)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_the_definitions_agree_with_the_kernels_in_fp32() -> None:
    x, grad, weight = wide(40, 96, torch.float32), torch.randn(40, 48), torch.rand(96)
    for ours, theirs in (
        (triton_swiglu_quantize.SwiGLU(x), swiglu_quantize.SwiGLU(x)),
        (triton_swiglu_quantize.SwiGLUGradient(grad, x), swiglu_quantize.SwiGLUGradient(grad, x)),
        (triton_norm_quantize.Normalized(x, weight, EPS), norm_quantize.Normalized(x, weight, EPS)),
    ):
        torch.testing.assert_close(ours.value(), theirs.value(), rtol=1e-5, atol=1e-5)
