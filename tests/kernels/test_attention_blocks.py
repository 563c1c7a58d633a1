"""Attention in blocks is attention in one piece, with its gradients, whatever the documents, windows and groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_synth_kernels.torch import attention_blocks

LENGTH, COUNT, ROWS, HEADS, CHANNELS = 48, 8, 2, 4, 8
DOCUMENTS = {
    "whole rows": [0, 48, 96],
    "documents": [0, 5, 6, 30, 48, 49, 70, 72, 96],
    "of one token": [0, 1, 2, 3, 48, 95, 96],
}


def dense(query: Tensor, key: Tensor, value: Tensor, ends: list[int], window: int | None, scale: float) -> Tensor:
    """[S, B, A, D]: by the definition, all scores at once."""
    numbers = torch.bucketize(torch.arange(ROWS * LENGTH), torch.tensor(ends), right=True).view(ROWS, LENGTH)
    places = torch.arange(LENGTH)
    seen = (numbers[:, :, None] == numbers[:, None]) & (places[:, None] >= places)
    if window is not None:
        seen &= places[:, None] - places < window
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("sbad,tbad->bast", query, key) * scale
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bast,tbad->sbad", weights, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 7, 20, 99])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_blocks_together_are_the_whole(documents: str, window: int | None, groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(LENGTH, ROWS, heads, CHANNELS) for heads in (HEADS, groups, groups, HEADS)]
    query, key, value, grad = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    ends, scale = DOCUMENTS[documents], 1 / math.sqrt(CHANNELS)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    expected = dense(*leaves, ends, window, scale)
    of_each = torch.autograd.grad(expected, leaves, grad)
    # a tenth of the precision is left for sums in another order
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    query, key, value, grad = (x.detach().to(dtype) for x in (query, key, value, grad))
    found = [torch.zeros_like(x) for x in (query, key, value)]
    for first in range(0, LENGTH, COUNT):
        filled = torch.zeros(COUNT, ROWS)
        for blocks in attention_blocks.blocks_of(first, COUNT, ends, LENGTH, range(0, LENGTH + 1, COUNT), window):
            row, low, high = blocks[0].row, blocks[0].q0, blocks[0].q1
            filled[low:high, row] += 1
            own = (slice(first + low, first + high), row)
            parts = [(key[one.k0 : one.k1, row], value[one.k0 : one.k1, row]) for one in blocks]
            alone = [attention_blocks.attend(query[own], *part, one, scale) for one, part in zip(blocks, parts, strict=True)]
            out, lse = attention_blocks.joined(*zip(*alone, strict=True))
            torch.testing.assert_close(out, expected[own].detach().to(dtype), **close)
            for one, part in zip(blocks, parts, strict=True):
                d_query, *rest = attention_blocks.gradients(grad[own], query[own], *part, out, lse, one, scale)
                found[0][own] += d_query
                for total, gradient in zip(found[1:], rest, strict=True):
                    total[one.k0 : one.k1, row] += gradient
        assert bool((filled == 1).all())  # every query once
    for ours, theirs in zip(found, of_each, strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), **close)


def test_no_mask_is_larger_than_the_window() -> None:
    for blocks in attention_blocks.blocks_of(4096, 1024, [0, 8192], 8192, range(0, 8193, 1024), None):
        assert all(one.mask is None for one in blocks) and len(blocks) == 5
    (blocks,) = attention_blocks.blocks_of(4096, 1024, [0, 8192], 8192, range(0, 8193, 1024), 64)
    assert blocks[0].mask is not None and blocks[0].mask.shape == (1024, 1024 + 63)
