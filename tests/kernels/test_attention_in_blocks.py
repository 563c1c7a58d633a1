"""Attention in blocks is attention in one piece, with its gradients, whatever the documents, windows and groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_synth_kernels.torch.attention import in_blocks

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
    out, lse = torch.zeros(query.shape, dtype=dtype), torch.full(query.shape[:3], -torch.inf, dtype=dtype)
    chunks = [(first, list(in_blocks.blocks_of(first, COUNT, ends, LENGTH, window))) for first in range(0, LENGTH, COUNT)]

    def places(first: int, block: in_blocks.Block) -> tuple[tuple[slice, int], tuple[slice, int]]:
        begin = block.piece * COUNT
        own = slice(first + block.q0, first + block.q1), block.row
        return own, (slice(begin + block.k0, begin + block.k1), block.row)

    for first, blocks in chunks:
        for block in blocks:
            own, keys = places(first, block)
            in_blocks.add(out[own], lse[own], *in_blocks.attend(query[own], key[keys], value[keys], block, scale))
    torch.testing.assert_close(out, expected.detach().to(dtype), **close)
    for first, blocks in chunks:
        for block in blocks:
            own, keys = places(first, block)
            given = (grad[own], query[own], key[keys], value[keys], out[own], lse[own])
            for total, place, gradient in zip(found, (own, keys, keys), in_blocks.gradients(*given, block, scale), strict=True):
                total[place] += gradient
    for ours, theirs in zip(found, of_each, strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), **close)


def test_no_mask_is_larger_than_a_piece() -> None:
    whole = list(in_blocks.blocks_of(4096, 1024, [0, 8192], 8192, None))
    assert [(one.piece, one.causal, one.mask) for one in whole] == [
        *((piece, False, None) for piece in range(4)),
        (4, True, None),
    ]
    narrow = list(in_blocks.blocks_of(4096, 1024, [0, 8192], 8192, 64))
    assert [one.piece for one in narrow] == [3, 4] and all(one.mask is not None for one in narrow)
    assert [one.mask.shape for one in narrow if one.mask is not None] == [(1024, 1024)] * 2
