"""The thread changes nothing but the time: same batches, errors where they are asked for, no thread left behind."""

from __future__ import annotations

import errno
import os
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading import loader as loader_module
from megatron_synth.data.loading import prefetch
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.loading.prefetch import STEPS_AHEAD, Prefetcher
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.mixing.schedule import Phase
from megatron_synth.data.shards.source import Source, open_source
from tests.unit.data.loading.test_loader import MemorySource, loader_of, two_sources
from tests.unit.data.shards.test_source import make

pytestmark = pytest.mark.usefixtures("compiled_and_not")


def content(batches) -> list[tuple]:
    return [(b.tokens.tolist(), b.samples.tolist(), b.source_ids.tolist()) for b in batches]


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.slow
@given(
    st.sampled_from([0, 1]),
    st.sampled_from([1, 2, 3, 4, 7, 8]),
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), min_size=1, max_size=5),
    st.sampled_from([None, 12, 25]),
)
@settings(max_examples=60, deadline=None)
def test_same_batches_with_and_without_a_thread(threads, ranks, micro, runs, end) -> None:
    """Over random stops: each run of steps begins where it likes, as after a restart."""
    size = 2 * ranks * micro
    plain = loader_of(ranks, ranks - 1, micro)
    end_sample = None if end is None else end * size
    with Prefetcher(loader_of(ranks, ranks - 1, micro), size, threads=threads, end_sample=end_sample) as prefetcher:
        for first, steps in runs:
            for step in range(first, first + steps):
                # compared before the next step is asked for: its tokens lie in the same buffers
                assert content(prefetcher.step(step * size)) == content(plain.micro_batches(step * size, size))
    assert not prefetching()


def test_buffers_are_used_again_and_never_those_in_the_caller_s_hands() -> None:
    made: list[np.ndarray] = []

    def allocate(shape, dtype):
        made.append(np.empty(shape, dtype))
        return made[-1]

    with Prefetcher(loader_of(), 8, allocate=allocate) as prefetcher:
        for step in range(50):
            batches = prefetcher.step(step * 8)
            before = content(batches)
            threading.Event().wait(0.001)  # the thread goes on meanwhile
            assert content(batches) == before
            assert all(any(batch.tokens is own for own in made) for batch in batches)
    assert len(made) <= (STEPS_AHEAD + 1) * 4


def test_the_thread_waits_for_the_consumer() -> None:
    loader = loader_of()
    reads = []
    source = loader.sources[0]
    loader._readers = [lambda begin, out: (reads.append(begin), source.read(0, out))] * 2
    with Prefetcher(loader, 8) as prefetcher:
        prefetcher.step(0)
        while len(reads) <= 8:  # some steps are ready before they are asked for,
            threading.Event().wait(0.001)
        threading.Event().wait(0.1)  # and no more
        assert len(reads) <= (STEPS_AHEAD + 1) * 8


class Failing(MemorySource):
    def read(self, begin: int, out: np.ndarray) -> None:
        if self.broken:
            raise UserError("web.bin: Input/output error at offset 7")
        super().read(begin, out)


def test_errors_of_the_thread_are_raised_where_batches_are_asked_for() -> None:
    _, sources = two_sources(16)
    web = Failing("web", 5000)
    web.broken = False
    loader = loader_of(sources=[web, sources[1]])
    with Prefetcher(loader, 4) as prefetcher:
        first = content(prefetcher.step(0))
        web.broken = True
        for _ in range(2):
            with pytest.raises(UserError, match="Input/output error at offset 7"):
                for step in range(1, 9):
                    prefetcher.step(step * 4)
        web.broken = False
        # what it heard is not its last word: a step elsewhere starts afresh
        assert content(prefetcher.step(0)) == first
    assert not prefetching()


def test_the_end_of_the_plan_is_served_and_not_passed() -> None:
    sources = [MemorySource("web", 5000), MemorySource("qa", 900, offset=10**6)]
    specs = [SourceSpec(s.name, Fraction(0), s.num_windows(16), 100.0) for s in sources]
    plan = MixturePlan(specs, 3, [Phase(40, (Fraction(1, 2), Fraction(1, 2)))])
    loader = Loader(plan, sources, sequence_length=16, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1)
    with Prefetcher(loader, 8) as prefetcher:
        delivered = [batch.samples for step in range(5) for batch in prefetcher.step(step * 8)]
        assert sorted(np.concatenate(delivered).tolist()) == list(range(40))
        with pytest.raises(AssertionError, match="beyond the last phase"):
            prefetcher.step(40)


def mixed(source: Source) -> Loader:
    plan = MixturePlan([SourceSpec("s", Fraction(1), source.num_windows(16), 100.0)], 1)
    return Loader(plan, [source], sequence_length=16, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1)


def test_a_disk_error_names_file_and_offset(tmp_path, monkeypatch) -> None:
    make(tmp_path / "s", [[200, 300], [400]])
    loader = mixed(open_source(tmp_path / "s", "s", memory_map=False))
    working, failing = os.preadv, 3 * 16 * 2

    def preadv(fd, buffers, offset):
        if offset == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return working(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with Prefetcher(loader, 4) as prefetcher, pytest.raises(UserError) as caught:
        for step in range(20):
            prefetcher.step(step * 4)
    assert "shard-0000" in str(caught.value)
    assert f"Input/output error while reading 34 bytes at offset {failing}" in str(caught.value)


def test_a_file_that_is_cut_off_while_in_use_is_named(tmp_path) -> None:
    make(tmp_path / "s", [[500]])
    loader = mixed(open_source(tmp_path / "s", "s", memory_map=False))
    with Prefetcher(loader, 4) as prefetcher:
        prefetcher.step(0)
        os.truncate(tmp_path / "s" / "shard-00000.bin", 100)
        with pytest.raises(UserError, match=r"shard-00000.bin: 34 bytes expected at offset \d+, found \d+: the file was cut"):
            for step in range(1, 20):
                prefetcher.step(step * 4)


@pytest.mark.parametrize(("slow_row_s", "asked_steps"), [(0.0, 20), (1e9, 1)])
def test_a_slow_disk_is_asked_once_for_each_row_before_it_is_read(monkeypatch, slow_row_s: float, asked_steps: int) -> None:
    """Every row counts as slow, or none: then the disk is asked for the first step alone."""
    monkeypatch.setattr(prefetch, "SLOW_ROW_S", slow_row_s)
    loader = loader_of()
    asked: list[tuple[int, int]] = []
    unasked: list[tuple[int, int]] = []
    for number, source in enumerate(loader.sources):
        monkeypatch.setattr(source, "will_need", lambda begin, length, number=number: asked.append((number, begin)))

    def reader(number: int, read):
        def reading(begin: int, out: np.ndarray) -> None:
            if (number, begin) not in asked:
                unasked.append((number, begin))
            read(begin, out)

        return reading

    loader._readers = [reader(number, source.read) for number, source in enumerate(loader.sources)]
    with Prefetcher(loader, 8, end_sample=160) as prefetcher:
        for step in range(20):
            prefetcher.step(step * 8)
    assert len(asked) == 8 * asked_steps
    assert bool(unasked) == (asked_steps < 20)


def test_the_disk_is_asked_again_and_again_once_it_was_slow_and_not_for_ever(monkeypatch) -> None:
    """What was asked for comes quickly: that is no reason to stop asking at once."""
    monkeypatch.setattr(prefetch, "ASKED_LONGER", 5)
    clock = iter(np.cumsum([0.0, 1.0, *[0.0] * 100]).tolist())  # the first step takes a second
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: next(clock))
    loader = loader_of()
    asked: list[int] = []
    monkeypatch.setattr(loader, "will_need", lambda first, samples: asked.append(first // samples))
    with Prefetcher(loader, 8, end_sample=160) as prefetcher:
        for step in range(20):
            prefetcher.step(step * 8)
    # the first, then with each of five steps those up to the second after it
    assert asked == list(range(8))


def test_tables_of_coming_steps_do_not_push_out_that_of_the_step_that_is_read(monkeypatch) -> None:
    monkeypatch.setattr(loader_module, "LOOK_AHEAD_ROWS", 8)
    loader, made = loader_of(), []
    make_table = loader._make
    monkeypatch.setattr(loader, "_make", lambda *args: made.append(args) or make_table(*args))
    plain = loader_of()
    for step in range(12):
        for ahead in range(3):
            loader.will_need((step + ahead) * 8, 8)
        assert content(loader.micro_batches(step * 8, 8)) == content(plain.micro_batches(step * 8, 8))
    assert len(made) == 14  # one for each step, those asked for beyond the last among them
