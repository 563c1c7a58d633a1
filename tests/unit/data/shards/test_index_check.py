"""Indexes that lie are refused before their shard is used; altered files never crash and never serve other tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.shards import native
from megatron_synth.data.shards.indexed import HEADER, MAGIC, Shard
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.source import open_source
from tests.faults import shard_mutations as mutations


def write(prefix: Path, lengths: list[int], pointers: list[int] | None = None, documents: list[int] | None = None) -> None:
    """A bare pair of uint16 tokens, with whatever the index is to say."""
    number = len(lengths)
    pointers = [2 * sum(lengths[:at]) for at in range(number)] if pointers is None else pointers
    documents = list(range(number + 1)) if documents is None else documents
    content = HEADER.pack(MAGIC, 1, 8, number, len(documents)) + np.array(lengths, np.int32).tobytes()
    content += np.array(pointers, np.int64).tobytes() + np.array(documents, np.int64).tobytes()
    prefix.with_suffix(".idx").write_bytes(content)
    end = (pointers[-1] + 2 * lengths[-1]) if number else 0
    prefix.with_suffix(".bin").write_bytes(np.arange(end // 2, dtype=np.uint16).tobytes())


AT_POINTERS, AT_DOCUMENTS = HEADER.size + 4 * 3, HEADER.size + 12 * 3


@pytest.mark.parametrize(
    ("lengths", "pointers", "documents", "byte"),
    [
        ([3, 4, 5], [0, 8, 16], None, AT_POINTERS + 8),  # leaves a token out
        ([3, 4, 5], [8, 0, 14], None, AT_POINTERS),  # reordered
        ([3, -4, 15], [0, 6, 6], None, HEADER.size + 4),
        ([3, 4, 5], None, [0, 1, 2, 2], AT_DOCUMENTS + 24),  # the last is not the number of sequences
        ([3, 4, 5], None, [0, -(1 << 40), 2, 3], AT_DOCUMENTS + 8),
        ([3, 4, 5], None, [0, 2, 1, 3], AT_DOCUMENTS + 16),
        ([3, 4, 5], None, [0, 1, 9, 3], AT_DOCUMENTS + 16),
        ([3, 4, 5], None, [1, 2, 3], AT_DOCUMENTS),
        ([3, 4, 5], None, [], HEADER.size - 8),
    ],
)
def test_an_index_that_is_not_the_tokens_in_order_is_refused(
    tmp_path: Path, lengths: list[int], pointers: list[int] | None, documents: list[int] | None, byte: int
) -> None:
    write(tmp_path / "x", lengths, pointers, documents)
    with pytest.raises(UserError, match=rf"x\.idx, byte {byte}: "):
        open_source(tmp_path / "x", "x")


def test_a_sound_index_may_have_empty_documents_and_several_sequences_in_one(tmp_path: Path) -> None:
    write(tmp_path / "x", [3, 0, 5, 2], None, [0, 0, 2, 4, 4])
    source = open_source(tmp_path / "x", "x")
    assert (source.num_tokens, source.num_documents) == (10, 4)
    assert source.shard(0).document_starts(0, 11).tolist() == [0, 3, 10]


def test_every_bit_of_a_prepared_index_that_changes_is_noticed_without_checksums(tmp_path: Path) -> None:
    mutations.make(tmp_path)
    prefix = tmp_path / mutations.PREPARED / "shard-00001"
    path, content = prefix.with_suffix(".idx"), bytearray(prefix.with_suffix(".idx").read_bytes())
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError):
            Shard(prefix, one_each=True).check_index()
            # the type of the tokens is the manifest's to know
            open_source(prefix.parent, "s")
        content[bit // 8] ^= 1 << bit % 8


def test_checksums_cover_the_index_also_where_no_token_is_read(tmp_path: Path) -> None:
    from megatron_synth.data.shards.checksums import BlockChecker

    mutations.make(tmp_path)
    folder = tmp_path / mutations.PREPARED
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["idx_sha256"] = "0" * 64  # as if a sound index had been put in the place of another
    (folder / "manifest.json").write_text(json.dumps(manifest))
    source = open_source(folder, "s", memory_map=False)
    source.check_before_reading(BlockChecker(folder, Manifest.load(folder)).check)
    with pytest.raises(UserError, match=r"shard-00000\.idx: altered"):
        source.document_starts_of(np.array([0]), 16)


@pytest.mark.parametrize("part", range(4))
def test_altered_files_are_refused_or_equal(tmp_path: Path, part: int) -> None:
    mutations.make(tmp_path)
    sources = {name: mutations.sound(tmp_path, name) for name in (mutations.PREPARED, mutations.BARE)}
    outcomes = [mutations.attempt(tmp_path, seed, sources) for seed in range(150 * part, 150 * part + 150)]
    assert outcomes.count("refused") > 75


@pytest.mark.skipif(native.library() is None, reason="nothing was compiled")
def test_compiled_code_survives_an_index_that_changes_after_it_was_checked(tmp_path: Path) -> None:
    write(tmp_path / "x", [100] * 100)
    shard = Shard(tmp_path / "x")
    shard.open_index()
    generator = np.random.default_rng(0)
    at = HEADER.size + 4 * 100
    for _ in range(200):
        with open(tmp_path / "x.idx", "r+b") as file:
            file.seek(at + 8 * int(generator.integers(0, 201)))
            file.write(int(generator.integers(-(2**62), 2**62)).to_bytes(8, "little", signed=True))
        begins = generator.integers(0, 9000, 20)
        starts, counts = shard.document_starts_of(begins, begins + 1000)
        assert counts.sum() == len(starts)
        rows = np.repeat(begins, counts)
        assert ((starts >= rows) & (starts < rows + 1000)).all()
