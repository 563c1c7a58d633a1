"""Dealing and batches: every layout sees the same samples, each once, and no rank is tied to a source."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.config.errors import UserError
from megatron_synth.data.loader import Loader, deal, validation_batches, validation_windows
from megatron_synth.data.mixture import MixturePlan, SourceSpec


class MemorySource:
    """A source in memory whose tokens are their own positions, plus an offset that tells sources apart."""

    def __init__(self, name: str, num_tokens: int, offset: int = 0):
        self.name, self.num_tokens = name, num_tokens
        self.stream = np.arange(num_tokens, dtype=np.int32) + offset

    def num_windows(self, sequence_length: int) -> int:
        return (self.num_tokens - 1) // sequence_length

    def read_window(self, window: int, out: np.ndarray) -> None:
        length = len(out) - 1
        assert 0 <= window < self.num_windows(length)
        out[:] = self.stream[window * length : window * length + length + 1]

    def document_starts(self, window: int, sequence_length: int) -> np.ndarray:
        return np.array([window % sequence_length])


def two_sources(sequence_length: int) -> tuple[MixturePlan, list[MemorySource]]:
    sources = [MemorySource("web", 5000), MemorySource("qa", 900, offset=10**6)]
    specs = [SourceSpec(s.name, Fraction(1, 2), s.num_windows(sequence_length), 100.0) for s in sources]
    return MixturePlan(specs, 3), sources


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 6), st.integers(0, 10**12), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_ranks_share_a_step_exactly(micro: int, ranks: int, number: int, first: int, seed: int) -> None:
    size = micro * ranks * number
    parts = [
        deal(seed, first, size, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=ranks)
        for rank in range(ranks)
    ]
    assert all(part.shape == (number, micro) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts).reshape(-1)), np.arange(first, first + size))
    # slot j is the same sample in every layout
    slots = deal(seed, first, size, micro_batch_size=size, data_parallel_rank=0, data_parallel_size=1)[0]
    for j, sample in enumerate(slots.tolist()):
        assert parts[j // micro % ranks][j // (micro * ranks), j % micro] == sample


def test_no_rank_is_tied_to_a_source() -> None:
    plan, _ = two_sources(8)
    for batch in (8, 16, 64):
        share = np.zeros(8)
        for rank in range(8):
            samples = np.concatenate(
                [
                    deal(3, step * batch, batch, micro_batch_size=1, data_parallel_rank=rank, data_parallel_size=8)
                    for step in range(200)
                ]
            )
            share[rank] = plan.locate(samples.reshape(-1))[0].mean()
        # five standard deviations of 200 * batch / 8 fair draws
        assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(200 * batch / 8), (batch, share)


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (4, 1), (1, 12), (3, 2), (2, 6), (12, 1)])
def test_every_layout_delivers_the_plan(micro: int, ranks: int) -> None:
    plan, sources = two_sources(16)
    size = 24
    for first in (0, 24, 4800):
        delivered = {}
        for rank in range(ranks):
            loader = Loader(
                plan,
                sources,
                sequence_length=16,
                micro_batch_size=micro,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
            batches = list(loader.micro_batches(first, size))
            assert len(batches) == size // (micro * ranks)
            for batch in batches:
                assert batch.tokens.shape == (micro, 17) and batch.tokens.dtype == np.int64
                assert batch.document_starts == ()
                for row in range(micro):
                    delivered[int(batch.samples[row])] = (int(batch.source_ids[row]), batch.tokens[row].tolist())
        ids, windows = plan.locate(np.arange(first, first + size))
        expected = {
            first + i: (int(ids[i]), list(range(start := int(windows[i]) * 16 + 10**6 * int(ids[i]), start + 17)))
            for i in range(size)
        }
        assert delivered == expected


def test_document_starts_come_when_asked_for() -> None:
    plan, sources = two_sources(16)
    loader = Loader(
        plan,
        sources,
        sequence_length=16,
        micro_batch_size=3,
        data_parallel_rank=0,
        data_parallel_size=1,
        with_documents=True,
    )
    for batch in loader.micro_batches(30, 6):
        _, windows = plan.locate(batch.samples)
        assert [starts.tolist() for starts in batch.document_starts] == [[w % 16] for w in windows.tolist()]


def test_a_batch_that_cannot_be_dealt_is_refused_before_reading() -> None:
    plan, sources = two_sources(16)
    loader = Loader(plan, sources, sequence_length=16, micro_batch_size=3, data_parallel_rank=0, data_parallel_size=2)
    with pytest.raises(UserError, match=r"global_batch_size 8 is not a multiple of .*_size 3 x 2 data-parallel ranks = 6"):
        loader.micro_batches(0, 8)


def test_sources_must_be_those_of_the_plan() -> None:
    plan, sources = two_sources(16)
    with pytest.raises(AssertionError, match="not those of the plan"):
        Loader(plan, sources[::-1], sequence_length=16, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1)
    with pytest.raises(AssertionError, match="not those of the plan"):
        Loader(plan, sources, sequence_length=8, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1)


@given(st.integers(10, 300), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.none() | st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_validation_is_each_window_once_and_equally_many_batches(
    num_tokens: int, length: int, micro: int, ranks: int, most: int | None
) -> None:
    source = MemorySource("web", num_tokens)
    parts = [list(validation_batches(source, length, micro, rank, ranks, most)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    windows, left_out = validation_windows(source, length, most)
    labels = []
    for batch in (batch for part in parts for batch in part):
        assert batch.tokens.shape == (micro, length + 1) and batch.valid.dtype == bool
        np.testing.assert_array_equal(batch.tokens, batch.samples[:, None] * length + np.arange(length + 1))
        labels += batch.tokens[batch.valid, 1:].reshape(-1).tolist()
    # every label position exactly once, none in the tail
    assert sorted(labels) == list(range(1, windows * length + 1))
    assert windows * length + left_out == num_tokens - 1
    if most is None:
        assert left_out < length


def test_a_domain_without_a_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.validation.web: 16 tokens are not one full window of .* 17"):
        validation_batches(MemorySource("web", 16), 16, 1, 0, 1)
