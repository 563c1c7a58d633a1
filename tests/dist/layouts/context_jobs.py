"""Job of test_context_attention.py: attention of a shared sequence as a GPU does it and as a CPU does it, on ranks of gloo."""

from __future__ import annotations

import os

import numpy as np
import torch

Case = tuple[int, tuple[int, ...] | None, int | None]


def inputs(heads: int, groups: int) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the result for 2 rows of 16 tokens: [S, B, A or G, D], the same on every rank."""
    random = torch.Generator().manual_seed(3)
    return [torch.randn(16, 2, number, 8, dtype=torch.float64, generator=random) for number in (heads, groups, groups, heads)]


def both_ways(cases: list[Case]) -> list[list[list[np.ndarray]]]:
    """By case, for a GPU's way and a CPU's: this rank's result [S / c, B, A, D] and gradients of query, key and value.

    cases: key heads of 4 query heads, places at which documents begin, with the end, and window.
    """
    from megatron_synth_kernels.torch.attention import context

    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    assert group is not None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = []
    for groups, ends, window in cases:
        ways = []
        for function in (context._Context, context._InBlocks):
            own = [x.chunk(2 * size) for x in inputs(4, groups)]
            early, late = context.chunks_of(rank, size)
            query, key, value, grad = (torch.cat([chunks[early], chunks[late]]) for chunks in own)
            for x in (query, key, value):
                x.requires_grad_()
            cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
            out = function.apply(query, key, value, 0.3, group, cu_seqlens, window).unflatten(2, query.shape[2:])
            gradients = torch.autograd.grad(out, (query, key, value), grad)
            ways.append([x.detach().numpy() for x in (out, *gradients)])
        found.append(ways)
    torch.distributed.destroy_process_group()
    return found
