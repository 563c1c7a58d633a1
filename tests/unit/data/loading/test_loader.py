"""Dealing and batches: every layout sees the same samples, each once, and no rank is tied to a source."""

from __future__ import annotations

import sys
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.dealing import deal
from megatron_synth.data.loading.loader import Loader, validation_batches, validation_windows
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards.indexed import Places
from megatron_synth.data.shards.native import BusError

pytestmark = pytest.mark.usefixtures("compiled_and_not")

FIRST: dict[str, Any] = {"sequence_length": 16, "micro_batch_size": 8, "data_parallel_rank": 0, "data_parallel_size": 1}


class MemorySource:
    """A source in memory whose tokens are their own positions, plus an offset that tells sources apart."""

    def __init__(self, name: str, num_tokens: int, offset: int = 0):
        self.name, self.num_tokens = name, num_tokens
        self.stream = np.arange(num_tokens, dtype=np.int32) + offset

    def num_windows(self, sequence_length: int) -> int:
        return (self.num_tokens - 1) // sequence_length

    def read(self, begin: int, out: np.ndarray) -> None:
        assert 0 <= begin <= self.num_tokens - len(out)
        out[:] = self.stream[begin : begin + len(out)]

    def read_window(self, window: int, out: np.ndarray) -> None:
        self.read(window * (len(out) - 1), out)

    dtype = np.dtype(np.int32)
    vocab_size = None
    places = Places(1)
    masked = False

    def open_index(self, shard: int) -> None:
        raise AssertionError("no row lies in a shard")

    def unreadable(self, shard: int, error: BusError) -> UserError:
        raise AssertionError("nothing is mapped")

    def places_of(self, begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full_like(begins, -1), np.zeros_like(begins)

    def document_starts_of(self, begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        return begins // length % length, np.ones(len(begins), dtype=np.int64)

    def will_need(self, begin: int, length: int) -> None:
        assert 0 <= begin < self.num_tokens - length


def two_sources(sequence_length: int) -> tuple[MixturePlan, list[MemorySource]]:
    sources = [MemorySource("web", 5000), MemorySource("qa", 900, offset=10**6)]
    specs = [SourceSpec(s.name, Fraction(1, 2), s.num_windows(sequence_length), 100.0) for s in sources]
    return MixturePlan(specs, 3), sources


def loader_of(
    ranks: int = 1, rank: int = 0, micro: int = 2, *, sources: list[MemorySource] | None = None, **options: Any
) -> Loader:
    """A loader of the two sources, or of others in their place, in windows of 16."""
    plan, own = two_sources(16)
    places = {"data_parallel_rank": rank, "data_parallel_size": ranks}
    return Loader(plan, sources or own, sequence_length=16, micro_batch_size=micro, **places, **options)


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
    plan, _ = two_sources(16)
    size = 24
    for first in (0, 24, 4800):
        delivered = {}
        for rank in range(ranks):
            batches = list(loader_of(ranks, rank, micro).micro_batches(first, size))
            assert len(batches) == size // (micro * ranks)
            for batch in batches:
                assert batch.tokens.shape == (micro, 17) and batch.tokens.dtype == np.int64
                assert batch.boundaries is None
                for row in range(micro):
                    delivered[int(batch.samples[row])] = (int(batch.source_ids[row]), batch.tokens[row].tolist())
        ids, windows = plan.locate(np.arange(first, first + size))
        expected = {
            first + i: (int(ids[i]), list(range(start := int(windows[i]) * 16 + 10**6 * int(ids[i]), start + 17)))
            for i in range(size)
        }
        assert delivered == expected


def test_boundaries_come_when_asked_for() -> None:
    loader = loader_of(micro=3, with_boundaries=True)
    for first in (30, 36, 42, 48):  # the later ones from a table of many steps
        for batch in loader.micro_batches(first, 6):
            _, windows = loader.plan.locate(batch.samples)
            begins = sorted({0, 16, 32} | {row * 16 + window % 16 for row, window in enumerate(windows.tolist())})
            assert batch.boundaries is not None
            assert batch.boundaries.cu_seqlens.tolist() == [*begins, 48]


def test_without_tokens_nothing_is_read() -> None:
    plan, sources = two_sources(16)
    for source in sources:
        source.stream = source.stream[:0]  # reading would fail
    loader = loader_of(2, 1, sources=sources, with_tokens=False)
    for batch in loader.micro_batches(8, 12):
        assert batch.tokens.shape == (2, 0)
        np.testing.assert_array_equal(batch.source_ids, plan.locate(batch.samples)[0])
    with pytest.raises(ValueError, match=r"."):
        list(loader_of(2, 1, sources=sources).micro_batches(8, 12))


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 2, 3])), min_size=1, max_size=12),
    st.sampled_from([1, 2, 3, 4, 7, 8]),
    st.integers(1, 8),
    st.sampled_from([np.int32, np.int64]),
)
@settings(max_examples=40, deadline=None)
def test_what_is_worked_out_ahead_is_what_each_step_holds(
    jumps: list[tuple[int, int]], ranks: int, micro: int, dtype: type
) -> None:
    """One loader that jumps about and changes its batch size, against a new one for each step."""
    loader = loader_of(ranks, ranks - 1, micro, dtype=dtype)
    for jump, number in jumps:
        size = micro * ranks * number
        for step in range(jump, jump + 3):
            found = list(loader.micro_batches(step * size, size))
            fresh = list(loader_of(ranks, ranks - 1, micro, dtype=dtype).micro_batches(step * size, size))
            assert len(found) == len(fresh) == number
            for one, other in zip(found, fresh, strict=True):
                assert one.tokens.dtype == dtype
                np.testing.assert_array_equal(one.tokens, other.tokens)
                np.testing.assert_array_equal(one.samples, other.samples)
                np.testing.assert_array_equal(one.source_ids, other.source_ids)


def test_memory_does_not_grow_with_the_run() -> None:
    loader = loader_of(micro=8)
    list(loader.micro_batches(10**5 // 64 * 64, 64))
    tracemalloc.start()
    try:
        for total in (10**7, 10**9, 10**12):
            for step in range(3):
                list(loader.micro_batches((total // 64 + step) * 64, 64))
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_the_first_batch_comes_at_once() -> None:
    """Wherever in the run it is: construction and first batch take as many lines of Python and as much memory."""
    plan, sources = two_sources(16)
    list(Loader(plan, sources, **FIRST).micro_batches(0, 8))

    def work(first: int) -> tuple[int, int]:
        lines, before = 0, sys.gettrace()

        def count(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return count

        tracemalloc.start()
        sys.settrace(count)
        try:
            next(iter(Loader(plan, sources, **FIRST).micro_batches(first, 8)))
        finally:
            sys.settrace(before)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return lines, peak

    work(0)
    lines, peak = work(0)
    for first in (80_000, 8 * 10**11):
        assert 0 < work(first)[0] <= 1.5 * lines and work(first)[1] <= 1.5 * peak, (first, work(first), lines, peak)


def test_a_batch_that_cannot_be_dealt_is_refused_before_reading() -> None:
    loader = loader_of(2, micro=3)
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
