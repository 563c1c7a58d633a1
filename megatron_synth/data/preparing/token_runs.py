"""Token runs: tokenized documents on their way from the workers to the shards, one file each.

Layout: header, then a record of each document, then the tokens, then, where some are not learned, a bit for each, the
lowest first. A record is the document's length in tokens, the UTF-8
bytes of its text, its place in the split, its first token in its run, its sort key (0 without a shuffle) and, where the source
has columns, its values of them. Documents stand in the order of the keys. A token run is written under a temporary name,
forced to disk and renamed, and its checksum says whether it is whole.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import sync_folder
from megatron_synth.data.shards.columns import DTYPES
from megatron_synth.data.shards.learned import bools_of, mask_bytes

HEADER = struct.Struct("<8sQQQ")  # magic, checksum of the rest, documents, tokens
MAGIC = b"MSPIECE1"
RECORD = np.dtype(
    [("length", np.int32), ("text_bytes", np.int32), ("place", np.int64), ("start", np.int64), ("key", np.uint64)]
)


def record_type(columns: Sequence[tuple[str, str]]) -> np.dtype[Any]:
    """The type of records with columns, given name and stored type of each."""
    return np.dtype(
        [(name, RECORD[name]) for name in RECORD.names or ()] + [(f"c.{name}", DTYPES[kind]) for name, kind in columns]
    )


def values_of_records(records: np.ndarray, columns: Sequence[tuple[str, str]]) -> np.ndarray:
    """The columns of records, structured [N]."""
    values = np.empty(records.size, np.dtype([(name, DTYPES[kind]) for name, kind in columns]))
    for name, _ in columns:
        values[name] = records[f"c.{name}"]
    return values


@dataclass(frozen=True)
class TokenRun:
    """One file of documents: of `target`, from split `split`, of which it is part `part`."""

    path: Path
    target: str
    split: int
    part: int
    documents: int
    tokens: int
    text_bytes: int
    checksum: int
    """XXH3 (64 bit) of what follows the header."""
    columns: tuple[tuple[str, str], ...] = ()
    """Name and stored type of each column."""
    categories: tuple[tuple[str, ...], ...] = ()
    """Of each column of type category the texts that its numbers stand for, in this run; of others none."""
    learned: int | None = None
    """Tokens that are learned; None: all, and it does not say which."""

    @property
    def masked(self) -> bool:
        """Whether it says which tokens are learned."""
        return self.learned is not None

    @property
    def record(self) -> np.dtype[Any]:
        """Type of the records."""
        return record_type(self.columns) if self.columns else RECORD

    def to_json(self) -> dict[str, Any]:
        """The token run as a journal tells of it; the folder may have another name when it is read."""
        return {**asdict(self), "path": self.path.name}

    @classmethod
    def from_json(cls, folder: Path, entry: Mapping[str, Any]) -> TokenRun:
        """The token run that a journal tells of."""
        columns = tuple((name, kind) for name, kind in entry.get("columns", ()))
        categories = tuple(map(tuple, entry.get("categories", ())))
        return cls(**{**entry, "path": folder / entry["path"], "columns": columns, "categories": categories})

    def mapped_records(self) -> np.ndarray:
        """What is known of each document, `record` [documents], mapped from disk: only what is looked at is read."""
        return np.memmap(self.path, self.record, "r", HEADER.size, (self.documents,))

    def read_records(self) -> np.ndarray:
        """The records, read and not kept."""
        with open(self.path, "rb") as file:
            file.seek(HEADER.size)
            return np.fromfile(file, self.record, self.documents)

    def read_tokens(self, dtype: np.dtype[Any], begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of the token run."""
        with open(self.path, "rb") as file:
            file.seek(HEADER.size + self.documents * self.record.itemsize + begin * dtype.itemsize)
            tokens = np.fromfile(file, dtype, end - begin)
        if tokens.size != end - begin:
            raise UserError(f"{self.path}: ends after {tokens.size} of {end - begin} tokens; start again with --force")
        return tokens

    def read_learned(self, dtype: np.dtype[Any], begin: int, end: int) -> np.ndarray | None:
        """Bool [end - begin] which of these tokens are learned; None where the run does not say. dtype: of the tokens."""
        if not self.masked:
            return None
        first = begin // 8
        with open(self.path, "rb") as file:
            file.seek(HEADER.size + self.documents * self.record.itemsize + self.tokens * dtype.itemsize + first)
            found = bools_of(np.fromfile(file, np.uint8, mask_bytes(end) - first), begin, end - begin)
        if found.size != end - begin:
            raise UserError(f"{self.path}: ends within what tells the learned tokens; start again with --force")
        return found

    def is_whole(self) -> bool:
        """Whether the file is what was written, all of it."""
        try:
            with open(self.path, "rb") as file:
                header = file.read(HEADER.size)
                if len(header) < HEADER.size:
                    return False
                magic, expected, documents, tokens = HEADER.unpack(header)
                found = xxhash.xxh3_64()
                while data := file.read(2**20):
                    found.update(data)
        except OSError:
            return False
        return bool(
            (magic, documents, tokens) == (MAGIC, self.documents, self.tokens)
            and expected == found.intdigest() == self.checksum
        )


@contextmanager
def naming(path: Path, position: Callable[[], int]) -> Iterator[None]:
    """Put file and byte into errors of the disk, which do not say where they happened."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error} at byte {position()}", str(path)) from error


def write_run(
    folder: Path,
    target: str,
    split: int,
    part: int,
    records: np.ndarray,
    tokens: np.ndarray,
    columns: tuple[tuple[str, str], ...] = (),
    categories: tuple[tuple[str, ...], ...] = (),
    learned: np.ndarray | None = None,
) -> TokenRun:
    """Write documents that stand in their order already: records [N] of `record_type`, tokens [T].

    learned: bool [T] which of these are; None: all.
    """
    assert records.dtype == record_type(columns) and int(records["length"].sum(dtype=np.int64)) == tokens.size
    records = records.copy()
    records["start"] = np.cumsum(records["length"], dtype=np.int64) - records["length"]
    path = folder / f"{target}-{split:07d}-{part:04d}.run"
    # a task that is done again, because its process is thought dead, may still write
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    parts = [records, tokens] if learned is None else [records, tokens, np.packbits(learned, bitorder="little")]
    arrays = [np.ascontiguousarray(array).view(np.uint8).data for array in parts if array.size]
    total = xxhash.xxh3_64()
    for array in arrays:
        total.update(array)
    with open(temporary, "wb") as file, naming(temporary, lambda: file.tell()):
        file.write(HEADER.pack(MAGIC, total.intdigest(), records.size, tokens.size))
        for array in arrays:
            file.write(array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(folder)
    text_bytes = int(records["text_bytes"].sum(dtype=np.int64))
    counted = None if learned is None else int(np.count_nonzero(learned))
    about = (records.size, tokens.size, text_bytes, total.intdigest())
    return TokenRun(path, target, split, part, *about, columns, categories, counted)


def trim(run: TokenRun, dtype: np.dtype[Any], end_place: int) -> TokenRun | None:
    """Write the token run again without the documents from place `end_place` of the split on; None when none is left."""
    records = run.read_records()
    kept = records["place"] < end_place
    of_tokens = np.repeat(kept, records["length"])
    tokens, learned = run.read_tokens(dtype, 0, run.tokens)[of_tokens], run.read_learned(dtype, 0, run.tokens)
    run.path.unlink()
    if not kept.any():
        return None
    learned = None if learned is None else learned[of_tokens]
    named = (run.path.parent, run.target, run.split, run.part)
    return write_run(*named, records[kept], tokens, run.columns, run.categories, learned)
