"""Formats of input files. A format is one class: by which names it is known, how its files are split, what they hold.

To add one, write a `FileFormat` and name it in `FORMATS` of `files.py`.
"""

from __future__ import annotations

import gzip
import io
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareSource
from megatron_synth.data.preparing.readers.documents import SAMPLE_BYTES, BadRecord, Document, Place
from megatron_synth.storage import remote
from megatron_synth.storage.objects import open_binary

COMPRESSIONS = (".gz", ".zst")
TYPICAL_COMPRESSION = 3.5  # of gzip, zstd and parquet on text; only the estimate of the disk space uses it


@dataclass(frozen=True)
class Segment:
    """A part of a file: what begin and end count is the format's affair, such as bytes or row groups."""

    path: remote.Location
    begin: int
    end: int


class FileFormat(ABC):
    """One format of input files, as a source reads it."""

    ending: ClassVar[str]
    """How names of its files end."""
    compressible: ClassVar[bool] = True
    """Whether they may also end in .gz or .zst after that."""

    def __init__(self, source: PrepareSource):
        self.source = source

    @abstractmethod
    def segments(self, path: remote.Location, size: int, limit: int) -> Iterator[tuple[Segment, int]]:
        """The file of `size` bytes in parts of at most `limit` bytes that are read alone, and the weight of each in bytes."""

    @abstractmethod
    def texts(self, segment: Segment) -> Iterator[str | Document | BadRecord]:
        """The texts of a part, one per document, empty ones included."""

    def text_bytes(self, path: remote.Location, size: int) -> int:
        """Roughly how much text a file of `size` bytes holds."""
        return round(size * TYPICAL_COMPRESSION) if is_compressed(path) else size

    def texts_of_lines(self, lines: Iterable[tuple[Place, bytes]]) -> Iterator[str | Document | BadRecord] | None:
        """The texts of lines that were read already; None when documents are not lines."""
        return None


class LineFormat(FileFormat):
    """A format of which a document is a line, so that plain files are cut anywhere."""

    def by_lines(self) -> bool:
        """Whether it is so for this source."""
        return True

    def segments(self, path: remote.Location, size: int, limit: int) -> Iterator[tuple[Segment, int]]:
        """Byte ranges of a plain file; a compressed one as a whole."""
        if is_compressed(path) or not self.by_lines():
            yield Segment(path, 0, size), size
            return
        for begin in range(0, size, limit):
            yield Segment(path, begin, min(begin + limit, size)), min(limit, size - begin)

    def texts(self, segment: Segment) -> Iterator[str | Document | BadRecord]:
        """The texts of the lines that start in the range."""
        found = self.texts_of_lines(
            read_lines(segment.path, segment.begin, None if is_compressed(segment.path) else segment.end)
        )
        assert found is not None
        yield from found

    def texts_of_lines(self, lines: Iterable[tuple[Place, bytes]]) -> Iterator[str | Document | BadRecord] | None:
        """The texts of lines."""
        return self._texts(lines) if self.by_lines() else None

    def _texts(self, lines: Iterable[tuple[Place, bytes]]) -> Iterator[str | Document | BadRecord]:
        for place, line in lines:
            try:
                text = self.text_of(place, line)
            except BadRecord as error:
                yield error
                continue
            if text is not None:
                yield text

    @abstractmethod
    def text_of(self, place: Place, line: bytes) -> str | Document | None:
        """The text of a line, or a document with values of its columns; None where there is no record. Raises BadRecord."""


def is_compressed(path: remote.Location) -> bool:
    """Whether a file is compressed as a whole."""
    return path.name.endswith(COMPRESSIONS)


def open_file(path: remote.Location) -> io.BufferedIOBase:
    """A plain or compressed file, to read its text."""
    if path.suffix == ".gz":
        return gzip.open(path if isinstance(path, Path) else open_binary(path), "rb")
    if path.suffix == ".zst":
        import pyarrow

        file = str(path) if isinstance(path, Path) else open_binary(path)
        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), SAMPLE_BYTES)
    return open_binary(path)


@contextmanager
def reading(place: Place) -> Iterator[None]:
    """Turns errors of the disk and of the decompressors into a UserError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        last = place.number + (place.lines_before() if place.begin else 0)
        raise UserError(f"{place.path}: cannot be read after line {last}: {error}; copy or compress the file again") from None


def read_lines(path: remote.Location, begin: int = 0, end: int | None = None) -> Iterator[tuple[Place, bytes]]:
    """The lines that start at bytes [begin, end) of a plain file, or all lines of any, with their ends."""
    place, at = Place(path, begin), begin
    with reading(place), closing(open_file(path)) as file:
        if begin:
            file.seek(begin - 1)
            at += len(file.readline()) - 1  # the rest of a line that the range before this one has
            place.begin = at
        if end is not None and at >= end:
            return
        for line in file:
            place.number += 1
            yield place, line
            at += len(line)
            if end is not None and at >= end:
                return
