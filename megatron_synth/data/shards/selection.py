"""Some documents of a source as a source of its own, without a copy: what `where` chooses.

The stream of such a source is its documents, one after the other in the order of the source. An index says where they lie:
maximal runs of documents that follow each other in one shard. It is made once, from the columns, and kept in a folder of the
user under a digest of all that it depends on; whoever opens the source next maps it, reads it once and holds it
against the shards.

Layout of the file, little-endian: header (magic, XXH3 of the rest, documents D, runs R, tokens), then int64 arrays: first token
of each document in the stream [D], first token of each run in the stream [R + 1], its shard [R], its first token there [R], its
first document there [R].
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_synth.config.errors import UserError
from megatron_synth.config.expression import Expression
from megatron_synth.core.files import open_regular, write_atomic
from megatron_synth.data.shards import native
from megatron_synth.data.shards.document_index import DocumentIndex
from megatron_synth.data.shards.indexed import Places, Shard
from megatron_synth.data.shards.matching import matches
from megatron_synth.data.shards.source import Source

HEADER = struct.Struct("<8sQQQQ")
MAGIC = b"MSSELCT1"
Int64 = npt.NDArray[np.int64]


class SelectionIndex:
    """Where chosen documents lie."""

    def __init__(self, content: npt.NDArray[np.uint8], digest: str, path: Path):
        """content: of a file of this kind that was checked."""
        _, _, documents, runs, self.tokens = HEADER.unpack(content[: HEADER.size].tobytes())
        arrays = content[HEADER.size :].view(np.int64)
        ends = np.cumsum([documents, runs + 1, runs, runs, runs])
        self.document_starts, self.starts, self.shards, self.begins, self.documents = np.split(arrays[: ends[-1]], ends[:-1])
        self.digest, self.path = digest, path

    @classmethod
    def build(cls, masks: Iterator[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]]) -> bytes:
        """The content of the file. masks: of each shard in order, which documents are chosen, and tokens of each [N]."""
        document_starts, starts, shards, begins, documents = ([np.empty(0, np.int64)] for _ in range(5))
        total = 0
        for number, (mask, lengths) in enumerate(masks):
            chosen = np.flatnonzero(mask)
            if not chosen.size:
                continue
            sizes = lengths[chosen].astype(np.int64)
            own_begins = (np.cumsum(lengths, dtype=np.int64) - lengths)[chosen]
            own_starts = total + np.cumsum(sizes) - sizes
            first = np.flatnonzero(np.diff(chosen, prepend=-2) != 1)
            document_starts.append(own_starts)
            starts.append(own_starts[first])
            shards.append(np.full(first.size, number, np.int64))
            begins.append(own_begins[first])
            documents.append(chosen[first].astype(np.int64))
            total += int(sizes.sum())
        starts.append(np.array([total]))
        arrays = [np.concatenate(one).astype("<i8") for one in (document_starts, starts, shards, begins, documents)]
        rest = b"".join(one.tobytes() for one in arrays)
        return HEADER.pack(MAGIC, xxhash.xxh3_64_intdigest(rest), arrays[0].size, arrays[2].size, total) + rest

    @classmethod
    def open(cls, path: Path, digest: str, shard_tokens: Int64, shard_documents: Int64) -> SelectionIndex | None:
        """The index in a file; None where there is none, or it is not what was written, or not of these shards."""
        try:
            file = open_regular(path)
            try:
                size = os.fstat(file).st_size
                if size < HEADER.size + 8 or size % 8:
                    return None
                content = np.frombuffer(mmap.mmap(file, size, access=mmap.ACCESS_READ), np.uint8)
            finally:
                os.close(file)
        except (OSError, ValueError):
            return None
        magic, checksum, documents, runs, _ = HEADER.unpack(content[: HEADER.size].tobytes())
        if magic != MAGIC or max(documents, runs) > size or HEADER.size + 8 * (documents + 4 * runs + 1) != size:
            return None
        if xxhash.xxh3_64_intdigest(content[HEADER.size :].data) != checksum:
            return None
        found = cls(content, digest, path)
        return found if found._is_of(shard_tokens, shard_documents) else None

    def _is_of(self, shard_tokens: Int64, shard_documents: Int64) -> bool:
        """Whether all that it names lies within shards of so many tokens and documents."""
        starts, documents, lengths = self.starts, self.document_starts, np.diff(self.starts)
        if starts[0] != 0 or starts[-1] != self.tokens or (lengths <= 0).any():
            return False
        if (np.diff(documents, append=self.tokens) <= 0).any() or (len(documents) and documents[0] != 0):
            return False
        if (self.shards < 0).any() or (self.shards >= len(shard_tokens)).any() or (self.begins < 0).any():
            return False
        within = self.begins <= shard_tokens[self.shards] - lengths
        named = (self.documents >= 0) & (self.documents < shard_documents[self.shards])
        return bool(within.all() and named.all())


class _View(ctypes.Structure):
    """The runs of a source, as compiled code reads them."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("starts", "shards", "begins")), ("runs", ctypes.c_int64)]


class SelectedSource(Source):
    """The chosen documents of a source: read from the files of the source."""

    def __init__(self, base: Source, index: SelectionIndex, where: str):
        """where: what was chosen by, for messages."""
        assert base.manifest is not None and not isinstance(base, SelectedSource)
        self.name, self.path, self.manifest, self.memory_map = base.name, base.path, base.manifest, base.memory_map
        self.dtype, self.base, self.index, self.where = base.dtype, base, index, where
        self.num_tokens = index.tokens
        self._documents = DocumentIndex.of_starts(index.document_starts, index.tokens)
        self._view = _View(
            native.address_of(index.starts), native.address_of(index.shards), native.address_of(index.begins), len(index.shards)
        )
        # rows are found in the index and copied from the shards of the source
        self.places = Places(1)
        self.places.tokens, self.places.learned = base.places.tokens, base.places.learned
        self.places.view = ctypes.addressof(self._view)
        self.places.indexes[0] = self._documents.address

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        return _reopened, (self.base, self.index.path, self.index.digest, self.where)

    @property
    def num_documents(self) -> int:
        """Documents that were chosen."""
        return len(self.index.document_starts)

    @property
    def digest(self) -> str:
        """What stands for the content: of the source, its columns and the choice."""
        return self.index.digest

    def shard(self, number: int) -> Shard:
        """A shard of the source that documents are chosen from."""
        return self.base.shard(number)

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Where the tokens [begin, end) of the stream lie: run, shard, first token there and tokens of each part in order."""
        index = self.index
        run = int(np.searchsorted(index.starts, begin, side="right")) - 1
        while begin < end:
            count = min(end, int(index.starts[run + 1])) - begin
            yield run, int(index.shards[run]), int(index.begins[run]) + begin - int(index.starts[run]), count
            begin, run = begin + count, run + 1

    def read(self, begin: int, out: np.ndarray) -> None:
        """As of any source."""
        self._fill(self.base.read, begin, out)

    def read_learned(self, begin: int, out: np.ndarray) -> None:
        """As of any source."""
        self._fill(self.base.read_learned, begin, out)

    def _fill(self, read: Callable[[int, np.ndarray], None], begin: int, out: np.ndarray) -> None:
        """Fill `out` [N] with what `read` of the whole source tells of tokens [begin, begin + N), part after part."""
        assert 0 <= begin <= self.num_tokens - len(out), (self.name, begin, out.shape)
        filled = 0
        for _, shard, at, count in self.pieces(begin, begin + len(out)):
            read(self.base.first_token(shard) + at, out[filled : filled + count])
            filled += count

    def documents_of(self, tokens: np.ndarray) -> np.ndarray:
        """As of any source."""
        try:
            return self._documents.containing(tokens)
        except native.BusError as error:
            raise self.unreadable(0, error) from None

    def document_numbers(self) -> np.ndarray:
        """Of each chosen document its number in the source that it is chosen from, int64 [documents]."""
        index, (_, documents) = self.index, _sizes(self.base)
        before = np.cumsum(documents) - documents
        firsts = before[index.shards] + index.documents
        edges = np.searchsorted(index.document_starts, index.starts)
        counts = np.diff(edges)
        return np.arange(edges[-1]) + np.repeat(firsts - edges[:-1], counts)

    def places_of(self, begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As of any source: all rows lie in one place, which compiled code finds the parts of."""
        return np.zeros(len(begins), np.int64), begins

    def will_need(self, begin: int, length: int) -> None:
        """As of any source."""
        for _, shard, at, count in self.pieces(begin, min(begin + length + 1, self.num_tokens)):
            self.base.will_need(self.base.first_token(shard) + at, count - 1)

    def document_starts_of(self, begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As of any source."""
        offsets, counts = self._documents.starts(begins, begins + (length + 1))
        return offsets - np.repeat(begins, counts), counts

    def unreadable(self, shard: int, error: native.BusError) -> UserError:
        """What a failed read means: of one of the shards, or of the index."""
        for number in np.unique(self.index.shards).tolist():
            tokens = self.base.shard(number).mapped
            if tokens is not None and 0 <= error.address - native.address_of(tokens) < tokens.nbytes:
                return self.base.shard(number).unreadable(error)
        return UserError(f"{self.index.path}: the system could not read it; remove it: it is made again")

    def open_index(self, shard: int) -> None:
        """It is open."""


def _reopened(base: Source, path: Path, digest: str, where: str) -> SelectedSource:
    index = SelectionIndex.open(path, digest, *_sizes(base))
    if index is None:
        raise UserError(f"{path}: gone or altered since it was made; start again, and it is made again")
    return SelectedSource(base, index, where)


def _sizes(source: Source) -> tuple[Int64, Int64]:
    """Tokens and documents of each shard."""
    assert source.manifest is not None
    shards = source.manifest.shards
    return np.array([one.tokens for one in shards], np.int64), np.array([one.documents for one in shards], np.int64)


def ids_of(source: Source, key: str) -> Int64:
    """All ids of the documents of a source, ascending, each once: of its columns of ids that are no parents'.

    key: of the configuration, for messages.

    Raises:
        UserError: it has no such column.
    """
    names = [column.name for column in source.columns if column.type == "id" and not column.parent]
    if not names:
        raise UserError(
            f"{key}: {source.path} has no ids of its documents; prepare it with a column of type id, or of type text_id where "
            "`synthesize` made the text that is trained on"
        )
    files = source.base if isinstance(source, SelectedSource) else source
    found = [values[values != 0] for name in names for values in files.column(name)[1]]
    return np.unique(np.concatenate(found))


def select(
    source: Source, expression: Expression | None, cache: Path, key: str, without_parents: Int64 | None = None
) -> SelectedSource:
    """The documents of a source that an expression means.

    Args:
        source: has a manifest and columns, and is not packed.
        expression: over its columns; None: all documents.
        without_parents: leave out the documents of which a parent has one of these ids, ascending; the source has parents.
        cache: folder for the index; it is made if need be.
        key: of the configuration, for messages: `data.sources.NAME.where`.

    Raises:
        UserError: the source has no such columns, no document is meant, or the folder cannot be written.
    """
    manifest = source.manifest
    if manifest is None:
        raise UserError(f"{key}: {source.path} is a bare pair without columns; prepare the source with `columns`")
    if manifest.packing is not None:
        raise UserError(
            f"{key}: {source.path} was packed, and chosen documents would not fill its windows; prepare it without packing"
        )
    asked = () if expression is None else expression.columns
    parents = () if without_parents is None else parents_of(source)
    for name in asked:
        source.column_named(name, f"{key}: {source.path}")
    columns = [column.model_dump(mode="json") for column in source.columns if column.name in (*asked, *parents)]
    where = "" if expression is None else expression.canonical
    content: list[Any] = [1, manifest.digest(), columns, [shard.columns_sha256 for shard in manifest.shards], where]
    if without_parents is not None:
        content.append(hashlib.sha256(without_parents.tobytes()).hexdigest())
        where = f"{where} and no parent is evaluated" if where else "no parent is evaluated"
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path, sizes = cache / f"where-{digest[:32]}.index", _sizes(source)
    index = SelectionIndex.open(path, digest, *sizes)
    if index is None:
        try:
            made = SelectionIndex.build(_masks(source, expression, parents, without_parents))
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(path, made, private=True)
        except OSError as error:
            raise UserError(
                f"{error.filename or cache}: {error.strerror}; the index of {key} is kept there: set data.cache to another"
            ) from None
        index = SelectionIndex.open(path, digest, *sizes)
        assert index is not None, path
    if not index.tokens:
        raise UserError(f"{key}: no document of {source.path} is left ({where}); change what is asked")
    return SelectedSource(source, index, where)


def parents_of(source: Source) -> tuple[str, ...]:
    """Names of the columns that hold ids of parents."""
    return tuple(column.name for column in source.columns if column.parent)


def _masks(
    source: Source, expression: Expression | None, parents: tuple[str, ...], without_parents: Int64 | None
) -> Iterator[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]]:
    assert source.manifest is not None
    asked = () if expression is None else expression.columns
    columns = {name: source.column(name) for name in (*asked, *parents)}
    for number in range(len(source.manifest.shards)):

        def lookup(name: str, number: int = number) -> Any:
            column, values = columns[name]
            return column, values[number]

        lengths = source.shard(number).document_lengths()
        mask = np.ones(len(lengths), np.bool_) if expression is None else matches(expression, lookup)
        for name in parents:
            assert without_parents is not None
            mask &= ~np.isin(columns[name][1][number], without_parents)
        yield mask, lengths


def shared_tokens(one: Source, two: Source) -> int:
    """Tokens that two sources both hold, where they are made from the same files; 0 where they are not."""
    if one.manifest is None or two.manifest is None or one.manifest.digest() != two.manifest.digest():
        return 0
    first, second = _stretches(one), _stretches(two)
    edges = np.unique(np.concatenate([*first, *second]))
    held = [
        np.searchsorted(begins, edges[:-1], "right") > np.searchsorted(ends, edges[:-1], "right")
        for begins, ends in (first, second)
    ]
    return int(np.diff(edges)[held[0] & held[1]].sum())


def _stretches(source: Source) -> tuple[Int64, Int64]:
    """Begins and ends, ascending, of the tokens of a prepared source that it, or a choice from it, holds."""
    if not isinstance(source, SelectedSource):
        return np.array([0]), np.array([source.num_tokens])
    index = source.index
    tokens, _ = _sizes(source)
    begins = (np.cumsum(tokens) - tokens)[index.shards] + index.begins
    return begins, begins + np.diff(index.starts)
