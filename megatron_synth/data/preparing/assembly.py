"""How shards are put together from token runs: in order or shuffled, packed or end to end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.core.files import sync_folder
from megatron_synth.data.preparing.packing import arrange, pack
from megatron_synth.data.preparing.shuffle import bucket_lengths, read_bucket
from megatron_synth.data.preparing.token_runs import TokenRun, naming
from megatron_synth.data.shards.block_hash import BLOCK_BYTES, BlockHasher
from megatron_synth.data.shards.indexed import ShardWriter, with_suffix
from megatron_synth.data.shards.manifest import ShardInfo
from megatron_synth.data.tokenizer import Tokenizer

Position = tuple[int, int]  # unit (a token run, or a bucket of a shuffle) and document in it


@dataclass(frozen=True)
class Packing:
    """How documents are put into windows."""

    sequence_length: int
    eod_id: int
    """Fills what stays free."""


@dataclass(frozen=True)
class Assembly:
    """Where the documents of one target are: in the order of the token runs, or in `buckets` buckets of a shuffle.

    What is counted in a unit, and what shards are cut between, are documents; with `packing` they are bins of whole windows.
    """

    runs: tuple[TokenRun, ...]
    buckets: int | None
    packing: Packing | None = None

    @property
    def units(self) -> int:
        """Parts that are read at a time."""
        return len(self.runs) if self.buckets is None else self.buckets

    def runs_of(self, first: int, last: int) -> tuple[TokenRun, ...]:
        """The token runs that units [first, last) are read from: with buckets all of them."""
        return self.runs[first:last] if self.buckets is None else self.runs

    def lengths(self, unit: int) -> np.ndarray:
        """Tokens of the documents, or of the bins, of a unit [N]."""
        lengths = self.document_lengths(unit)
        return lengths if self.packing is None else pack(lengths, self.packing.sequence_length).sizes

    def document_lengths(self, unit: int) -> np.ndarray:
        """Lengths of the documents of a unit [N], before any packing."""
        if self.buckets is None:
            lengths: np.ndarray = self.runs[unit].read_records()["length"]
            return lengths
        return bucket_lengths(self.runs, unit, self.buckets)

    def read(self, dtype: np.dtype[Any], unit: int, first: int, last: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [T] of documents (or bins) [first, last) of a unit, and lengths [N] of the documents among them."""
        if self.packing is None:
            return self._read(dtype, unit, first, last)
        tokens, lengths = self._read(dtype, unit, 0, None)
        packed = pack(lengths, self.packing.sequence_length)
        return arrange(packed, first, last, tokens, lengths, self.packing.eod_id)

    def _read(self, dtype: np.dtype[Any], unit: int, first: int, last: int | None) -> tuple[np.ndarray, np.ndarray]:
        if self.buckets is None:
            lengths = self.document_lengths(unit)
            begin = int(lengths[:first].sum(dtype=np.int64))
            lengths = lengths[first:last]
            return self.runs[unit].read_tokens(dtype, begin, begin + int(lengths.sum(dtype=np.int64))), lengths
        tokens, lengths = read_bucket(self.runs, dtype, unit, self.buckets)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return tokens[ends[first] : ends[lengths.size if last is None else last]], lengths[first:last]


@dataclass(frozen=True)
class ShardTask:
    """Shard `number`: the documents from `start` to `end` of an assembly.

    closed: then comes one more token of padding, which is the label that the last window would lack.
    """

    prefix: Path
    dtype: np.dtype[Any]
    assembly: Assembly
    number: int
    start: Position
    end: Position
    closed: bool = False


def plan_shards(units: Iterable[np.ndarray], shard_tokens: int) -> list[tuple[Position, Position]]:
    """Where each shard begins and ends, given the lengths of the documents [N] of each unit.

    A shard takes documents while they fit; one longer than a shard gets a shard of its own.
    """
    cuts: list[tuple[Position, Position]] = []
    start, filled, documents, unit = (0, 0), 0, 0, -1
    for unit, lengths in enumerate(units):
        ends = np.cumsum(lengths, dtype=np.int64)
        first, begin = 0, 0
        while first < ends.size:
            last = int(np.searchsorted(ends, begin + shard_tokens - filled, side="right"))
            if last == first and documents == 0:
                last += 1  # longer than a shard
            if last > first:
                filled += int(ends[last - 1]) - begin
                documents += last - first
                first, begin = last, int(ends[last - 1])
            if first < ends.size:
                cuts.append((start, (unit, first)))
                start, filled, documents = (unit, first), 0, 0
    if documents:
        cuts.append((start, (unit + 1, 0)))
    return cuts


def write_shard(_: Tokenizer, task: ShardTask) -> ShardInfo:
    """Assemble one shard; memory is bounded by a unit, and by the index of the shard."""
    writer = ShardWriter(task.prefix, task.dtype)
    try:
        with naming(with_suffix(task.prefix, ".bin"), lambda: writer.tokens * task.dtype.itemsize):
            for unit in range(task.start[0], task.end[0] + 1):
                first = task.start[1] if unit == task.start[0] else 0
                last = task.end[1] if unit == task.end[0] else None
                if last is None or last > first:
                    writer.add(*task.assembly.read(task.dtype, unit, first, last))
            if task.closed:
                assert task.assembly.packing is not None
                writer.add(np.array([task.assembly.packing.eod_id], task.dtype), np.array([1], np.int32))
            written = writer.finish()
            sync_folder(task.prefix.parent)
    finally:
        writer.abandon()
    return ShardInfo(name=task.prefix.name, **vars(written))


def is_whole(folder: Path, shard: ShardInfo) -> bool:
    """Whether the two files of a shard are what was written, all of them."""
    blocks, index = BlockHasher(), hashlib.sha256()
    size = 0
    try:
        with open(with_suffix(folder / shard.name, ".bin"), "rb") as file:
            while data := file.read(BLOCK_BYTES):
                blocks.update(data)
                size += len(data)
        with open(with_suffix(folder / shard.name, ".idx"), "rb") as file:
            while data := file.read(BLOCK_BYTES):
                index.update(data)
    except OSError:
        return False
    return (size, blocks.finish(), index.hexdigest()) == (shard.bin_bytes, shard.bin_blocks, shard.idx_sha256)
