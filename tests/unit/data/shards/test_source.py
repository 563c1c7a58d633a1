"""Windows and document starts of opened sources against brute force over the whole stream; faults on opening."""

import contextlib
import gc
import itertools
import os
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.config.errors import RankError, UserError
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards import indexed
from megatron_synth.data.shards import source as source_module
from megatron_synth.data.shards.indexed import ShardWriter
from megatron_synth.data.shards.manifest import Counts, Manifest, Provenance, ShardInfo, TokenizerInfo
from megatron_synth.data.shards.source import Source, check_compatible, open_source
from tests.support import ROOT

pytestmark = pytest.mark.usefixtures("compiled_and_not")


def make(folder, shards, dtype=np.uint16, fingerprint="f" * 64):
    """Write `shards` (lists of document lengths) and a manifest; the stream and the starts of its documents."""
    folder.mkdir(parents=True, exist_ok=True)
    infos, stream, starts = [], [], []
    for number, lengths in enumerate(shards):
        writer = ShardWriter(folder / f"shard-{number:05d}", np.dtype(dtype))
        for length in lengths:
            starts.append(len(stream))
            tokens = (np.arange(len(stream), len(stream) + length) * 7919 % 60_000).astype(dtype)
            writer.add(tokens, np.array([length]))
            stream.extend(tokens.tolist())
        infos.append(ShardInfo(name=f"shard-{number:05d}", **vars(writer.finish())))
    Manifest(
        name=folder.name,
        kind="natural",
        generator=None,
        split="train",
        dtype=np.dtype(dtype).name,
        tokenizer=TokenizerInfo(path="../tokenizer.json", fingerprint=fingerprint, vocab_size=60_000, eod_id=0),
        counts=Counts(documents=len(starts), tokens=len(stream), text_bytes=4 * len(stream)),
        shards=tuple(infos),
        made=Provenance(program="test", config_digest="0" * 64, inputs={}, holdout="0"),
    ).save(folder)
    return np.array(stream), np.array(starts)


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 30), min_size=0, max_size=8), min_size=1, max_size=5),
    sequence_length=st.integers(1, 50),
    dtype=st.sampled_from([np.uint16, np.int32]),
    out_type=st.sampled_from([np.int64, np.int32]),
)
def test_windows_and_document_starts_equal_brute_force(tmp_path_factory, shards, sequence_length, dtype, out_type):
    folder = tmp_path_factory.mktemp("source")
    stream, starts = make(folder, shards, dtype)
    source = open_source(folder, "s")
    assert (source.num_tokens, source.num_documents) == (stream.size, starts.size)
    count = source.num_windows(sequence_length)
    assert count == max(stream.size - 1, 0) // sequence_length
    for window in range(count):
        begin = window * sequence_length
        out = np.full(sequence_length + 1, -1, out_type)
        source.read_window(window, out)
        np.testing.assert_array_equal(out, stream[begin : begin + sequence_length + 1])
        expected = starts[(starts >= begin) & (starts < begin + sequence_length)] - begin
        assert source.document_starts(window, sequence_length).tolist() == expected.tolist()
    numbers, begins = source.places_of(np.arange(count) * sequence_length, sequence_length)
    ends = np.cumsum([sum(lengths) for lengths in shards])
    for window, (number, begin) in enumerate(zip(numbers.tolist(), begins.tolist(), strict=True)):
        first, last = window * sequence_length, window * sequence_length + sequence_length
        holders = np.searchsorted(ends, [first, last], side="right")
        assert number == (holders[0] if holders[0] == holders[1] else -1)
        if number >= 0:
            stored = source.shard(number).tokens[begin : begin + sequence_length + 1]
            np.testing.assert_array_equal(stored, stream[first : last + 1])


def test_loaders_copy_from_open_shards_what_reading_gives(tmp_path):
    stream, _ = make(tmp_path / "s", [[30, 11], [25], [40, 3]])
    sizes = {"sequence_length": 6, "micro_batch_size": 4, "data_parallel_rank": 0, "data_parallel_size": 1}
    mapped, read = open_source(tmp_path / "s", "s"), open_source(tmp_path / "s", "s", memory_map=False)
    plan = MixturePlan([SourceSpec("s", Fraction(1), mapped.num_windows(6), 100.0)], 0)
    for first in (0, 4, 8, 12, 40):
        for source in (mapped, read):
            for batch in Loader(plan, [source], **sizes).micro_batches(first, 4):
                _, windows = plan.locate(batch.samples)
                np.testing.assert_array_equal(batch.tokens, [stream[at * 6 : at * 6 + 7] for at in windows.tolist()])
    assert mapped.places.tokens.any()
    assert not read.places.tokens.any()


def test_a_bare_pair_opens_by_prefix_or_by_either_file(tmp_path):
    stream, _ = make(tmp_path / "s", [[5, 9, 3]])
    prefix = tmp_path / "s" / "shard-00000"
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        source = open_source(path, "bare")
        assert source.manifest is None and source.tokenizer_path is None
        out = np.empty(17, np.int64)
        source.read_window(0, out)
        np.testing.assert_array_equal(out, stream)


def test_opening_maps_no_tokens(tmp_path):
    """Neither opening nor document starts may touch the .bin file: it is the large one."""
    make(tmp_path / "s", [[5, 9, 3], [8]])
    source = open_source(tmp_path / "s", "s")
    for shard in (tmp_path / "s").glob("*.bin"):
        shard.unlink()
    assert source.document_starts(0, 16).tolist() == [0, 5, 14]
    with pytest.raises(UserError, match=r"shard-00000.bin: .*No such file or directory.* while mapping it"):
        source.read_window(0, np.empty(17, np.int64))


def test_a_pickled_source_carries_no_tokens(tmp_path):
    stream, _ = make(tmp_path / "s", [[20_000]])
    source = open_source(tmp_path / "s", "name")
    source.read_window(0, np.empty(101, np.int64))
    data = pickle.dumps(source)
    assert len(data) < 1000
    copy = pickle.loads(data)
    out = np.empty(101, np.int64)
    copy.read_window(3, out)
    assert copy.name == "name" and out.tolist() == stream[300:401].tolist()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", [-2, 2])
def test_changed_sizes_are_refused_with_both_numbers(tmp_path, suffix, change):
    make(tmp_path / "s", [[5], [9, 3]])
    path = tmp_path / "s" / f"shard-00001{suffix}"
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "s", "s")
    for part in (str(path), f"{size} bytes", f"{size + change} bytes", "prepare the source again"):
        assert part in str(error.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_shard_is_named(tmp_path, suffix):
    make(tmp_path / "s", [[5], [9, 3]])
    (tmp_path / "s" / f"shard-00001{suffix}").unlink()
    with pytest.raises(UserError, match=f"shard-00001{suffix}: No such file"):
        open_source(tmp_path / "s", "s")


def test_shards_of_another_source_are_refused_although_sizes_agree(tmp_path):
    make(tmp_path / "s", [[4, 4]])
    make(tmp_path / "t", [[4, 4]], np.int32)
    for suffix in (".bin", ".idx"):
        other = (tmp_path / "t" / f"shard-00000{suffix}").read_bytes()
        (tmp_path / "s" / f"shard-00000{suffix}").write_bytes(other[:16] if suffix == ".bin" else other)
    with pytest.raises(UserError, match="its index announces 32 bytes, found 16"):
        open_source(tmp_path / "s", "s")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken JSON"),
        ("[]", "format_version None"),
        ('{"format_version": 3}', "format_version 3, this program reads 1 and 2"),
        ('{"format_version": 1, "name": "s"}', "Field required"),
    ],
)
def test_broken_manifests_are_refused(tmp_path, text, message):
    make(tmp_path / "s", [[5]])
    (tmp_path / "s" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_source(tmp_path / "s", "s")
    assert str(tmp_path / "s" / "manifest.json") in str(error.value)


def test_nothing_there_and_no_manifest(tmp_path):
    with pytest.raises(UserError, match="source 'web' not found; expected a folder"):
        open_source(tmp_path / "none", "web")
    with pytest.raises(UserError, match=r"manifest.json: No such file"):
        open_source(tmp_path, "web")


def test_digest_follows_tokens_and_tokenizer_only(tmp_path):
    make(tmp_path / "a", [[5, 6]])
    make(tmp_path / "b", [[5, 6]])
    make(tmp_path / "c", [[6, 5]])
    make(tmp_path / "d", [[5, 6]], fingerprint="e" * 64)
    digests = [Manifest.load(tmp_path / name).digest() for name in "abcd"]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_sources_of_different_tokenizers_are_refused(tmp_path):
    make(tmp_path / "a", [[5]])
    make(tmp_path / "b", [[5]])
    make(tmp_path / "c", [[5]], fingerprint="e" * 64)
    a, b, c = (open_source(tmp_path / name, name) for name in "abc")
    bare: Source = open_source(tmp_path / "c" / "shard-00000", "bare")
    info = check_compatible([bare, a, b])
    assert info is not None and info.fingerprint == "f" * 64
    assert check_compatible([bare]) is None
    with pytest.raises(UserError) as error:
        check_compatible([a, bare, c])
    for part in ("'a'", "'c'", "f" * 12, "e" * 12, "tokenizer.path"):
        assert part in str(error.value)


def test_importing_the_store_needs_neither_torch_nor_datasets():
    code = "import sys, megatron_synth.data.preparing.prepare, megatron_synth.data.shards.source; print(list(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "datasets", "pyarrow", "tokenizers", "megatron.core") if f"'{name}'" in loaded]


def open_files(folder):
    """Files below `folder` that this process has open or mapped through a descriptor."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return [link for link in links if link.startswith(str(folder))]


@pytest.mark.parametrize("memory_map", [True, False])
def test_many_shards_are_opened_when_needed_and_never_all(tmp_path, monkeypatch, memory_map):
    stream, starts = make(tmp_path / "s", [[7, 5]] * 40)
    pool = indexed.OpenShards()
    pool._limit = 10
    monkeypatch.setattr(indexed, "_open_shards", pool)
    monkeypatch.setattr(source_module, "MANY_SHARDS", 39)
    source = open_source(tmp_path / "s", "s", memory_map=memory_map)
    assert not any(source._shards) and not open_files(tmp_path)
    windows = np.random.default_rng(0).permutation(source.num_windows(9))
    for window in windows.tolist():
        out = np.empty(10, np.int64)
        source.read_window(window, out)
        np.testing.assert_array_equal(out, stream[window * 9 : window * 9 + 10])
        assert source.document_starts(window, 9).tolist() == [at - window * 9 for at in starts if 0 <= at - window * 9 < 9]
        assert 0 < len(open_files(tmp_path)) <= 10
    # many windows at once, across all shards
    offsets, counts = source.document_starts_of(windows * 9, 9)
    expected = [[at - window * 9 for at in starts if 0 <= at - window * 9 <= 9] for window in windows.tolist()]
    assert np.split(offsets, np.cumsum(counts)[:-1])[3].tolist() == expected[3]
    assert offsets.tolist() == list(itertools.chain.from_iterable(expected))
    assert counts.tolist() == [len(one) for one in expected]
    del source
    gc.collect()
    assert not open_files(tmp_path)


def test_a_shard_that_is_another_than_announced_is_refused_when_it_is_first_needed(tmp_path, monkeypatch):
    make(tmp_path / "s", [[4, 4], [3, 5]])
    data = bytearray((tmp_path / "s" / "shard-00001.idx").read_bytes())
    data[0] ^= 1
    (tmp_path / "s" / "shard-00001.idx").write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00001.idx: not a Megatron index"):
        open_source(tmp_path / "s", "s")
    monkeypatch.setattr(source_module, "MANY_SHARDS", 1)
    source = open_source(tmp_path / "s", "s")
    source.read_window(0, np.empty(5, np.int64))
    with pytest.raises(UserError, match=r"shard-00001.idx: not a Megatron index"):
        source.read_window(2, np.empty(5, np.int64))


def test_sizes_of_many_shards_are_looked_at_in_parts_by_ranks(tmp_path, monkeypatch):
    make(tmp_path / "s", [[4, 4]] * 4)
    short = tmp_path / "s" / "shard-00002.bin"
    short.write_bytes(short.read_bytes()[:-2])
    for rank in range(2):  # few shards: every rank looks at all
        with pytest.raises(UserError, match=r"shard-00002.bin: .* announces 16 bytes, found 14") as found:
            open_source(tmp_path / "s", "s", part=(rank, 2))
        assert not isinstance(found.value, RankError)
    monkeypatch.setattr(source_module, "MANY_SHARDS", 3)
    source = open_source(tmp_path / "s", "s", part=(1, 2))  # shards 1 and 3
    with pytest.raises(UserError, match=r"shard-00002.bin"):  # what another rank was to look at is seen when it is read
        source.read(16, np.empty(8, np.int64))
    with pytest.raises(RankError, match=r"rank 0: .*shard-00002.bin: .* announces 16 bytes, found 14"):
        open_source(tmp_path / "s", "s", part=(0, 2))
    with pytest.raises(UserError, match=r"shard-00002.bin"):
        open_source(tmp_path / "s", "s")


def test_nothing_is_handed_out_that_the_check_refuses(tmp_path):
    stream, _ = make(tmp_path / "s", [[20], [20]])
    source = open_source(tmp_path / "s", "s", memory_map=False)
    asked = []

    def check(shard, first, end):
        asked.append((shard, first, end))
        if shard == 1:
            raise UserError("block 0 is bad")

    source.check_before_reading(check)
    out = np.full(10, -1, np.int64)
    source.read_window(0, out)
    assert out.tolist() == stream[:10].tolist()
    with pytest.raises(UserError, match="block 0 is bad"):
        source.read_window(2, np.full(10, -1, np.int64))
    assert asked == [(0, 0, 20), (0, 0, 0), (0, 36, 40), (1, 0, 16)]  # (0, 0, 0): the index, before the file is opened
