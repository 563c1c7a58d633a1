"""Sources cut into portions, each read and tokenized by one worker alone.

Plain line files are cut at byte ranges and parquet files at row groups; large compressed files, data sets of the
`datasets` library and the built-in corpus can only be read from their start, so the parent reads them and hands out
text. How a source is cut depends on its files alone, not on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megatron_synth.config.prepare import PrepareSource
from megatron_synth.data.preparing.readers import (
    COMPRESSED,
    Document,
    Place,
    file_texts,
    input_files,
    line_texts,
    open_file,
    read_documents,
    row_groups,
)

SMALL_PORTION = 2**19
PORTION_BYTES = 16 * 2**20
MOST_PORTIONS = 4096  # larger sources get larger portions, so that a shuffle reads them in pieces worth a disk access
STREAMED_BYTES = 8 * 2**20  # of a portion that the parent reads: several are in memory at once
STREAMED_ABOVE = 16 * 2**20  # a compressed file of this size is worth the work of many, unless there are many of them
MANY_FILES = 32


@dataclass(frozen=True)
class Segment:
    """A part of a file: bytes [begin, end) of a plain line file, row groups [begin, end) of parquet, else all of it."""

    path: Path
    begin: int
    end: int


@dataclass(frozen=True)
class Portion:
    """What one worker does at a time: segments of files that it reads, lines that were read for it, or documents."""

    segments: tuple[Segment, ...] = ()
    lines: tuple[Place, bytes] | None = None
    documents: tuple[Document, ...] = ()


def portions(name: str, source: PrepareSource) -> Iterator[Portion]:
    """All of a source in order."""
    if source.input is None:
        yield from _of_documents(read_documents(name, source))
        return
    files = input_files(name, source)
    sizes = [file.stat().st_size for file in files]
    limit = _portion_bytes(sum(sizes))
    many = sum(file.name.endswith(COMPRESSED) for file in files) >= MANY_FILES
    pending: list[Segment] = []
    filled = 0
    for file, size in zip(files, sizes, strict=True):
        if file.suffix in (".gz", ".zst") and size > STREAMED_ABOVE and not many and _by_lines(file, source):
            if pending:
                yield Portion(tuple(pending))
                pending, filled = [], 0
            yield from _streamed(file)
            continue
        for segment, weight in _segments(file, size, source, limit):
            if pending and filled + weight > limit:
                yield Portion(tuple(pending))
                pending, filled = [], 0
            pending.append(segment)
            filled += weight
    if pending:
        yield Portion(tuple(pending))


def portion_documents(portion: Portion, source: PrepareSource) -> Iterator[Document]:
    """The documents of a portion, empty ones included."""
    if portion.lines is not None:
        place, data = portion.lines
        for text in line_texts(_split(place, data), source):
            yield Document(text, text)
    for segment in portion.segments:
        for text in file_texts(segment.path, source, segment.begin, segment.end):
            yield Document(text, text)
    yield from portion.documents


def _portion_bytes(total: int) -> int:
    return max(min(max(total // 64, SMALL_PORTION), PORTION_BYTES), total // MOST_PORTIONS)


def _by_lines(file: Path, source: PrepareSource) -> bool:
    return ".jsonl" in file.suffixes or source.text_as == "line"


def _segments(file: Path, size: int, source: PrepareSource, limit: int) -> Iterator[tuple[Segment, int]]:
    """(segment, bytes of it)"""
    if file.suffix == ".parquet":
        for group, weight in enumerate(row_groups(file)):
            yield Segment(file, group, group + 1), weight
    elif file.name.endswith(COMPRESSED) or not _by_lines(file, source):
        yield Segment(file, 0, size), size
    else:
        for begin in range(0, size, limit):
            yield Segment(file, begin, min(begin + limit, size)), min(limit, size - begin)


def _streamed(file: Path) -> Iterator[Portion]:
    """A compressed line file, decompressed here."""
    place, total = Place(file), 0
    held: list[bytes] = []
    size, first = 0, 0
    with place.reading(), closing(open_file(file)) as stream:
        for line in stream:
            held.append(line)
            size += len(line)
            place.number += 1
            if size >= _growing(total):
                yield Portion(lines=(Place(file, number=first), b"".join(held)))
                total, held, size, first = total + size, [], 0, place.number
    if held:
        yield Portion(lines=(Place(file, number=first), b"".join(held)))


def _of_documents(documents: Iterator[Document]) -> Iterator[Portion]:
    held: list[Document] = []
    size = total = 0
    for document in documents:
        held.append(document)
        size += len(document.text)
        if size >= _growing(total):
            yield Portion(documents=tuple(held))
            held, total, size = [], total + size, 0
    if held:
        yield Portion(documents=tuple(held))


def _growing(total: int) -> int:
    """Small portions first, so that a small source, too, keeps all workers busy; what comes before decides, so it is fixed."""
    return min(max(total // 64, SMALL_PORTION), STREAMED_BYTES)


def _split(place: Place, data: bytes) -> Iterator[tuple[Place, bytes]]:
    lines: Sequence[bytes] = data.splitlines(keepends=True) if b"\r" not in data else _newlines(data)
    for line in lines:
        place.number += 1
        yield place, line


def _newlines(data: bytes) -> list[bytes]:
    """Lines that end in a newline only, as files give them."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]] + ([data.rsplit(b"\n", 1)[-1]] if data[-1:] != b"\n" else [])
