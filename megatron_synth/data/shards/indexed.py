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

The .bin file is the sequences, one after the other, without gaps (`index_check` refuses others). We write one sequence per
document and read any.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import resource
import struct
import weakref
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import fill, open_regular
from megatron_synth.data.shards import native
from megatron_synth.data.shards.block_hash import BlockHasher
from megatron_synth.data.shards.document_index import SAMPLED, SAMPLED_OF_MANY, DocumentIndex
from megatron_synth.data.shards.index_check import check_index
from megatron_synth.data.shards.learned import SUFFIX as LEARNED
from megatron_synth.data.shards.learned import LearnedFile
from megatron_synth.data.shards.open_files import AGAIN, OpenFile, file_size, map_file, unreadable

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
UINT16_VOCAB_LIMIT = 65500  # megatron-core's: smaller vocabularies are stored as uint16
MAX_SEQUENCE_TOKENS = 2**31 - 1

MANY_SHARDS = 256
"""A source of more is opened with less work for each of its shards."""
MAX_DESCRIPTORS = 1 << 16  # open files that a process asks for at most


def check_ids(tokens: np.ndarray, vocab_size: int, path: Path, offset: int) -> None:
    """Refuse (UserError) ids that a vocabulary of this size does not have.

    tokens: [N] as they stand in the file `path` from byte `offset` on.
    """
    unsigned = tokens.view(f"u{tokens.itemsize}")  # negative ids read as large ones
    if not unsigned.size or int(unsigned.max()) < vocab_size:
        return
    at = int(np.argmax(unsigned >= vocab_size))
    raise beyond_vocabulary(path, offset + at * tokens.itemsize, int(tokens[at]), vocab_size)


def beyond_vocabulary(path: Path, byte: int, token: int, vocab_size: int) -> UserError:
    """What an id that the vocabulary does not have means, in the .bin file `path`."""
    return UserError(
        f"{path}, byte {byte}: token id {token}, the ids of the vocabulary are 0 to {vocab_size - 1}; {AGAIN}; for a file of "
        "another program set model.vocab_size to the number of tokens of the tokenizer that made it"
    )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron stores tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


def token_code(dtype: np.dtype[Any]) -> int:
    """The code of a token type in an index file."""
    return next(code for code, known in TOKEN_TYPES.items() if np.dtype(known) == dtype)


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
    bin_blocks: str


class ShardWriter:
    """Writes one .bin/.idx pair. The index appears in `finish` only, so an unfinished pair cannot be opened."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.code = token_code(self.dtype)
        self.tokens = 0
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        self._blocks = BlockHasher()
        self._bin = open(with_suffix(prefix, ".bin"), "wb")  # noqa: SIM115 (open until finish or abandon)

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
        self._blocks.update(data)
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
            bin_blocks=self._blocks.finish(),
        )

    def abandon(self) -> None:
        """Close the file without an index."""
        self._bin.close()


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class OpenShards:
    """Which shards have files open: so many files at most, the shard that opened first gives way."""

    def __init__(self) -> None:
        self._open: deque[weakref.ref[Shard]] = deque()
        self._limit = 0

    @property
    def limit(self) -> int:
        """Files of shards that may be open at once."""
        if not self._limit:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
            if soft != resource.RLIM_INFINITY and soft < wanted:
                # without privileges a process may raise its own limit up to the hard one
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            self._limit = max(wanted, soft) // 2  # the other half is for others
        return self._limit

    def add(self, shard: Shard) -> None:
        """Note that `shard` opens its files; close those of the oldest if there are too many."""
        self._open.append(weakref.ref(shard))
        while len(self._open) > self.limit:
            oldest = self._open.popleft()()
            if oldest is not None and oldest is not shard:
                oldest.close()


_open_shards = OpenShards()


class Places:
    """At which addresses the shards of a source lie while they are open, for compiled code; 0: nowhere.

    They change under `compiled.MAPS` alone.
    """

    def __init__(self, shards: int):
        self.tokens = np.zeros(shards, np.int64)
        self.indexes = np.zeros(shards, np.int64)
        self.learned = np.zeros(shards, np.int64)
        self.view = 0
        """Where compiled code finds which parts of the shards make the stream (selection.py); 0: all of them, in order."""


class Shard:
    """One .bin/.idx pair. Sizes are checked at once; the files are opened when first read, by any thread.

    Through a memory map, the default, windows are read at the least cost; without it each window is one request to the
    file system, so that over a network no page is asked for on its own. A disk error, or a file that is cut off while in
    use, becomes an exception that names file and offset either way; without the compiled functions it kills the process
    (SIGBUS) when it meets a map.

    num_tokens, num_documents: what the pair holds; dtype: type of the stored tokens; mapped: the tokens, once mapped.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        memory_map: bool = True,
        places: Places | None = None,
        number: int = 0,
        one_each: bool = False,
        learned: bool = False,
        index_alone: bool = False,
    ):
        """places, number: where to keep the addresses of tokens and index, for compiled code that reads many shards.

        one_each: its documents are one sequence each, as `prepare` writes them. learned: a file says which tokens are learned.

        index_alone: the file of tokens need not be there, and none is read.
        """
        self.places, self._number, self._one_each = places or Places(1), number, one_each
        self._index_checked = False
        self.vocab_size: int | None = None
        """How many token ids there are: tokens that `read` would hand out beyond them are refused. None: that is not known."""
        self.before_index: Callable[[], None] | None = None
        """Called before the index is first used; what it raises reaches the reader."""
        self.prefix, self.memory_map = prefix, memory_map
        self.bin_path, self.idx_path = with_suffix(prefix, ".bin"), with_suffix(prefix, ".idx")
        idx_bytes = file_size(self.idx_path)
        try:
            descriptor = open_regular(self.idx_path)
        except OSError as error:
            raise UserError(f"{self.idx_path}: {error.strerror}; {AGAIN}") from None
        try:
            header = os.pread(descriptor, HEADER.size, 0)
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
                length = os.pread(descriptor, 4, HEADER.size + 4 * (sequences - 1))
                begin = os.pread(descriptor, 8, HEADER.size + 4 * sequences + 8 * (sequences - 1))
                end = int.from_bytes(begin, "little") + int.from_bytes(length, "little") * self.dtype.itemsize
        except OSError as error:
            raise UserError(f"{self.idx_path}: {error.strerror}; {AGAIN}") from None
        finally:
            os.close(descriptor)
        if end % self.dtype.itemsize or end >= 2**62:
            raise UserError(f"{self.idx_path}: its last sequence ends at byte {end}, which no token does; {AGAIN}")
        bin_bytes = end if index_alone else file_size(self.bin_path)
        if bin_bytes != end:
            raise UserError(f"{self.bin_path}: its index announces {end} bytes, found {bin_bytes} bytes; {AGAIN}")
        self.num_tokens = end // self.dtype.itemsize
        self.num_documents = max(document_entries - 1, 0)
        self._sequences, self._document_entries = sequences, document_entries
        path = with_suffix(prefix, LEARNED)
        self._learned = LearnedFile(path, self.num_tokens, memory_map=memory_map) if learned else None
        self._file: OpenFile | None = None
        self.mapped: np.ndarray | None = None
        self._index: DocumentIndex | None = None

    def check_index(self) -> None:
        """Hold the whole index against the .bin file, once: before anything of the shard is handed to a reader.

        Raises:
            UserError: it contradicts itself, or leaves out or reorders parts of the .bin file; it names the byte.
        """
        if self._index_checked:
            return
        if self.before_index is not None:
            self.before_index()
        bin_bytes, size = self.num_tokens * self.dtype.itemsize, self.dtype.itemsize
        entries = self._sequences, self._document_entries
        check_index(self.idx_path, HEADER.size, *entries, bin_bytes, size, one_each=self._one_each)
        self._index_checked = True

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the shard [num_tokens], mapped from disk."""
        if self.num_tokens == 0:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        return self._mapped()

    def read(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` [N], of any integer type that holds the vocabulary, with tokens [begin, begin + N).

        Raises:
            UserError: the file cannot be opened or read there, or has become shorter, or holds ids beyond the vocabulary.
        """
        stored = self._stored(begin, len(out))
        if self.vocab_size is not None:
            check_ids(stored, self.vocab_size, self.bin_path, begin * self.dtype.itemsize)
        out[:] = stored

    def _stored(self, begin: int, count: int) -> np.ndarray:
        """Tokens [begin, begin + count) as they are stored."""
        tokens = self.mapped
        if tokens is None and self.memory_map:
            tokens = self._mapped()
        offset = begin * self.dtype.itemsize
        library = native.library()
        if tokens is not None and library is None:
            return tokens[begin : begin + count].copy()  # what is checked must be what is handed out
        stored = np.empty(count, self.dtype)
        if tokens is not None and library is not None:
            try:
                native.read_map(library, tokens, offset, stored)
            except native.BusError as error:
                raise self.unreadable(error) from None
            return stored
        try:
            done = os.preadv((self._file or self._opened()).fd, [stored.data], offset)
        except OSError as error:
            raise UserError(
                f"{self.bin_path}: {error.strerror} while reading {stored.nbytes} bytes at offset {offset}; check the disk, "
                f"then {AGAIN}"
            ) from error
        if done != stored.nbytes:
            raise UserError(
                f"{self.bin_path}: {stored.nbytes} bytes expected at offset {offset}, found {done}: the file was cut off "
                f"after it was opened; {AGAIN}"
            )
        return stored

    def read_learned(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` [N] of bools with whether tokens [begin, begin + N) are learned.

        Raises:
            UserError: the file cannot be opened or read there, or has become shorter.
        """
        if self._learned is None:
            out[:] = True
            return
        self.check_index()
        if not self._learned.is_open:
            _open_shards.add(self)
        self._learned.read(begin, out)

    def will_need(self, begin: int, count: int) -> None:
        """Ask the system to fetch tokens [begin, begin + count) from disk in the background."""
        size = self.dtype.itemsize
        try:
            os.posix_fadvise((self._file or self._opened()).fd, begin * size, count * size, os.POSIX_FADV_WILLNEED)
        except (OSError, UserError):
            return  # a hint: the read itself will tell what is wrong

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """Token offsets in [begin, end) of this shard at which a document starts, ascending, int64."""
        return self.document_starts_of(np.array([begin]), np.array([end]))[0]

    def document_starts_of(self, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token offsets at which a document starts, for each of N stretches [begin, end) of this shard.

        begins, ends: int64 [N]. Returns all offsets, stretch by stretch, ascending in each, int64; and how many belong to
        each stretch, int64 [N]. Reads only the pages of the index that the search and the answer need.
        """
        if not self._sequences:
            return np.empty(0, np.int64), np.zeros(len(begins), np.int64)
        try:
            return self.open_index().starts(begins, np.maximum(begins, ends))
        except native.BusError as error:
            raise self.unreadable(error) from None

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [num_documents], read from the index of a shard of one sequence per document.

        Raises:
            UserError: it cannot be read.
        """
        assert self._one_each, self.idx_path
        self.check_index()
        lengths = np.empty(self._sequences, np.int32)
        try:
            file = open_regular(self.idx_path)
            try:
                done = fill(file, lengths.data, HEADER.size)
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"{self.idx_path}: {error.strerror}; {AGAIN}") from None
        if done < lengths.nbytes:
            raise UserError(f"{self.idx_path}: ends at byte {HEADER.size + done}: it was cut off; {AGAIN}")
        return lengths

    def unreadable(self, error: native.BusError) -> UserError:
        """What a failed read of a memory map of this shard means."""
        index = self._index
        if index is not None and 0 <= error.address - native.address_of(index.content) < index.content.nbytes:
            return unreadable(self.idx_path, index.content, error)
        mask = None if self._learned is None else self._learned.mapped
        if self._learned is not None and mask is not None and 0 <= error.address - native.address_of(mask) < mask.nbytes:
            return unreadable(self._learned.path, mask, error)
        return unreadable(self.bin_path, self.mapped, error)

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with native.MAPS:
            self.places.tokens[self._number] = self.places.indexes[self._number] = self.places.learned[self._number] = 0
            self._file = self.mapped = self._index = None
            if self._learned is not None:
                self._learned.close()

    def _opened(self) -> OpenFile:
        self.check_index()
        file = OpenFile(self.bin_path)
        self._file = file
        _open_shards.add(self)
        return file

    def _mapped(self) -> np.ndarray:
        tokens = self.mapped
        if tokens is None:
            self.check_index()
            content = map_file(self.bin_path, self.num_tokens * self.dtype.itemsize)
            content.madvise(mmap.MADV_RANDOM)  # windows come in random order: what lies beside them is not wanted
            tokens = np.frombuffer(content, self.dtype, self.num_tokens)
            learned = None if self._learned is None else self._learned.map()
            with native.MAPS:
                self.mapped = tokens
                if learned is not None:
                    self.places.learned[self._number] = native.address_of(learned)
                self.places.tokens[self._number] = native.address_of(tokens)
            _open_shards.add(self)
        return tokens

    def open_index(self) -> DocumentIndex:
        """The index, open."""
        index = self._index
        if index is None:
            self.check_index()
            content = map_file(self.idx_path, HEADER.size + 12 * self._sequences + 8 * self._document_entries)
            whole = np.frombuffer(content, np.uint8)
            at = HEADER.size + 4 * self._sequences
            entries, size = (self._sequences, self._document_entries), self.dtype.itemsize
            sampled = SAMPLED if len(self.places.indexes) <= MANY_SHARDS else SAMPLED_OF_MANY
            try:
                index = DocumentIndex(whole, at, *entries, self.num_tokens, size, sampled)
            except native.BusError as error:
                raise unreadable(self.idx_path, whole, error) from None
            # the sample has touched each page; what is searched later is a page here and there
            content.madvise(mmap.MADV_DONTNEED)
            content.madvise(mmap.MADV_RANDOM)
            with native.MAPS:
                self._index = index
                self.places.indexes[self._number] = index.address
            _open_shards.add(self)
        return index
