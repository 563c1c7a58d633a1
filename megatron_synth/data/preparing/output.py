"""The output folder of a preparation: written beside its place under a hidden name, put there when it is whole.

A journal in the hidden folder says what is done. A run that was killed is continued from there by the next with the
same settings and inputs; a run that fails with an error cleans up after itself.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.data.preparing.packing import arrange, pack
from megatron_synth.data.preparing.shuffle import bucket_lengths, read_bucket
from megatron_synth.data.preparing.token_runs import Piece, naming
from megatron_synth.data.shards.indexed import ShardWriter, with_suffix
from megatron_synth.data.shards.manifest import ShardInfo
from megatron_synth.data.tokenizer import Tokenizer

JOURNAL = "journal.jsonl"

Position = tuple[int, int]  # unit (a piece, or a bucket of a shuffle) and document in it


@dataclass(frozen=True)
class Packing:
    """How documents are put into windows."""

    sequence_length: int
    eod_id: int
    """Fills what stays free."""


@dataclass(frozen=True)
class Assembly:
    """Where the documents of one target are: in the order of the pieces, or in `buckets` buckets of a shuffle.

    What is counted in a unit, and what shards are cut between, are documents; with `packing` they are bins of whole windows.
    """

    pieces: tuple[Piece, ...]
    buckets: int | None
    packing: Packing | None = None

    @property
    def units(self) -> int:
        """Parts that are read at a time."""
        return len(self.pieces) if self.buckets is None else self.buckets

    def lengths(self, unit: int) -> np.ndarray:
        """Tokens of the documents, or of the bins, of a unit [N]."""
        lengths = self.document_lengths(unit)
        return lengths if self.packing is None else pack(lengths, self.packing.sequence_length).sizes

    def document_lengths(self, unit: int) -> np.ndarray:
        """Lengths of the documents of a unit [N], before any packing."""
        if self.buckets is None:
            lengths: np.ndarray = self.pieces[unit].read_records()["length"]
            return lengths
        return bucket_lengths(self.pieces, unit, self.buckets)

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
            return self.pieces[unit].read_tokens(dtype, begin, begin + int(lengths.sum(dtype=np.int64))), lengths
        tokens, lengths = read_bucket(self.pieces, dtype, unit, self.buckets)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return tokens[ends[first] : ends[lengths.size if last is None else last]], lengths[first:last]


@dataclass(frozen=True)
class ShardTask:
    """One shard: the documents from `start` to `end` of an assembly."""

    prefix: Path
    dtype: np.dtype[Any]
    assembly: Assembly
    start: Position
    end: Position


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
            written = writer.finish()
    finally:
        writer.abandon()
    return ShardInfo(name=task.prefix.name, **vars(written))


class Journal:
    """One JSON object per line; what a killed run was writing last is dropped.

    entries: what was found on opening, without the head.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any]):
        self._path = folder / JOURNAL
        found, whole = _read_journal(self._path)
        self.entries: list[dict[str, Any]] = found[1:]
        if found:
            assert found[0] == head
            os.truncate(self._path, whole)
            return
        self.append(head)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line, at once."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def of(self, kind: str, **keys: Any) -> list[dict[str, Any]]:
        """Entries of a kind whose values agree, in order."""
        wanted = {"kind": kind, **keys}.items()
        return [entry for entry in self.entries if all(entry.get(key) == value for key, value in wanted)]


def _read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal and their bytes."""
    found: list[dict[str, Any]] = []
    whole = 0
    try:
        data = path.read_bytes()
    except OSError:
        return [], 0
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            break
        found.append(entry)
        whole += len(line)
    return found, whole


def to_json(piece: Piece) -> dict[str, Any]:
    """A piece as an entry of the journal; the folder may have another name when it is read."""
    return {**asdict(piece), "path": piece.path.name}


def from_json(folder: Path, entry: Mapping[str, Any]) -> Piece:
    """The piece of an entry."""
    return Piece(**{**entry, "path": folder / entry["path"]})


def remove_strays(folder: Path, pieces: Sequence[Piece]) -> None:
    """Remove what is in the folder beside the pieces."""
    kept = {piece.path.name for piece in pieces}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


@contextmanager
def partial_folder(output: Path, head: Mapping[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """A hidden folder beside `output` and its journal, gone on failure; kept when the run is killed or interrupted.

    What a killed run of this machine left is taken over when its journal begins with the same head, and removed otherwise.
    """
    stem = f".{output.name}.partial-{socket.gethostname()}-"
    folder = output.parent / f"{stem}{os.getpid()}"
    for old in sorted(output.parent.glob(f"{stem}*")):
        process = old.name.removeprefix(stem)
        if not process.isdigit() or (_is_alive(int(process)) and old != folder):
            continue
        found, _ = _read_journal(old / JOURNAL)
        if found and found[0] == head and (old == folder or not folder.exists()):
            os.rename(old, folder)
        else:
            shutil.rmtree(old)
    folder.mkdir(exist_ok=True)
    try:
        yield folder, Journal(folder, head)
    except KeyboardInterrupt:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def replace(folder: Path, output: Path) -> None:
    """Put the finished `folder` in the place of `output`, old content included."""
    old = folder.with_name(folder.name + "-old")
    if output.exists():
        os.rename(output, old)
    os.rename(folder, output)
    shutil.rmtree(old, ignore_errors=True)
