"""FP8 quantizers and products: the definition, and the Triton kernels against it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_synth_kernels.torch import fp8
from megatron_synth_kernels.torch.fp8 import BLOCK, E4M3, E5M2, LARGEST, Quantized, Scaling
from tests.support import ROOT

FORMATS = [E4M3, E5M2]


def bits(x: Tensor) -> Tensor:
    return (x.contiguous() if x.ndim else x.reshape(1)).view(torch.uint8)


def matrix(n: int, k: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Tensor:
    """Numbers of many magnitudes, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator) * torch.exp(4 * torch.randn(n, k, generator=generator))
    x[torch.rand(n, k, generator=generator) < 0.05] = 0
    return x.to(dtype)


def by_scale(
    quantize: Callable[..., Any], scale: Tensor, dtype: torch.dtype, **wanted: bool
) -> tuple[Any, Any, Tensor, Tensor]:
    """Both orders by a known scale, the inverse that is kept, and the magnitude that is noted."""
    inverse, noted = torch.zeros(()).to(scale.device), torch.zeros(()).to(scale.device)
    return *quantize(Scaling(inverse, scale=scale, noted=noted), dtype, **wanted), inverse, noted


# ---- the definition


@pytest.mark.parametrize("dtype", FORMATS)
def test_scales_bring_the_largest_number_to_the_end_of_the_format(dtype: torch.dtype) -> None:
    amax = torch.tensor([3.0, 1e-3, 7e5, 2.0**-140])
    scale = fp8.scale_for(amax, dtype)
    assert torch.allclose(scale[:3] * amax[:3], torch.tensor(LARGEST[dtype]))
    assert torch.isfinite(1 / scale).all() and torch.isfinite(scale).all()
    assert torch.equal(fp8.scale_for(amax, dtype, margin=2)[:3], scale[:3] / 4)
    powers = fp8.scale_for(amax, dtype, power_of_two=True)
    assert (torch.frexp(powers).mantissa == 0.5).all() and (powers <= scale).all() and (2 * powers > scale).all()
    odd = fp8.scale_for(torch.tensor([0.0, torch.inf, torch.nan]), dtype)
    assert odd.tolist() == [1.0] * 3
    assert torch.isnan(fp8.inverse_scale(odd, torch.tensor([0.0, torch.inf, torch.nan]))).tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", FORMATS)
def test_powers_of_two_are_the_largest_that_fit(dtype: torch.dtype) -> None:
    """Of every exponent: all mantissas of bf16, and those of fp32 where the power changes."""
    mantissas = torch.cat([torch.arange(0, 2**23, 2**16), 0x600000 + torch.arange(-8, 9)]).int()
    amax = (mantissas[None, :] | (torch.arange(255).int()[:, None] << 23)).view(torch.float32).flatten()
    amax = amax[amax > 0]
    scale = fp8.scale_for(amax, dtype, power_of_two=True)
    reached = scale.double() * amax.double()
    assert (torch.frexp(scale).mantissa == 0.5).all() and (reached <= LARGEST[dtype]).all()
    assert ((2 * reached > LARGEST[dtype]) | (scale == 2.0**126)).all()
    by_division = (amax.reciprocal() * LARGEST[dtype]).clamp(max=2.0**126).view(torch.int32) & 0x7F800000
    normal = amax < 2.0**126  # above, the reciprocal loses bits
    assert torch.equal(scale[normal], by_division.view(torch.float32)[normal])


@pytest.mark.parametrize("dtype", FORMATS)
def test_tensorwise_saturates_and_rounds_to_nearest(dtype: torch.dtype) -> None:
    x = matrix(48, 80)
    scale = fp8.scale_for(fp8.amax_of(x), dtype) * 8  # the largest numbers do not fit
    row, transposed, inverse, amax = by_scale(partial(fp8.quantize_tensorwise, x), scale, dtype)
    assert torch.equal(inverse, 1 / scale)
    assert row is not None and transposed is not None
    assert torch.equal(amax, x.abs().max())
    assert torch.equal(bits(transposed), bits(row).t())
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = grid[torch.isfinite(grid)]
    scaled = x * scale
    distance = (scaled.reshape(-1, 1) - grid).abs().min(dim=1).values.view(x.shape)
    fits = scaled.abs() <= LARGEST[dtype]
    assert torch.equal((row.float() - scaled).abs()[fits], distance[fits])
    assert (~fits).any() and torch.equal(row.float()[~fits], scaled.sign()[~fits] * LARGEST[dtype])


@pytest.mark.parametrize("dtype", FORMATS)
def test_block_scales_are_those_of_their_blocks_alone(dtype: torch.dtype) -> None:
    x = matrix(2 * BLOCK, 3 * BLOCK)
    for quantize, tiles in ((fp8.quantize_1x128, (1, BLOCK)), (fp8.quantize_128x128, (BLOCK, BLOCK))):
        row, transposed = quantize(x, dtype)
        assert row is not None and transposed is not None and row.block == transposed.block == tiles
        for result, source in ((row, x), (transposed, x.t())):
            back = result.dequantized()
            assert back.shape == source.shape and result.data.is_contiguous()
            # every block reaches the upper half of the format's range, and its error is half a unit in the last place
            blocks = lambda t: t.unfold(0, tiles[0], tiles[0]).unfold(1, tiles[1], tiles[1]).flatten(2)  # noqa: B023, E731
            top = blocks(result.data.float()).abs().amax(2)
            assert (top <= LARGEST[dtype]).all() and (top >= LARGEST[dtype] / 2).all()
            mantissa = 3 if dtype is E4M3 else 2
            ulp = torch.maximum(blocks(source).abs() * 2.0**-mantissa, blocks(source).abs().amax(2, keepdim=True) * 2.0**-13)
            assert ((blocks(back) - blocks(source)).abs() <= ulp / 2 + 1e-30).all()
    square, transposed = fp8.quantize_128x128(x, dtype)
    assert square is not None and transposed is not None
    assert torch.equal(square.dequantized().t(), transposed.dequantized())


def test_a_scale_is_padded_as_cublas_reads_it() -> None:
    row, transposed = fp8.quantize_128x128(matrix(5 * BLOCK, 3 * BLOCK), E4M3)
    assert row is not None and transposed is not None
    assert row.scale.shape == (5, 4) and transposed.scale.shape == (3, 8)
    row, transposed = fp8.quantize_1x128(matrix(2 * BLOCK, 3 * BLOCK), E4M3)
    assert row is not None and transposed is not None
    assert row.scale.shape == (2 * BLOCK, 3) and row.scale.stride() == (1, 2 * BLOCK)
    assert transposed.scale.shape == (3 * BLOCK, 2) and transposed.scale.stride() == (1, 3 * BLOCK)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x = matrix(BLOCK, BLOCK)
    x[3, 5] = bad
    amax = fp8.amax_of(x)
    row, _, inverse, seen = by_scale(partial(fp8.quantize_tensorwise, x), torch.tensor(1.0), E4M3)
    assert row is not None and not torch.isfinite(amax) and not torch.isfinite(seen)
    good, _ = fp8.quantize_128x128(matrix(BLOCK, BLOCK), E4M3)
    assert good is not None
    unit = Quantized(good.data, torch.tensor(1.0))
    assert torch.isnan(fp8.product(Quantized(row, inverse), unit, torch.float32)).all()
    for result in (*fp8.quantize_1x128(x, E4M3), *fp8.quantize_128x128(x, E4M3)):
        assert result is not None and torch.isnan(fp8.product(result, good, torch.float32)).any()


@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
@pytest.mark.parametrize("scaling", ["tensorwise", "blocks"])
def test_product_is_that_of_the_dequantized_numbers(formats: tuple[torch.dtype, torch.dtype], scaling: str) -> None:
    x, w = torch.randn(BLOCK, 2 * BLOCK), torch.randn(3 * BLOCK, 2 * BLOCK)
    operands: list[Quantized] = []
    for tensor, dtype, blocks in ((x, formats[0], fp8.quantize_1x128), (w, formats[1], fp8.quantize_128x128)):
        if scaling == "blocks":
            result, _ = blocks(tensor, dtype)
        else:
            inverse = torch.zeros(())
            data, _ = fp8.quantize_tensorwise(tensor, Scaling(inverse, amax=fp8.amax_of(tensor)), dtype)
            result = None if data is None else Quantized(data, inverse)
        assert result is not None
        operands.append(result)
    a, b = operands
    exact = a.dequantized().double() @ b.dequantized().double().t()
    found = fp8.product(a, b, torch.float32)
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())
    assert torch.equal(fp8.product(a, b, torch.bfloat16), found.bfloat16()) or torch.allclose(
        fp8.product(a, b, torch.bfloat16).double(), exact, rtol=2**-8, atol=1e-4
    )
    # and close to the product of what was quantized
    assert (found - x @ w.t()).norm() / (x @ w.t()).norm() < 0.1


def test_e5m2_by_e5m2_is_refused() -> None:
    a = Quantized(torch.zeros(16, 16, dtype=E5M2), torch.tensor(1.0))
    with pytest.raises(AssertionError, match="e5m2"):
        fp8.product(a, a, torch.float32)


# ---- the kernels


def test_kernels_in_the_interpreter() -> None:
    """A process of their own: Triton decides at its import whether it interprets."""
    files = [str(Path(__file__).with_name(f"interpreted_{name}.py")) for name in ("quantize", "sources")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
