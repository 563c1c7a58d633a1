"""Attention of a sequence that ranks share: as a GPU gathers it and as a CPU hands it round, it is that of the whole sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_synth_kernels.torch.attention.context import chunks_of
from tests.dist.layouts.context_jobs import Case, inputs
from tests.dist.pool import RankPool

JOB = "tests.dist.layouts.context_jobs.both_ways"
DOCUMENTS = (0, 3, 4, 16, 18, 29, 32)
CASES: list[Case] = [
    (groups, ends, window) for groups in (4, 2, 1) for ends in (None, DOCUMENTS) for window in (None, 5)
]


def reference(groups: int, ends: tuple[int, ...] | None, window: int | None) -> list[torch.Tensor]:
    """What one process says of the whole rows, from scores that are written out."""
    query, key, value, grad = inputs(4, groups)
    for x in (query, key, value):
        x.requires_grad_()
    length, rows = query.shape[:2]
    line = np.arange(rows * length)
    starts = np.arange(0, len(line), length) if ends is None else np.union1d(ends[:-1], np.arange(0, len(line), length))
    document = torch.from_numpy(np.searchsorted(starts, line, side="right").reshape(rows, length))
    place = torch.arange(length)
    seen = (document[:, :, None] == document[:, None, :]) & (place[None, :] <= place[:, None])
    if window is not None:
        seen &= place[:, None] - place[None, :] < window
    keys, values = (x.repeat_interleave(4 // groups, dim=2) for x in (key, value))
    scores = 0.3 * torch.einsum("qbad,kbad->baqk", query, keys)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("baqk,kbad->qbad", weights, values)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]


@pytest.mark.parametrize("size", [2, 4])
def test_both_ways_are_the_attention_of_the_whole_sequence(size: int, ranks: RankPool) -> None:
    results = [result.value for result in ranks.run(size, JOB, CASES)]
    for number, case in enumerate(CASES):
        expected = reference(*case)
        for way, name in enumerate(("gathered", "in blocks")):
            for what, whole in enumerate(expected):
                chunks = whole.chunk(2 * size)
                for rank in range(size):
                    own = torch.cat([chunks[one] for one in chunks_of(rank, size)])
                    torch.testing.assert_close(
                        torch.from_numpy(results[rank][number][way][what]),
                        own,
                        rtol=1e-12,
                        atol=1e-12,
                        msg=lambda text: f"{name}, {case}, rank {rank}, {('out', 'query', 'key', 'value')[what]}: {text}",
                    )
