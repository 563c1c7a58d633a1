"""Every damage to a prepared source is found and named: file, block, byte; nothing of a bad block is served."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.cli.prepare import verify as prepare_verify
from megatron_synth.config.errors import UserError
from megatron_synth.data.shards import block_hash, checksums
from megatron_synth.data.shards.block_hash import BlockHasher, checksum, expected_blocks
from megatron_synth.data.shards.checksums import BlockChecker, verify
from megatron_synth.data.shards.indexed import ShardWriter
from megatron_synth.data.shards.manifest import Counts, Manifest, Provenance, ShardInfo, TokenizerInfo
from megatron_synth.data.shards.source import open_source

BLOCK = 256
VOCABULARY = 1000


def make(folder, seed=0, shards=2, documents=40, vocabulary=VOCABULARY):
    """A source of blocks of 256 bytes, some 30 a shard."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    infos = []
    for number in range(shards):
        lengths = random.integers(1, 200, documents)
        writer = ShardWriter(folder / f"shard-{number:05d}", np.dtype(np.uint16))
        writer._blocks = BlockHasher(BLOCK)
        writer.add(random.integers(0, VOCABULARY, lengths.sum()).astype(np.uint16), lengths)
        infos.append(ShardInfo(name=f"shard-{number:05d}", **vars(writer.finish())))
    manifest = Manifest(
        name=folder.name,
        kind="natural",
        generator=None,
        split="train",
        dtype="uint16",
        tokenizer=TokenizerInfo(path="../tokenizer.json", fingerprint="f" * 64, vocab_size=vocabulary, eod_id=0),
        counts=Counts(documents=documents * shards, tokens=sum(info.tokens for info in infos), text_bytes=1),
        block_bytes=BLOCK,
        shards=tuple(infos),
        made=Provenance(program="test", config_digest="0" * 64, inputs={}, holdout="0"),
    )
    manifest.save(folder)
    return manifest


def flip(path, at, bit=0):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 30))
def test_checksums_do_not_depend_on_how_the_bytes_arrive(parts, block_bytes):
    hasher = BlockHasher(block_bytes)
    for part in parts:
        hasher.update(part)
    whole = b"".join(parts)
    expected = [checksum(whole[at : at + block_bytes]) for at in range(0, len(whole), block_bytes)]
    assert expected_blocks(hasher.finish()) == expected
    assert len(expected) == block_hash.block_count(len(whole), block_bytes)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_intact_source_is_read_whole(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCKS_PER_TASK", 7)
    manifest = make(tmp_path / "s")
    result = verify([tmp_path / "s"], workers=workers)
    assert result.faults == () and result.unblocked == 0
    assert result.read_bytes == sum(shard.bin_bytes + shard.idx_bytes for shard in manifest.shards)


@settings(deadline=None, max_examples=60)
@given(shard=st.integers(0, 1), share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found_in_its_block_and_served_by_nobody(tmp_path_factory, shard, share, bit):
    folder = tmp_path_factory.mktemp("s") / "s"
    manifest = make(folder)
    path = folder / f"shard-{shard:05d}.bin"
    at = int(share * manifest.shards[shard].bin_bytes)
    flip(path, at, bit)
    block = at // BLOCK
    (fault,) = verify([folder], workers=2).faults
    assert (fault.file, fault.block, fault.first_byte) == (str(path), block, block * BLOCK)
    checker = BlockChecker(folder, manifest)
    size = manifest.shards[shard].bin_bytes
    checker.check(1 - shard, 0, manifest.shards[1 - shard].bin_bytes)
    for first in range(size // BLOCK + 1):
        begin, end = first * BLOCK, min(first * BLOCK + 1, size)
        if first == block:
            for _ in range(2):
                with pytest.raises(UserError, match=f"shard-{shard:05d}.bin, block {block} \\(bytes {block * BLOCK} to"):
                    checker.check(shard, begin, end)
        else:
            checker.check(shard, begin, end)


@settings(deadline=None, max_examples=150)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_an_index_is_found_and_located(tmp_path_factory, share, bit):
    folder = tmp_path_factory.mktemp("s") / "s"
    manifest = make(folder)
    path = folder / "shard-00001.idx"
    at = int(share * manifest.shards[1].idx_bytes)
    flip(path, at, bit)
    (fault,) = verify([folder], workers=2).faults
    assert fault.file == str(path) and "altered" in fault.message
    if at < 34:
        assert fault.first_byte == 0
    else:
        base, width = (34, 4) if at < 34 + 4 * 40 else (34 + 4 * 40, 8)
        assert fault.first_byte == base + (at - base) // width * width
    with pytest.raises(UserError, match=r"shard-00001.idx"):
        BlockChecker(folder, manifest).check(1, 0, 1)


def test_truncated_and_grown_files_say_how_many_bytes_and_where(tmp_path):
    manifest = make(tmp_path / "s")
    path = tmp_path / "s" / "shard-00000.bin"
    size = manifest.shards[0].bin_bytes
    os.truncate(path, 1000)
    (fault,) = verify([tmp_path / "s"], workers=1).faults
    assert (fault.file, fault.block, fault.first_byte) == (str(path), 1000 // BLOCK, 1000)
    assert fault.message == f"truncated: 1000 bytes, manifest.json announces {size}"
    checker = BlockChecker(tmp_path / "s", manifest)
    checker.check(0, 0, BLOCK)
    with pytest.raises(UserError, match=r"block 3 .*ends at byte 1000"):
        checker.check(0, 3 * BLOCK, 3 * BLOCK + 1)
    os.truncate(path, size + 10)
    found = [str(fault) for fault in verify([tmp_path / "s"], workers=1).faults]
    assert any(f"byte {size}: too long: {size + 10} bytes" in one for one in found)


def test_missing_files_are_named_once(tmp_path):
    manifest = make(tmp_path / "s")
    for suffix in (".bin", ".idx"):
        (tmp_path / "s" / f"shard-00001{suffix}").unlink()
    faults = verify([tmp_path / "s"], workers=2).faults
    assert sorted(Path(fault.file).name for fault in faults) == ["shard-00001.bin", "shard-00001.idx"]
    assert all("No such file" in fault.message for fault in faults)
    with pytest.raises(UserError, match=r"shard-00001\.idx: cannot be read: No such file"):
        BlockChecker(tmp_path / "s", manifest).check(1, 0, 1)


def test_a_shard_in_the_place_of_another_is_named(tmp_path):
    make(tmp_path / "s", seed=0)
    make(tmp_path / "t", seed=1)
    path, other = tmp_path / "s" / "shard-00001.bin", tmp_path / "t" / "shard-00000.bin"
    shutil.copyfile(tmp_path / "s" / "shard-00000.bin", path)  # lengths differ: sizes and blocks
    faults = verify([tmp_path / "s"], workers=2).faults
    assert any("announces" in fault.message for fault in faults) and all(fault.file == str(path) for fault in faults)
    assert any(f"holds block 0 of {tmp_path / 's' / 'shard-00000.bin'}" in fault.message for fault in faults)
    shutil.rmtree(tmp_path / "s")
    make(tmp_path / "s", seed=0)
    # as many tokens, other ones
    size = path.stat().st_size
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    data = np.random.default_rng(5).integers(0, VOCABULARY, size // 2).astype(np.uint16).tobytes()
    other.write_bytes(data)
    hasher = BlockHasher(BLOCK)
    hasher.update(data)
    manifest["counts"]["tokens"] += size // 2 - manifest["shards"][0]["tokens"]
    manifest["shards"][0] |= {"bin_bytes": size, "tokens": size // 2, "bin_blocks": hasher.finish()}
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(manifest))
    path.write_bytes(data)
    (fault,) = verify([tmp_path / "s", tmp_path / "t"], workers=2).faults
    assert fault.file == str(path) and fault.message == f"swapped: holds the tokens of {other}"


def test_swapped_blocks_are_told_from_altered_ones(tmp_path):
    make(tmp_path / "s")
    path = tmp_path / "s" / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[:BLOCK], data[3 * BLOCK : 4 * BLOCK] = data[3 * BLOCK : 4 * BLOCK], data[:BLOCK]
    path.write_bytes(data)
    flip(path, 5 * BLOCK)
    found = {fault.block: fault.message for fault in verify([tmp_path / "s"], workers=1).faults}
    assert found.keys() == {0, 3, 5}
    assert f"holds block 3 of {path}" in found[0] and f"holds block 0 of {path}" in found[3]
    assert found[5].startswith("altered")


def test_ids_beyond_the_vocabulary_are_found_although_the_checksums_are_right(tmp_path):
    make(tmp_path / "s", vocabulary=900)
    tokens = np.fromfile(tmp_path / "s" / "shard-00000.bin", np.uint16)
    per_block = tokens.size and BLOCK // 2
    bad = {at // per_block for at in np.flatnonzero(tokens >= 900).tolist()}
    faults = [fault for fault in verify([tmp_path / "s"], workers=1).faults if "00000" in fault.file]
    assert {fault.block for fault in faults} == bad
    first = int(np.argmax(tokens >= 900))
    assert faults[0].first_byte == 2 * first
    assert faults[0].message == f"token id {tokens[first]}, the vocabulary has 900"


def test_a_disk_error_names_file_and_byte(tmp_path, monkeypatch):
    manifest = make(tmp_path / "s")
    read = os.preadv

    def broken(file, buffers, offset):
        if offset >= 2 * BLOCK:
            raise OSError(errno.EIO, "Input/output error")
        return read(file, [memoryview(buffers[0])[:100]], offset)  # short reads are no errors

    monkeypatch.setattr(checksums.os, "preadv", broken)
    faults = [fault for fault in verify([tmp_path / "s"], workers=1).faults if fault.file.endswith("shard-00000.bin")]
    assert faults[0].block == 2 and faults[0].first_byte == 2 * BLOCK and "Input/output error" in faults[0].message
    checker = BlockChecker(tmp_path / "s", manifest)
    checker.check(0, 0, 2 * BLOCK)
    with pytest.raises(UserError, match=r"shard-00000\.bin, block 2 \(bytes 512 to 768\): cannot be read: Input/output error"):
        checker.check(0, 0, 2 * BLOCK + 1)


def test_a_checked_block_is_read_once(tmp_path, monkeypatch):
    manifest = make(tmp_path / "s")
    checker = BlockChecker(tmp_path / "s", manifest)
    reads = []
    read = os.preadv
    monkeypatch.setattr(checksums.os, "preadv", lambda file, buffers, at: (reads.append(at), read(file, buffers, at))[1])
    for begin in (0, 100, BLOCK - 1, BLOCK, 2 * BLOCK):
        checker.check(0, begin, begin + BLOCK)
    assert reads == [0, BLOCK, 2 * BLOCK]


def old_manifest(folder):
    """Make the manifest one of version 1."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    digest = Manifest.load(folder).digest()
    data["format_version"] = 1
    del data["block_bytes"], data["made"]["shuffle_seed"]
    for shard in data["shards"]:
        del shard["bin_blocks"]
    path.write_text(json.dumps(data))
    return digest


def test_manifests_of_version_1_open_have_the_same_digest_and_are_verified_by_file(tmp_path):
    make(tmp_path / "s")
    digest = old_manifest(tmp_path / "s")
    manifest = Manifest.load(tmp_path / "s")
    assert manifest.digest() == digest
    result = verify([tmp_path / "s"], workers=2)
    assert result.faults == () and result.unblocked == 2
    flip(tmp_path / "s" / "shard-00001.bin", 7)
    (fault,) = verify([tmp_path / "s"], workers=2).faults
    assert fault.file.endswith("shard-00001.bin") and "SHA-256" in fault.message
    with pytest.raises(UserError, match="no checksums of blocks for shard-00000"):
        BlockChecker(tmp_path / "s", manifest)


def test_a_manifest_with_too_few_checksums_is_refused(tmp_path):
    make(tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    data = json.loads(path.read_text())
    data["shards"][1]["bin_blocks"] = data["shards"][1]["bin_blocks"][:-16]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"shard-00001: .* checksums for .* blocks"):
        Manifest.load(tmp_path / "s")


def test_the_verb_says_what_it_read_and_fails_when_something_is_wrong(tmp_path, capsys):
    make(tmp_path / "out" / "a", seed=1)
    make(tmp_path / "out" / "b", seed=2)
    assert prepare_verify.main([str(tmp_path / "out"), "--workers", "2", "--sha256"]) == 0
    assert "2 sources, 4 shards" in (printed := capsys.readouterr().out) and "GB/s): all as written" in printed
    flip(tmp_path / "out" / "b" / "shard-00000.bin", 300)
    assert prepare_verify.main([str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]) == 2
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'b' / 'shard-00000.bin'}, block 1 (bytes 256 to 512): altered" in printed
    assert "1 faults in 1 files" in printed
    assert json.loads((tmp_path / "r.json").read_text())["faults"][0]["block"] == 1
    with pytest.raises(UserError, match="no prepared source and no folder of them"):
        prepare_verify.main([str(tmp_path)])


def test_a_source_with_a_checker_hands_out_no_window_that_touches_a_bad_block(tmp_path):
    manifest = make(tmp_path / "s")
    flip(tmp_path / "s" / "shard-00001.bin", 3 * BLOCK + 9)
    source = open_source(tmp_path / "s", "s", memory_map=False)
    source.check_before_reading(BlockChecker(tmp_path / "s", manifest).check)
    bad = range(manifest.shards[0].tokens + 3 * BLOCK // 2, manifest.shards[0].tokens + 4 * BLOCK // 2)
    refused = 0
    for window in range(source.num_windows(50)):
        out = np.full(51, 60_000, np.int64)
        if set(bad) & set(range(window * 50, window * 50 + 51)):
            refused += 1
            with pytest.raises(UserError, match=r"shard-00001\.bin, block 3 \(bytes 768 to 1024\): altered"):
                source.read_window(window, out)
            assert not (out[max(bad.start - window * 50, 0) :][: len(bad)] < VOCABULARY).any()
        else:
            source.read_window(window, out)
            assert (out < VOCABULARY).all()
    assert refused >= 2
