"""The shuffle: a permutation of the documents that the seed alone decides, the same however it is cut."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.data.preparing import shuffle
from megatron_synth.data.preparing.assembly import Assembly, ShardTask, plan_shards, write_shard
from megatron_synth.data.preparing.shuffle import document_keys, gather
from megatron_synth.data.preparing.token_runs import RECORD, trim, write_run
from megatron_synth.data.shards.source import Shard

DTYPE = np.dtype(np.int32)


def run(folder, split, lengths, seed):
    """Documents of the token split * 1000 + place, each `length` times, sorted by key."""
    records = np.zeros(len(lengths), RECORD)
    records["length"], records["place"], records["text_bytes"] = lengths, np.arange(len(lengths)), lengths
    records["key"] = document_keys(seed, "web", split, records["place"])
    records = records[np.argsort(records["key"])]
    tokens = np.repeat(split * 1000 + records["place"], records["length"]).astype(DTYPE)
    return write_run(folder, "web", split, 0, records, tokens)


def assemble(folder, assembly, shard_tokens):
    """The documents of all shards, in order, as (token, length)."""
    cuts = plan_shards(map(assembly.lengths, range(assembly.units)), shard_tokens)
    found, sizes = [], []
    for number, (start, end) in enumerate(cuts):
        prefix = folder / f"shard-{number}"
        info = write_shard(None, ShardTask(prefix, DTYPE, assembly, number, start, end))
        shard = Shard(prefix)
        starts = [*shard.document_starts(0, shard.num_tokens).tolist(), shard.num_tokens]
        found += [(int(shard.tokens[a]), b - a) for a, b in itertools.pairwise(starts)]
        sizes.append((info.documents, info.tokens))
    return found, sizes


@settings(deadline=None, max_examples=50)
@given(
    splits=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=25), min_size=1, max_size=6),
    buckets=st.integers(1, 9),
    shard_tokens=st.integers(1, 200),
    seed=st.integers(0, 2**63),
)
def test_any_number_of_buckets_and_shards_gives_the_same_permutation(tmp_path_factory, splits, buckets, shard_tokens, seed):
    folder = tmp_path_factory.mktemp("runs")
    runs = tuple(run(folder, number, lengths, seed) for number, lengths in enumerate(splits))
    found, sizes = assemble(folder, Assembly(runs, buckets), shard_tokens)
    keyed = sorted(
        (int(document_keys(seed, "web", number, np.array([place]))[0]), number * 1000 + place, length)
        for number, lengths in enumerate(splits)
        for place, length in enumerate(lengths)
    )
    assert found == [(token, length) for _, token, length in keyed]
    assert all(tokens <= shard_tokens or documents == 1 for documents, tokens in sizes)
    for (_, one), (_, two) in itertools.pairwise(sizes):
        assert one + two > shard_tokens, "a shard was closed although the next document fitted"


@settings(deadline=None, max_examples=50)
@given(
    splits=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=25), min_size=1, max_size=6),
    shard_tokens=st.integers(1, 200),
)
def test_without_a_shuffle_shards_hold_the_runs_in_order(tmp_path_factory, splits, shard_tokens):
    folder = tmp_path_factory.mktemp("runs")
    runs = tuple(run(folder, number, lengths, 0) for number, lengths in enumerate(splits))
    found, _ = assemble(folder, Assembly(runs, None), shard_tokens)
    expected = [(token, length) for one in runs for token, length in zip(
        (one.split * 1000 + one.read_records()["place"]).tolist(), one.read_records()["length"].tolist(), strict=True
    )]  # fmt: skip
    assert found == expected


def test_keys_are_uniform_and_differ_by_seed_target_split_and_place():
    keys = document_keys(1, "web", 0, np.arange(100_000))
    assert np.unique(keys).size == keys.size
    counts = np.bincount((keys >> np.uint64(60)).astype(np.int64), minlength=16)
    assert np.abs(counts - 6250).max() < 5 * (100_000 / 16 * 15 / 16) ** 0.5
    order = np.argsort(keys)
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 5 / 100_000**0.5, "neighbors stay neighbors"
    for other in (document_keys(2, "web", 0, np.arange(10)), document_keys(1, "web", 1, np.arange(10))):
        assert not np.isin(other, keys).any()
    assert not np.isin(document_keys(1, "web-valid", 0, np.arange(10)), keys).any()


def test_a_damaged_run_is_noticed(tmp_path):
    one = run(tmp_path, 3, [4, 5, 6], 0)
    assert one.is_whole()
    data = bytearray(one.path.read_bytes())
    for at in (9, 40, len(data) - 1):
        data[at] ^= 1
        one.path.write_bytes(data)
        assert not one.is_whole()
        data[at] ^= 1
    one.path.write_bytes(data[:-1])
    assert not one.is_whole()
    one.path.unlink()
    assert not one.is_whole()


def test_trimming_keeps_the_first_documents_of_the_split(tmp_path):
    one = run(tmp_path, 0, [3, 1, 4, 1, 5], seed=9)
    cut = trim(one, DTYPE, 3)
    assert cut.is_whole() and sorted(cut.read_records()["place"].tolist()) == [0, 1, 2]
    assert sorted(cut.read_tokens(DTYPE, 0, cut.tokens).tolist()) == [0, 0, 0, 1, 2, 2, 2, 2]
    assert trim(cut, DTYPE, 0) is None and not cut.path.exists()


def test_gather_and_bucket_count():
    tokens = np.arange(10)
    assert gather(tokens, np.array([7, 0]), np.array([2, 3])).tolist() == [7, 8, 0, 1, 2]
    assert shuffle.bucket_count(0, 2) == 1
    assert shuffle.bucket_count(shuffle.BUCKET_BYTES // 2, 2) == 1
    assert shuffle.bucket_count(shuffle.BUCKET_BYTES // 2 + 1, 2) == 2


@pytest.mark.parametrize("units", [[], [[]], [[], []]])
def test_nothing_makes_no_shard(units):
    assert plan_shards([np.array(one, np.int32) for one in units], 10) == []
