"""RMSNorm and SwiGLU in Triton against fp64, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_synth_kernels import launch
from tests.kernels.triton_support import DEVICE, DTYPES, check_backward, close, needs_triton, pair, poisoned

pytestmark = needs_triton
SHAPES = [(1, 1, 1), (3, 2, 7), (5, 1, 256), (40, 1, 257), (2, 2, 2049)]


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    torch.manual_seed(0)
    with poisoned():
        yield


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], strided: bool, dtype: torch.dtype) -> None:
    from megatron_synth_kernels.triton.norm import rms_norm

    x, x_64 = pair(*shape, dtype=dtype, strided=strided, factor=3.0)
    weight, weight_64 = pair(shape[-1], dtype=dtype)
    found, expected = rms_norm(x, weight, 1e-5), reference_norm(x_64, weight_64, 1e-5)
    close(found, expected, dtype)
    check_backward((found,), (expected,), (x, x_64), (weight, weight_64), expanded=strided)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_residual(shape: tuple[int, ...], strided: bool, dtype: torch.dtype) -> None:
    from megatron_synth_kernels.triton.norm import rms_norm_residual

    x, x_64 = pair(*shape, dtype=dtype)
    residual, residual_64 = pair(*shape, dtype=dtype, strided=strided, factor=2.0)
    weight, weight_64 = pair(shape[-1], dtype=dtype)
    found = rms_norm_residual(x, residual, weight, 1e-5)
    assert torch.equal(found[1], x + residual)
    # the norm is that of the rounded sum
    total_64 = x_64 + residual_64 + (found[1].detach().double() - x_64.detach() - residual_64.detach())
    expected = (reference_norm(total_64, weight_64, 1e-5), total_64)
    close(found[0], expected[0], dtype)
    check_backward(found, expected, (x, x_64), (residual, residual_64), (weight, weight_64), expanded=strided)


def test_rms_norm_extremes() -> None:
    from megatron_synth_kernels.triton.norm import rms_norm

    one = torch.ones(4096, device=DEVICE)
    assert rms_norm(torch.zeros(2, 8, device=DEVICE), one[:8], 1e-5).eq(0).all()
    assert rms_norm(torch.full((1, 4), 3e18, device=DEVICE), one[:4], 1e-5).allclose(one[:4])
    wide = rms_norm(torch.full((1, 4096), 300.0, dtype=torch.bfloat16, device=DEVICE), one.bfloat16(), 1e-5)
    assert wide.float().allclose(one)
    x = torch.zeros(0, 3, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None and weight.grad.eq(0).all()


def test_the_weights_gradient_is_the_same_in_every_run_and_sums_all_rows() -> None:
    """More rows than programs, so that each sums several; no atomics, so that the order is fixed."""
    from megatron_synth_kernels.triton.norm import rms_norm

    rows = 2 * launch.processors(DEVICE) * 4 * 8 + 5
    x = torch.randn(rows, 256, device=DEVICE)
    grads = []
    for _ in range(2):
        weight = torch.ones(256, device=DEVICE, requires_grad=True)
        rms_norm(x, weight, 0.0).backward(torch.ones_like(x))
        grads.append(weight.grad)
    assert grads[0] is not None and grads[1] is not None and torch.equal(grads[0], grads[1])
    torch.testing.assert_close(grads[0], (x / x.square().mean(-1, keepdim=True).sqrt()).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 2, 14), (2, 1, 2050), (1, 3, 2048)])
def test_swiglu(shape: tuple[int, ...], strided: bool, dtype: torch.dtype) -> None:
    from megatron_synth_kernels.triton.swiglu import swiglu

    x, x_64 = pair(*shape, dtype=dtype, strided=strided, factor=3.0)
    gate, up = x_64.chunk(2, dim=-1)
    found, expected = swiglu(x), gate / (1 + (-gate).exp()) * up
    close(found, expected, dtype)
    check_backward((found,), (expected,), (x, x_64), expanded=strided)


def test_swiglu_extremes() -> None:
    """exp overflows on one side of the gate and vanishes on the other."""
    from megatron_synth_kernels.triton.swiglu import swiglu

    x = torch.tensor([[-1e4, 1e4, 0.0, -90.0, 2.0, 3.0, 5.0, 1e30]], device=DEVICE, requires_grad=True)
    out = swiglu(x)
    torch.testing.assert_close(out, torch.tensor([[0.0, 3e4, 0.0, 0.0]], device=DEVICE), atol=1e-6, rtol=1e-6)
    out.sum().backward()
    expected = torch.tensor([[0.0, 3.0, 2.5, 0.0, 0.0, 1e4, 0.0, 0.0]], device=DEVICE)
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-6)
    assert swiglu(torch.zeros(0, 4, device=DEVICE)).shape == (0, 2)
