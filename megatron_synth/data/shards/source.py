"""Prepared sources as one stream of tokens each, cut into windows.

The stream of a source is the concatenation of its documents over all shards in order. In windows of L inputs, window
w is tokens [w*L, w*L + L + 1): neighboring windows share one token, the last label of the one and the first input of
the next. A mixture may begin its windows at any token.
"""

from __future__ import annotations

import functools
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import RankError, UserError
from megatron_synth.data.shards import native
from megatron_synth.data.shards.columns import SUFFIX as COLUMNS
from megatron_synth.data.shards.columns import ColumnFile, ColumnInfo
from megatron_synth.data.shards.indexed import MANY_SHARDS, Places, Shard, with_suffix
from megatron_synth.data.shards.manifest import FILE_NAME, Manifest, ShardInfo, TokenizerInfo
from megatron_synth.data.shards.open_files import AGAIN, file_size

WHOLE = (0, 1)
"""The part of one rank that is alone."""


class Source:
    """An opened source. Opening reads sizes, and some bytes of each index; files stay open once tokens are asked for.

    Any number of threads may read.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        manifest: Manifest | None,
        bare: Shard | None = None,
        *,
        memory_map: bool = True,
        index_alone: bool = False,
    ):
        """bare: the only shard of a source without a manifest; with one they are opened as it says.

        index_alone: the files of tokens need not be there, and none is read.
        """
        self.index_alone = index_alone
        self.name, self.path, self.manifest, self.memory_map = name, path, manifest, memory_map
        self._shards: list[Shard | None]
        if manifest is None:
            assert bare is not None
            self._shards, self.places, self.dtype = [bare], bare.places, bare.dtype
            sizes = np.array([bare.num_tokens])
        else:
            self._shards, self.places = [None] * len(manifest.shards), Places(len(manifest.shards))
            self.dtype = np.dtype(manifest.dtype)
            sizes = np.fromiter(map(attrgetter("tokens"), manifest.shards), np.int64, len(manifest.shards))
        self._ends_array = np.cumsum(sizes, dtype=np.int64)
        self._begins_array = self._ends_array - sizes
        self._ends: list[int] = self._ends_array.tolist()
        self._begins: list[int] = self._begins_array.tolist()
        self.num_tokens: int = self._ends[-1]
        counts = [bare.num_documents] if bare is not None else [info.documents for info in manifest.shards] if manifest else []
        self._documents_before: list[int] = (np.cumsum(counts, dtype=np.int64) - counts).tolist()
        self._before_read: Callable[[int, int, int], None] | None = None
        self._column_files: dict[int, ColumnFile] = {}

    @property
    def vocab_size(self) -> int | None:
        """How many token ids there are: tokens beyond them are never handed out. None: that is not known."""
        return self.shard(0).vocab_size if self.manifest is None else self.manifest.tokenizer.vocab_size

    def limit_ids(self, vocab_size: int) -> None:
        """Say how many token ids there are, where no manifest does."""
        assert self.manifest is None, self.path
        self.shard(0).vocab_size = vocab_size

    @property
    def num_documents(self) -> int:
        """Documents of the stream."""
        if self.manifest is None:
            return int(self.shard(0).num_documents)
        return sum(info.documents for info in self.manifest.shards)

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        # open files do not travel to another process
        return partial(open_source, memory_map=self.memory_map), (self.path, self.name)

    @functools.cached_property
    def digest(self) -> str | None:
        """What stands for the content of a source with a manifest; None without."""
        return None if self.manifest is None else self.manifest.digest()

    def first_token(self, shard: int) -> int:
        """The first token of a shard, in the stream of all of them."""
        return self._begins[shard]

    @property
    def tokenizer_path(self) -> Path | None:
        """Where the manifest says that tokenizer.json is; None without a manifest."""
        return None if self.manifest is None else self.path / self.manifest.tokenizer.path

    def num_windows(self, length: int) -> int:
        """Whole windows of `length` inputs and as many labels."""
        return max(self.num_tokens - 1, 0) // length

    def shard(self, number: int) -> Shard:
        """One of the shards, opened and checked against the manifest.

        Raises:
            UserError: missing, damaged, or not the one that the manifest announces.
        """
        shard = self._shards[number]
        if shard is None:
            assert self.manifest is not None
            shard = self._shards[number] = _open_checked(self, self.manifest, number)
            self._check_before_index(number, shard)
        return shard

    def column(self, name: str) -> tuple[ColumnInfo, list[np.ndarray]]:
        """A column of the source, and its values by shard, [documents] each. Reads and checks the files of all columns.

        Raises:
            UserError: there is no such column, or a file is missing or damaged.
        """
        found = self.column_named(name, f"{self.path}: source {self.name!r}")
        return found, [self._column_file(number).values(name) for number in range(len(self._shards))]

    def column_named(self, name: str, where: str) -> ColumnInfo:
        """What is known of a column. where: how a message begins.

        Raises:
            UserError: there is no such column.
        """
        for column in self.columns:
            if column.name == name:
                return column
        known = ", ".join(column.name for column in self.columns) or "none"
        raise UserError(
            f"{where} has no column {name!r}, its columns are: {known}; name it in `columns` of the file of "
            "`megatron-synth prepare`, and prepare the source again"
        )

    @property
    def columns(self) -> tuple[ColumnInfo, ...]:
        """What is known of its documents."""
        return () if self.manifest is None else self.manifest.columns

    def _column_file(self, number: int) -> ColumnFile:
        found = self._column_files.get(number)
        if found is None:
            assert self.manifest is not None
            info = self.manifest.shards[number]
            assert info.columns_sha256 is not None
            path = with_suffix(self.path / info.name, COLUMNS)
            found = self._column_files[number] = ColumnFile(path, self.columns, info.documents, info.columns_sha256, AGAIN)
        return found

    def check_before_reading(self, check: Callable[[int, int, int], None]) -> None:
        """Call `check(shard number, first byte, byte after the last)` before any tokens of the .bin file are handed out.

        And with an empty range before the index of a shard is used.

        What it raises reaches the reader instead of the tokens. The source must be open without a memory map: what the
        check itself reads, and what is handed out, then fails with a message and not with a signal.
        """
        assert not self.memory_map, "rows are copied from memory maps unasked"
        self._before_read = check
        for number, shard in enumerate(self._shards):
            if shard is not None:
                self._check_before_index(number, shard)

    def _check_before_index(self, number: int, shard: Shard) -> None:
        check = self._before_read
        if check is not None:
            shard.before_index = partial(check, number, 0, 0)

    def read(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` [N], of any integer type that holds the vocabulary, with tokens [begin, begin + N) of the stream.

        Raises:
            UserError: a file cannot be read there; it names file and offset.
        """
        for number, local, part in self._of_shards(begin, out):
            shard = self.shard(number)
            if self._before_read is not None:
                size = shard.dtype.itemsize
                self._before_read(number, local * size, (local + len(part)) * size)
            shard.read(local, part)

    def _of_shards(self, begin: int, out: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Which shard, from which token on, holds what belongs into which part of `out` [N], for tokens [begin, begin + N)."""
        assert 0 <= begin <= self.num_tokens - len(out), (self.name, begin, out.shape)
        number, filled = bisect_right(self._ends, begin), 0
        while filled < len(out):
            local = begin + filled - self._begins[number]
            part = out[filled : filled + self._ends[number] - self._begins[number] - local]
            if len(part):  # shards may be empty
                yield number, local, part
            filled += len(part)
            number += 1

    @property
    def masked(self) -> bool:
        """Whether some of its tokens are read and not learned."""
        return self.manifest is not None and self.manifest.masked

    def read_learned(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` [N] of bools with whether tokens [begin, begin + N) of the stream are learned.

        Raises:
            UserError: a file cannot be read there.
        """
        for number, local, part in self._of_shards(begin, out):
            self.shard(number).read_learned(local, part)

    def read_window(self, window: int, out: np.ndarray) -> None:
        """`read` of window `window`; out: [L + 1]."""
        self.read(window * (len(out) - 1), out)

    def places_of(self, begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each window the number of the shard that holds all its L + 1 tokens, and the first one's place in it.

        begins: int64 [N] first token of each window. Returns int64 [N] twice. The number is -1 for a window that lies in
        several shards: `read` reads those. Opens nothing.
        """
        numbers = np.searchsorted(self._ends_array, begins, side="right")
        whole = begins + length < self._ends_array[numbers]
        return np.where(whole, numbers, -1), begins - self._begins_array[numbers]

    def will_need(self, begin: int, length: int) -> None:
        """Ask the system to fetch a window from disk in the background. Only a hint: nothing is raised, nothing waits.

        A window that goes on in another shard has only its beginning fetched.
        """
        number = bisect_right(self._ends, begin)
        shard = self._shards[number]
        if shard is not None:
            shard.will_need(begin - self._begins[number], min(length + 1, self._ends[number] - begin))

    def document_starts(self, window: int, length: int) -> np.ndarray:
        """Offsets in [0, L) of this window at which a document starts, ascending, int64. Reads the index, no tokens."""
        offsets, _ = self.document_starts_of(np.array([window * length]), length)
        return offsets[offsets < length]

    def document_starts_of(self, begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Offsets in [0, L] at which a document starts, for many windows at once; L itself is the last label.

        begins: int64 [N] first token of each window. Returns all offsets, window by window, ascending in each, int64; and
        how many belong to each window, int64 [N]. Reads the indexes, no tokens.
        """
        numbers = np.searchsorted(self._ends_array, begins, side="right")
        inside = begins + length < self._ends_array[numbers]
        first = int(numbers[0]) if len(numbers) else 0
        if inside.all() and (numbers == first).all():
            return self._starts_in(first, begins, length)
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        for number in np.unique(numbers[inside]).tolist():
            rows = np.flatnonzero(inside & (numbers == number))
            offsets, counts = self._starts_in(number, begins[rows], length)
            pieces.append((np.repeat(rows, counts), offsets))
        for row in np.flatnonzero(~inside).tolist():
            offsets = self._starts_across(int(numbers[row]), int(begins[row]), length)
            pieces.append((np.full(len(offsets), row), offsets))
        rows = np.concatenate([rows for rows, _ in pieces])
        by_row = np.argsort(rows, kind="stable")
        return np.concatenate([offsets for _, offsets in pieces])[by_row], np.bincount(rows, minlength=len(begins))

    def documents_of(self, tokens: np.ndarray) -> np.ndarray:
        """Of each token [N] of the stream the document that it is in, counted from its start: int64 [N]. Reads the indexes."""
        numbers = np.searchsorted(self._ends_array, tokens, side="right")
        found = np.empty(len(tokens), np.int64)
        for number in np.unique(numbers).tolist():
            of_shard = numbers == number
            try:
                own = self.shard(number).open_index().containing(tokens[of_shard] - self._begins[number])
            except native.BusError as error:
                raise self.shard(number).unreadable(error) from None
            found[of_shard] = own + self._documents_before[number]
        return found

    def unreadable(self, shard: int, error: native.BusError) -> UserError:
        """What a failed read of one of the shards means."""
        return self.shard(shard).unreadable(error)

    def open_index(self, shard: int) -> None:
        """Open the index of a shard, so that compiled code finds documents in it."""
        self.shard(shard).open_index()

    def _starts_in(self, number: int, begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `document_starts_of`, for windows within one shard."""
        local = begins - self._begins[number]
        starts, counts = self.shard(number).document_starts_of(local, local + (length + 1))
        return starts - np.repeat(local, counts), counts

    def _starts_across(self, number: int, begin: int, length: int) -> np.ndarray:
        """As `document_starts_of`, for one window that goes on in another shard."""
        end, starts = begin + length + 1, []
        while number < len(self._shards) and self._begins[number] < end:
            base = self._begins[number]
            local = self.shard(number).document_starts(max(begin - base, 0), min(end, self._ends[number]) - base)
            starts.append(local + (base - begin))
            number += 1
        return np.concatenate(starts)


def open_source(path: str | Path, name: str, *, memory_map: bool = True, part: tuple[int, int] = WHOLE) -> Source:
    """Open a folder with a manifest.json, or the prefix of a bare Megatron .bin/.idx pair.

    Sizes are checked against index and manifest. The indexes of up to MANY_SHARDS shards are opened and checked at once; of
    more, when their tokens are first asked for.

    Args:
        path: the folder, or the prefix.
        name: of the source in the mixture.
        memory_map: how `Shard` reads tokens.
        part: (rank, ranks) of ranks that all open the source: of more than MANY_SHARDS shards each rank looks for the sizes
            of its part alone, as so many questions of so many ranks would keep the file system busy for minutes.

    Raises:
        UserError: names the file, the expected and the found bytes; a RankError where other ranks have not looked.
    """
    path = Path(path)
    if path.is_dir():
        manifest = Manifest.load(path)
        few = len(manifest.shards) <= MANY_SHARDS
        try:
            _check_sizes(path, manifest.shards if few else manifest.shards[part[0] :: part[1]])
        except UserError as error:
            if few or part[1] == 1:
                raise
            raise RankError(f"rank {part[0]}: {error}") from None
        source = Source(name, path, manifest, memory_map=memory_map)
        if few:
            for number in range(len(manifest.shards)):
                source.shard(number)
        return source
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if not with_suffix(prefix, ".idx").exists() and not with_suffix(prefix, ".bin").exists():
        raise UserError(
            f"{path}: source {name!r} not found; expected a folder with {FILE_NAME} (made by `megatron-synth prepare`) "
            f"or the prefix of a Megatron .bin/.idx pair"
        )
    bare = Shard(prefix, memory_map=memory_map)
    bare.check_index()
    return Source(name, prefix, None, bare, memory_map=memory_map)


def _check_sizes(folder: Path, shards: Sequence[ShardInfo]) -> None:
    root = os.fspath(folder)
    for info in shards:
        for suffix, expected in info.sizes.items():
            path = f"{root}/{info.name}{suffix}"
            found = file_size(path)
            if found != expected:
                raise UserError(f"{path}: {FILE_NAME} announces {expected} bytes, found {found} bytes; {AGAIN}")


def _open_checked(source: Source, manifest: Manifest, number: int) -> Shard:
    info = manifest.shards[number]
    prefix = source.path / info.name
    shard = Shard(
        prefix,
        memory_map=source.memory_map,
        places=source.places,
        number=number,
        one_each=True,
        learned=manifest.masked and not source.index_alone,
        index_alone=source.index_alone,
    )
    if (shard.num_tokens, shard.num_documents, shard.dtype.name) != (info.tokens, info.documents, manifest.dtype):
        raise UserError(
            f"{shard.idx_path}: {FILE_NAME} announces {info.tokens} tokens of {info.documents} documents as "
            f"{manifest.dtype}, the index {shard.num_tokens} of {shard.num_documents} as {shard.dtype.name}; {AGAIN}"
        )
    shard.vocab_size = source.vocab_size
    return shard


def check_compatible(sources: Sequence[Source]) -> TokenizerInfo | None:
    """The tokenizer that all sources with a manifest share; None when none has a manifest.

    A UserError names the first two sources whose tokens come from different tokenizers.
    """
    first: tuple[Source, TokenizerInfo] | None = None
    for source in sources:
        if source.manifest is None:
            continue
        info = source.manifest.tokenizer
        if first is None:
            first = (source, info)
        elif (info.fingerprint, info.eod_id) != (first[1].fingerprint, first[1].eod_id):
            described = [
                f"{one.name!r} ({one.tokenizer_path}, {tokenizer.vocab_size} tokens, end of document "
                f"{tokenizer.eod_id}, fingerprint {tokenizer.fingerprint[:12]})"
                for one, tokenizer in (first, (source, info))
            ]
            raise UserError(
                f"sources {described[0]} and {described[1]} were made with different tokenizers: the same id means "
                f"different text; prepare one of them again with the other's tokenizer.json as `tokenizer.path`"
            )
    return None if first is None else first[1]
