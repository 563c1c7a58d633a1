"""The Triton quantizers against their definition, in Triton's interpreter; run by test_quantize.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from megatron_synth_kernels.torch import fp8
from megatron_synth_kernels.torch.fp8 import BLOCK, E4M3, Quantized, Scaling
from megatron_synth_kernels.triton import quantize as triton_quantize
from tests.kernels.test_quantize import FORMATS, bits, by_scale, matrix


def same(found: Quantized | None, expected: Quantized | None) -> None:
    assert found is not None and expected is not None and found.block == expected.block
    assert torch.equal(bits(found.data), bits(expected.data))
    assert found.scale.shape == expected.scale.shape and found.scale.stride() == expected.scale.stride()
    assert torch.equal(found.scale.nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 80), (160, 144)])
def test_tensorwise_kernel(shape: tuple[int, int], source: torch.dtype, dtype: torch.dtype) -> None:
    wide = matrix(shape[0], shape[1] + 16, source)
    for x in (wide[:, : shape[1]].contiguous(), wide[:, 16:]):  # the second with rows apart
        scale = fp8.scale_for(fp8.amax_of(x), dtype) * 3
        expected = by_scale(partial(fp8.quantize_tensorwise, x), scale, dtype)
        found = by_scale(partial(triton_quantize.quantize_tensorwise, x), scale, dtype)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(bits(ours), bits(theirs))
        assert torch.equal(triton_quantize.amax_of(x), expected[3])
        assert torch.equal(bits(triton_quantize.transpose(found[0])), bits(found[1]))
    quantize = partial(triton_quantize.quantize_tensorwise, x)
    only_row = by_scale(quantize, scale, dtype, transposed=False)
    assert only_row[1] is None and torch.equal(bits(only_row[0]), bits(found[0]))
    only_transposed = by_scale(quantize, scale, dtype, row=False)
    assert only_transposed[0] is None and torch.equal(bits(only_transposed[1]), bits(found[1]))


@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("amax", [3.0, 2.0**-140, 0.0, torch.inf])
def test_a_scale_that_follows_from_the_magnitude(amax: float, margin: int) -> None:
    """Of whatever size: the bits of the scale, its inverse and what is noted are those of the definition."""
    x = matrix(32, 48).clamp(-3, 3)
    results = []
    for quantizer in (fp8, triton_quantize):
        scaling = Scaling(torch.zeros(()), amax=torch.tensor(amax), noted=torch.tensor(2.0), margin=margin)
        results.append((*quantizer.quantize_tensorwise(x, scaling, E4M3), scaling.inverse.nan_to_num(-1.0), scaling.noted))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(bits(found), bits(expected))
    assert results[0][3] == max(amax, 2.0)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", ["quantize_1x128", "quantize_128x128"])
def test_block_kernels(name: str, dtype: torch.dtype) -> None:
    wide = matrix(2 * BLOCK, 4 * BLOCK, torch.bfloat16)
    x = wide[:, BLOCK:]
    x[:BLOCK, :BLOCK] = 0  # a block without a scale
    x[BLOCK, -1] = torch.nan
    x[0, -1] = torch.inf
    expected = getattr(fp8, name)(x, dtype)
    found = getattr(triton_quantize, name)(x, dtype)
    bad = [torch.isnan(result.scale) for result in expected]
    assert all(mask.any() for mask in bad)
    x = x.nan_to_num(0, 0, 0)
    for ours, theirs in zip(found, expected, strict=True):  # data beside a NaN scale mean nothing
        assert torch.equal(torch.isnan(ours.scale), torch.isnan(theirs.scale))
    for ours, theirs in zip(getattr(triton_quantize, name)(x, dtype), getattr(fp8, name)(x, dtype), strict=True):
        same(ours, theirs)
    row, nothing = getattr(triton_quantize, name)(x, dtype, transposed=False)
    assert nothing is None
    same(row, getattr(fp8, name)(x, dtype)[0])


@pytest.mark.parametrize("dtype", FORMATS)
def test_scales_of_blocks_at_the_edges(dtype: torch.dtype) -> None:
    """Where the power of two changes, at both ends of fp32 and below its normal numbers."""
    edges = torch.tensor([1.75 * 2.0**power for power in (-149, -130, -119, -118, -3, 0, 9, 125, 126, 127)])
    magnitudes = torch.cat([edges, edges.nextafter(torch.tensor(torch.inf)), edges.nextafter(torch.tensor(0.0))])
    x = torch.zeros(BLOCK, BLOCK)
    x[: len(magnitudes), 0] = magnitudes
    x[torch.arange(len(magnitudes)), 1 + torch.arange(len(magnitudes))] = -magnitudes  # columns meet them, too
    for ours, theirs in zip(triton_quantize.quantize_1x128(x, dtype), fp8.quantize_1x128(x, dtype), strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_kernels_report_what_is_not_finite(bad: float) -> None:
    x = matrix(32, 32)
    x[7, 7] = bad
    assert triton_quantize.amax_of(x) == torch.inf
    _, _, inverse, noted = by_scale(partial(triton_quantize.quantize_tensorwise, x), torch.tensor(1.0), E4M3)
    assert noted == torch.inf and torch.isnan(inverse)
