"""Boundaries of batches against a walk over the tokens' documents, one position after the other."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.data.loading import loader as loader_module
from megatron_synth.data.loading.boundaries import BoundaryTable
from megatron_synth.data.loading.loader import Loader, validation_batches
from megatron_synth.data.loading.values import SourceValues
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards import indexed, native
from megatron_synth.data.shards.indexed import ShardWriter
from megatron_synth.data.shards.source import open_source
from tests.unit.data.shards.test_source import make

pytestmark = pytest.mark.usefixtures("compiled_and_not")


def walk(documents: np.ndarray) -> tuple[list[int], list[list[int]], list[list[bool]]]:
    """cu_seqlens, position ids and mask of a batch whose tokens [B, S + 1] belong to these documents."""
    rows, length = documents.shape[0], documents.shape[1] - 1
    cu_seqlens, positions, mask = [], [], []
    for row in range(rows):
        positions.append([])
        mask.append([])
        for at in range(length):
            new = at == 0 or documents[row, at] != documents[row, at - 1]
            if new:
                cu_seqlens.append(row * length + at)
            positions[-1].append(0 if new else positions[-1][-1] + 1)
            mask[-1].append(bool(documents[row, at] == documents[row, at + 1]))
    return [*cu_seqlens, rows * length], positions, mask


def check(found, documents: np.ndarray) -> None:
    cu_seqlens, positions, mask = walk(documents)
    assert found.cu_seqlens.dtype == np.int32 and found.cu_seqlens.tolist() == cu_seqlens
    assert found.position_ids().tolist() == positions
    assert found.loss_mask().tolist() == mask
    assert found.max_seqlen == max(np.diff(cu_seqlens))


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_tables_equal_a_walk(rows: int, batches: int, length: int, random) -> None:
    starts = [sorted({at for at in range(length + 1) if random.random() < 0.3}) for _ in range(rows * batches)]
    counts = np.array([len(row) for row in starts])
    table = BoundaryTable(np.array(list(itertools.chain.from_iterable(starts)), dtype=np.int64), counts, length, rows)
    for number in range(batches):
        documents = [
            np.cumsum([at in starts[row] for at in range(length + 1)]) for row in range(number * rows, (number + 1) * rows)
        ]
        check(table.batch(number), np.array(documents))


@pytest.mark.slow
@given(
    shards=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=9), min_size=1, max_size=4),
    length=st.integers(1, 25),
    micro=st.integers(1, 3),
    sampled=st.sampled_from([1, 2, 3, 4096]),
)
@settings(max_examples=60, deadline=None)
def test_a_loader_s_boundaries_are_those_of_the_documents_that_it_reads(
    tmp_path_factory, shards, length, micro, sampled
) -> None:
    """Each token is the number of its document, in two sources of several shards, however coarse the index in memory."""
    folder: Path = tmp_path_factory.mktemp("sources")
    number, sources = 0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "SAMPLED", sampled)
        for name in ("a", "b"):
            make(folder / name, [[*part, 60] for part in shards], np.int32)
            for shard in range(len(shards)):
                lengths = np.array([*shards[shard], 60])
                writer = ShardWriter(folder / name / f"shard-{shard:05d}", np.dtype(np.int32))
                writer.add(np.repeat(np.arange(number, number + len(lengths), dtype=np.int32), lengths), lengths)
                writer.finish()
                number += len(lengths)
            sources.append(open_source(folder / name, name))
        specs = [SourceSpec(source.name, Fraction(1, 2), source.num_windows(length), 1e9) for source in sources]
        loader = Loader(
            MixturePlan(specs, 1),
            sources,
            sequence_length=length,
            micro_batch_size=micro,
            data_parallel_rank=0,
            data_parallel_size=1,
            with_boundaries=True,
        )
        for step in range(4):
            for batch in loader.micro_batches(step * 2 * micro, 2 * micro):
                check(batch.boundaries, batch.tokens)
        for batch in validation_batches(sources[0], length, micro, 0, 1, with_boundaries=True):
            check(batch.boundaries, batch.tokens)


@pytest.mark.parametrize("asked", ["boundaries", "values"])
def test_of_many_closed_shards_few_indexes_are_opened_at_once(tmp_path, monkeypatch, asked: str) -> None:
    shards, rows = 40, 2
    make(tmp_path / "s", [[7, 5, 9]] * shards)
    monkeypatch.setattr(loader_module, "OPENED_AHEAD", 8)

    def fresh() -> Loader:
        source = open_source(tmp_path / "s", "s")
        plan = MixturePlan([SourceSpec("s", Fraction(1), source.num_windows(4), 1e9)], 1)
        places = {"data_parallel_rank": 0, "data_parallel_size": 1}
        values = [SourceValues(source, np.zeros((1, source.num_documents), np.uint8))] if asked == "values" else None
        both = {"with_boundaries": asked == "boundaries", "values": values}
        return Loader(plan, [source], sequence_length=4, micro_batch_size=rows, **places, **both)

    few, many = fresh(), fresh()
    monkeypatch.setattr(many, "_rows_ahead", lambda: 200)
    counts = []
    for step in range(50):
        batches = [next(loader.micro_batches(step * rows, rows)) for loader in (few, many)]
        assert batches[0].tokens.tolist() == batches[1].tokens.tolist()
        if asked == "boundaries":
            assert batches[0].boundaries.cu_seqlens.tolist() == batches[1].boundaries.cu_seqlens.tolist()
        counts.append([sum(shard._index is not None for shard in loader.sources[0]._shards) for loader in (few, many)])
    assert counts[1][0] <= rows * 2 + 8 * 2 and counts[1][1] == shards  # a window may lie in two shards
    if native.library() is not None:
        assert few._rows_ahead() == loader_module.LOOK_AHEAD_ROWS  # nearly all are open by now
