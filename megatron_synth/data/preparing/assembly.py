"""How shards are put together from token runs: in order or shuffled, packed or end to end."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.core.files import sync_folder
from megatron_synth.data.preparing.packing import arrange, pack
from megatron_synth.data.preparing.shuffle import bucket_lengths, read_bucket
from megatron_synth.data.preparing.token_runs import TokenRun, naming, values_of_records
from megatron_synth.data.shards.block_hash import BLOCK_BYTES, BlockHasher
from megatron_synth.data.shards.columns import SUFFIX, ColumnInfo, file_content, missing_values
from megatron_synth.data.shards.indexed import ShardWriter, with_suffix
from megatron_synth.data.shards.learned import SUFFIX as LEARNED
from megatron_synth.data.shards.learned import LearnedWriter
from megatron_synth.data.shards.manifest import ShardInfo
from megatron_synth.data.tokenizer import Tokenizer

Part = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]
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
    columns: tuple[ColumnInfo, ...] = ()
    """Of all documents, with the categories of all runs."""

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

    def read(self, dtype: np.dtype[Any], unit: int, first: int, last: int | None) -> Part:
        """Tokens [T] of documents (or bins) [first, last) of a unit, and of the documents among them lengths and columns.

        Last, bool [T], which tokens are learned, where that is known.
        """
        if self.packing is None:
            return self._read(dtype, unit, first, last)
        tokens, whole, values, learned = self._read(dtype, unit, 0, None)
        packed = pack(whole, self.packing.sequence_length)
        tokens, lengths, documents = arrange(packed, first, last, tokens, whole, self.packing.eod_id)
        if learned is not None:
            learned, _, _ = arrange(packed, first, last, learned, whole, False)
        if values is not None:
            # padding is the last of all
            values = np.concatenate([values, missing_values(self.columns, 1)])[documents]
        return tokens, lengths, values, learned

    def _read(self, dtype: np.dtype[Any], unit: int, first: int, last: int | None) -> Part:
        if self.buckets is None:
            run = self.runs[unit]
            records = run.read_records()
            begin = int(records["length"][:first].sum(dtype=np.int64))
            records = records[first:last]
            lengths = records["length"]
            end = begin + int(lengths.sum(dtype=np.int64))
            values = self._values(run, records) if self.columns else None
            return run.read_tokens(dtype, begin, end), lengths, values, run.read_learned(dtype, begin, end)
        values_of = self._values if self.columns else None
        tokens, lengths, values, learned = read_bucket(self.runs, dtype, unit, self.buckets, values_of)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        chosen = slice(ends[first], ends[lengths.size if last is None else last])
        learned = None if learned is None else learned[chosen]
        return tokens[chosen], lengths[first:last], None if values is None else values[first:last], learned

    def _values(self, run: TokenRun, records: np.ndarray) -> np.ndarray:
        """The columns of records of a run, structured [N]; categories are numbered as for all runs."""
        values = values_of_records(records, run.columns)
        for column, own, known in zip(self.columns, run.categories, self._numbers, strict=True):
            if column.type == "category":
                numbers = np.array([known[text] for text in own], np.int32)
                # what is not known, -1, is the last of all
                values[column.name] = np.append(numbers, -1)[values[column.name]]
        return values

    @cached_property
    def _numbers(self) -> list[dict[str, int]]:
        """Of each column the number of each category: made once, not for each run that is read."""
        return [{text: number for number, text in enumerate(column.categories)} for column in self.columns]


def columns_of(runs: Iterable[TokenRun], described: Sequence[ColumnInfo]) -> tuple[ColumnInfo, ...]:
    """The columns of a source with the categories that are in any of its runs."""
    found: list[set[str]] = [set() for _ in described]
    for run in runs:
        for known, own in zip(found, run.categories, strict=True):
            known.update(own)
    return tuple(
        column.model_copy(update={"categories": tuple(sorted(own))}) for column, own in zip(described, found, strict=True)
    )


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
    """Assemble one shard; memory is bounded by a unit, and by the index of the shard.

    Its files get their names when they are whole: a process that is thought dead, and writes, spoils nothing.
    """
    own = task.prefix.with_name(f"{task.prefix.name}.{secrets.token_hex(4)}")
    writer = ShardWriter(own, task.dtype)
    masked = any(run.masked for run in task.assembly.runs)
    mask = LearnedWriter(with_suffix(own, LEARNED)) if masked else None
    columns, values = task.assembly.columns, list[np.ndarray]()
    try:
        with naming(with_suffix(task.prefix, ".bin"), lambda: writer.tokens * task.dtype.itemsize):
            for unit in range(task.start[0], task.end[0] + 1):
                first = task.start[1] if unit == task.start[0] else 0
                last = task.end[1] if unit == task.end[0] else None
                if last is None or last > first:
                    tokens, lengths, of_documents, learned = task.assembly.read(task.dtype, unit, first, last)
                    writer.add(tokens, lengths)
                    if mask is not None:
                        assert learned is not None
                        mask.add(learned)
                    if of_documents is not None:
                        values.append(of_documents)
            if task.closed:
                assert task.assembly.packing is not None
                writer.add(np.array([task.assembly.packing.eod_id], task.dtype), np.array([1], np.int32))
                values.append(missing_values(columns, 1))
                if mask is not None:
                    mask.add(np.zeros(1, np.bool_))
            written = writer.finish()
            about: dict[str, Any] = {}
            if mask is not None:
                about["learned_sha256"], about["learned_tokens"] = mask.finish()
        if columns:
            about |= _write_columns(with_suffix(own, SUFFIX), file_content(columns, np.concatenate(values)))
        for suffix in (".bin", ".idx", *([SUFFIX] if columns else ()), *([LEARNED] if masked else ())):
            with_suffix(own, suffix).replace(with_suffix(task.prefix, suffix))
        sync_folder(task.prefix.parent)
    finally:
        writer.abandon()
        if mask is not None:
            mask.abandon()
    return ShardInfo(name=task.prefix.name, **vars(written), **about)


def _write_columns(path: Path, content: bytes) -> dict[str, Any]:
    """Write the columns of a shard; what its entry in the manifest says of them."""
    with open(path, "wb") as file, naming(path, lambda: 0):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"columns_bytes": len(content), "columns_sha256": hashlib.sha256(content).hexdigest()}


def is_whole(folder: Path, shard: ShardInfo) -> bool:
    """Whether the files of a shard are what was written, all of them."""
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
        for suffix, sha256 in shard.checksums.items():
            if suffix not in (".bin", ".idx"):
                with open(with_suffix(folder / shard.name, suffix), "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        return False
    except OSError:
        return False
    return (size, blocks.finish(), index.hexdigest()) == (shard.bin_bytes, shard.bin_blocks, shard.idx_sha256)
