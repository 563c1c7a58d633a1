"""Every fault of the data while a run reads it, with `verify: blocks`: file and place are named, nothing bad is served."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.loading.prefetch import Prefetcher
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards import checksums
from megatron_synth.data.shards.block_hash import BlockHasher
from megatron_synth.data.shards.checksums import BlockChecker
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.source import open_source
from tests.unit.data.shards.test_checksums import BLOCK, VOCABULARY, flip, make

S = 50
BAD = 3
"""Block of the second shard in which faults lie."""


def bit_flip(folder, patch):
    flip(folder / "shard-00001.bin", BAD * BLOCK + 77, 5)
    return r"shard-00001\.bin, block 3 \(bytes 768 to 1024\): altered: its checksum is not the manifest's", None


def cut_off(folder, patch):
    os.truncate(folder / "shard-00001.bin", BAD * BLOCK + 10)
    return r"shard-00001\.bin, block \d+ \(bytes \d+ to \d+\): ends at byte 778, expected \d+ bytes", slice(BAD, None)


def missing(folder, patch):
    (folder / "shard-00001.bin").unlink()
    return r"shard-00001\.bin: cannot be read: No such file or directory", slice(None)


def replaced(folder, patch):
    path = folder / "shard-00001.bin"
    other = np.random.default_rng(9).integers(0, VOCABULARY, path.stat().st_size // 2).astype(np.uint16)
    (folder / "other").write_bytes(other.tobytes())
    os.replace(folder / "other", path)
    return r"shard-00001\.bin, block \d+ \(bytes \d+ to \d+\): altered", slice(None)


def a_folder(folder, patch):
    (folder / "shard-00001.bin").unlink()
    (folder / "shard-00001.bin").mkdir()
    return r"shard-00001\.bin: cannot be read: Is a directory", slice(None)


def forbidden(folder, patch):
    opened = os.open

    def refuse(path, *arguments, **options):
        if str(path).endswith("shard-00001.bin"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    patch.setattr(checksums.os, "open", refuse)
    return r"shard-00001\.bin: cannot be read: Permission denied", slice(None)


def disk_error(folder, patch):
    read = os.preadv

    def broken(file, buffers, offset):
        there = os.readlink(f"/proc/self/fd/{file}").endswith("shard-00001.bin")
        if there and offset < (BAD + 1) * BLOCK and offset + len(buffers[0]) > BAD * BLOCK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, buffers, offset)

    patch.setattr(os, "preadv", broken)
    return r"shard-00001\.bin, block 3 \(bytes 768 to 1024\): cannot be read: Input/output error", None


def index_flip(folder, patch):
    flip(folder / "shard-00001.idx", 34 + 4 * 7)
    return r"shard-00001\.idx, byte 62: altered", slice(None)


def beyond_the_vocabulary(folder, patch):
    """Written wrongly, with checksums to match."""
    path = folder / "shard-00001.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[BAD * BLOCK // 2 + 4] = VOCABULARY
    path.write_bytes(tokens.tobytes())
    hasher = BlockHasher(BLOCK)
    hasher.update(tokens.tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["bin_blocks"] = hasher.finish()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rf"shard-00001\.bin, block 3 \(bytes 776 to 1024\): token id {VOCABULARY}, the vocabulary has {VOCABULARY}", None


def altered_manifest(folder, patch):
    manifest = json.loads((folder / "manifest.json").read_text())
    blocks = manifest["shards"][1]["bin_blocks"]
    manifest["shards"][1]["bin_blocks"] = blocks[: 16 * BAD] + "0" * 16 + blocks[16 * (BAD + 1) :]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return r"shard-00001\.bin, block 3 \(bytes 768 to 1024\): altered: its checksum is not the manifest's", None


FAULTS = (
    bit_flip,
    cut_off,
    missing,
    replaced,
    a_folder,
    forbidden,
    disk_error,
    index_flip,
    beyond_the_vocabulary,
    altered_manifest,
)


@pytest.mark.parametrize("prefetched", [False, True])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_run_stops_at_a_fault_and_has_seen_nothing_of_it(tmp_path, monkeypatch, fault, prefetched):
    folder = tmp_path / "s"
    make(folder)
    expected = np.concatenate([np.fromfile(folder / f"shard-0000{number}.bin", np.uint16) for number in range(2)])
    first = np.fromfile(folder / "shard-00000.bin", np.uint16).size
    early = fault in (beyond_the_vocabulary, altered_manifest)  # of what opening reads
    if early:
        message, blocks = fault(folder, monkeypatch)
    source = open_source(folder, "s", memory_map=False)
    source.check_before_reading(BlockChecker(folder, Manifest.load(folder)).check)
    plan = MixturePlan([SourceSpec("s", Fraction(1), source.num_windows(S), math.inf)], 1)
    options = {"sequence_length": S, "micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 1}
    if not early:
        message, blocks = fault(folder, monkeypatch)  # after opening: while training
    per_block = BLOCK // 2
    bad = np.zeros(expected.size, bool)
    shard = bad[first:]
    wrong = slice(BAD, BAD + 1) if blocks is None else blocks
    shard[(wrong.start or 0) * per_block : None if wrong.stop is None else wrong.stop * per_block] = True
    loader = Loader(plan, [source], **options)
    prefetcher = Prefetcher(loader, 4) if prefetched else None
    served = 0
    with pytest.raises(UserError, match=message) as caught:
        for step in range(1000):
            batches = loader.micro_batches(4 * step, 4) if prefetcher is None else prefetcher.step(4 * step)
            for batch in batches:
                for row, sample in zip(batch.tokens, batch.samples.tolist(), strict=True):
                    places = [at for at in range(0, expected.size - S, S) if (expected[at : at + S + 1] == row).all()]
                    assert len(places) == 1, sample
                    assert not bad[places[0] : places[0] + S + 1].any()
                    served += 1
    assert served < source.num_windows(S) and re.search("prepare the source again|copy it again", str(caught.value))
    if prefetcher is not None:
        prefetcher.close()


def test_a_fault_that_is_mended_is_served_again(tmp_path):
    folder = tmp_path / "s"
    make(folder)
    shutil.copytree(folder, tmp_path / "sound")
    flip(folder / "shard-00001.bin", 9)
    source = open_source(folder, "s", memory_map=False)
    source.check_before_reading(BlockChecker(folder, Manifest.load(folder)).check)
    window = source.num_windows(S) - 1
    out, expected = np.zeros(S + 1, np.int64), np.zeros(S + 1, np.int64)
    at = np.fromfile(folder / "shard-00000.bin", np.uint16).size // S + 1
    with pytest.raises(UserError, match="block 0"):
        source.read_window(at, out)
    source.read_window(window, out)
    flip(folder / "shard-00001.bin", 9)
    source.read_window(at, out)
    open_source(tmp_path / "sound", "s").read_window(at, expected)
    np.testing.assert_array_equal(out, expected)
