"""Parts of a sequence: every token is one rank's, and comes back to its place."""

from __future__ import annotations

import pytest
import torch

from megatron_synth_kernels.torch.attention.context import chunks_of


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_chunk_is_one_ranks_and_work_is_equal(size: int) -> None:
    parts = [chunks_of(rank, size) for rank in range(size)]
    assert sorted(chunk for part in parts for chunk in part) == list(range(2 * size))
    # a chunk sees itself and all before it
    assert len({sum(chunk + 0.5 for chunk in part) for part in parts}) == 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_are_taken_and_put_back(size: int) -> None:
    engine = pytest.importorskip("megatron_synth.parallel.engine")
    engine.load()  # before anything of megatron-core
    from megatron_synth.model.sequence_part import SequencePart

    whole = torch.arange(2 * 16 * 3).view(2, 16, 3)
    parts = [SequencePart(rank, size) for rank in range(size)]
    assert torch.equal(sum(part.put(part.take(whole)) for part in parts), whole)
    assert all(part.take(whole).shape == (2, 16 // size, 3) for part in parts)
    first = parts[0].take(whole)
    assert torch.equal(first[:, 0], whole[:, 0]) and torch.equal(first[:, -1], whole[:, -1])
