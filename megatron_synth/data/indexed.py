r"""Megatron's indexed dataset on disk: `X.bin` holds the tokens, `X.idx` where each sequence and document begins.

Layout of the index, little-endian, as `megatron.core.datasets.indexed_dataset` writes and reads it:

    9 bytes   magic "MMIDIDX\0\0"
    uint64    version, 1
    uint8     code of the token type
    uint64    sequences (N)
    uint64    documents + 1 (D)
    int32 [N] tokens of each sequence
    int64 [N] byte offset of each sequence in the .bin file
    int64 [D] first sequence of each document; the last entry is N
    int8  [N] modality of each sequence, in multimodal datasets only

The .bin file is the sequences, one after the other, without gaps. We write one sequence per document and read any.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_synth.config.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
UINT16_VOCAB_LIMIT = 65500  # megatron-core's: smaller vocabularies are stored as uint16
MAX_SEQUENCE_TOKENS = 2**31 - 1

AGAIN = "prepare the source again, or copy it again"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron stores tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


def with_suffix(prefix: Path, suffix: str) -> Path:
    """`prefix` + `suffix`; unlike `Path.with_suffix` it keeps the dots of the prefix."""
    return prefix.parent / (prefix.name + suffix)


@dataclass(frozen=True)
class WrittenShard:
    """Size and checksums of one finished shard."""

    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Writes one .bin/.idx pair. The index appears in `finish` only, so an unfinished pair cannot be opened."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.code = next(code for code, known in TOKEN_TYPES.items() if np.dtype(known) == self.dtype)
        self.tokens = 0
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        self._bin = open(with_suffix(prefix, ".bin"), "wb")  # until finish or abandon

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._lengths)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append whole documents: their tokens one after the other [T] and the length of each [N], summing to T."""
        assert tokens.dtype == self.dtype and int(lengths.sum(dtype=np.int64)) == tokens.size
        data = np.ascontiguousarray(tokens).tobytes()
        self._bin.write(data)
        self._hash.update(data)
        self._lengths.frombytes(np.ascontiguousarray(lengths, dtype=np.int32).tobytes())
        self.tokens += tokens.size

    def finish(self) -> WrittenShard:
        """Write the index and force both files to disk."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(lengths.size, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        documents = np.arange(lengths.size + 1, dtype=np.int64)
        header = HEADER.pack(MAGIC, VERSION, self.code, lengths.size, documents.size)
        index = b"".join([header, lengths.tobytes(), pointers.tobytes(), documents.tobytes()])
        _sync_and_close(self._bin)
        with open(with_suffix(self.prefix, ".idx"), "wb") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        return WrittenShard(
            documents=lengths.size,
            tokens=self.tokens,
            bin_bytes=self.tokens * self.dtype.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abandon(self) -> None:
        """Close the file without an index."""
        self._bin.close()


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class Shard:
    """One .bin/.idx pair, opened. Sizes are checked at once; the files are mapped when first read.

    num_tokens, num_documents: what the pair holds; dtype: type of the stored tokens.
    """

    def __init__(self, prefix: Path):
        self.prefix = prefix
        self.bin_path, self.idx_path = with_suffix(prefix, ".bin"), with_suffix(prefix, ".idx")
        bin_bytes, idx_bytes = file_size(self.bin_path), file_size(self.idx_path)
        with open(self.idx_path, "rb") as file:
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                raise UserError(
                    f"{self.idx_path}: expected an index of at least {HEADER.size} bytes, found {idx_bytes}; {AGAIN}"
                )
            magic, version, code, sequences, document_entries = HEADER.unpack(header)
            if magic != MAGIC or version != VERSION:
                raise UserError(f"{self.idx_path}: not a Megatron index of version {VERSION}; {AGAIN}")
            if code not in TOKEN_TYPES:
                raise UserError(f"{self.idx_path}: token type code {code}, expected one of {sorted(TOKEN_TYPES)}")
            self.dtype = np.dtype(TOKEN_TYPES[code])
            expected = HEADER.size + 12 * sequences + 8 * document_entries
            if idx_bytes not in (expected, expected + sequences):
                raise UserError(
                    f"{self.idx_path}: its header announces {sequences} sequences, {expected} bytes, "
                    f"found {idx_bytes} bytes; {AGAIN}"
                )
            end = 0
            if sequences:
                file.seek(HEADER.size + 4 * (sequences - 1))
                length = int.from_bytes(file.read(4), "little")
                file.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
                end = int.from_bytes(file.read(8), "little") + length * self.dtype.itemsize
        if bin_bytes != end:
            raise UserError(f"{self.bin_path}: its index announces {end} bytes, found {bin_bytes} bytes; {AGAIN}")
        self.num_tokens = end // self.dtype.itemsize
        self.num_documents = max(document_entries - 1, 0)
        self._sequences, self._document_entries = sequences, document_entries
        self._tokens: np.ndarray | None = None
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the shard [num_tokens], mapped from disk."""
        if self._tokens is None:
            empty = self.num_tokens == 0  # an empty file cannot be mapped
            mapped = np.empty(0, self.dtype) if empty else np.memmap(self.bin_path, dtype=self.dtype, mode="r")
            self._tokens = np.asarray(mapped)  # slices of a plain array cost a tenth of a memmap's
        return self._tokens

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """Token offsets in [begin, end) of this shard at which a document starts, ascending, int64.

        Looks up only the pages of the index that the binary search and the answer need.
        """
        if not self._sequences or begin >= end:
            return np.empty(0, np.int64)
        pointers, documents = self._mapped_index()
        size: int = self.dtype.itemsize

        def offset(entry: int) -> int:
            sequence = int(documents[entry])
            return self.num_tokens if sequence == self._sequences else int(pointers[sequence]) // size

        entries = range(self.num_documents)
        first = bisect_left(entries, begin, key=offset)
        last = bisect_left(entries, end, lo=first, key=offset)
        sequences = np.asarray(documents[first:last])
        # an empty document starts where the next one does: one start
        return np.unique(np.asarray(pointers[sequences], dtype=np.int64) // size)

    def _mapped_index(self) -> tuple[np.ndarray, np.ndarray]:
        if self._index is None:
            at = HEADER.size + 4 * self._sequences
            pointers = np.memmap(self.idx_path, np.int64, "r", at, (self._sequences,))
            documents = np.memmap(self.idx_path, np.int64, "r", at + pointers.nbytes, (self._document_entries,))
            self._index = (pointers, documents)
        return self._index


def file_size(path: Path) -> int:
    """Bytes of `path`; a UserError when it is not there."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {AGAIN}") from None
