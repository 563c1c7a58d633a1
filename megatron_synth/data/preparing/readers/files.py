"""Files as input: which files patterns name, what they are, and how they are split among workers."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareSource
from megatron_synth.data.preparing import splits
from megatron_synth.data.preparing.readers.documents import SAMPLE_BYTES, BadRecord, Document, Place
from megatron_synth.data.preparing.readers.formats import COMPRESSIONS, FileFormat, is_compressed, open_file, reading
from megatron_synth.data.preparing.readers.jsonl import JsonLines
from megatron_synth.data.preparing.readers.parquet import Parquet
from megatron_synth.data.preparing.readers.reader import InputSplit, Reader
from megatron_synth.data.preparing.readers.text import Text
from megatron_synth.storage import objects
from megatron_synth.storage.objects import size_of
from megatron_synth.storage.remote import Location, Remote, is_remote

STREAMED = "read from its start by every share"
FORMATS: tuple[type[FileFormat], ...] = (Text, JsonLines, Parquet)


def format_of(path: Location) -> type[FileFormat] | None:
    """The format of a file, by how its name ends; None if there is none. Everything that asks, asks here."""
    for kind in FORMATS:
        endings = [kind.ending, *(kind.ending + more for more in COMPRESSIONS if kind.compressible)]
        if path.name.endswith(tuple(endings)):
            return kind
    return None


class Files(Reader):
    """The files of `input`, sorted, each once under whatever names it is found."""

    def __init__(self, name: str, source: PrepareSource):
        super().__init__(name, source)
        self._formats = {kind: kind(source) for kind in FORMATS}

    def _format(self, path: Location) -> FileFormat:
        kind = format_of(path)
        assert kind is not None, path
        return self._formats[kind]

    def files(self) -> list[Location]:
        """Looked for again each time, those in object storage after the others.

        Raises:
            UserError: a pattern without files, a file of no known format, or one that cannot be reached.
        """
        assert self.source.input is not None
        where = f"sources.{self.name}.input"
        found: set[Path] = set()
        remote: set[Remote] = set()
        for pattern in self.source.input:
            if is_remote(pattern):
                objects_found = objects.find(pattern, where)
                if not objects_found:
                    raise UserError(f"{where}: {pattern}: no such object")
                remote.update(objects_found)
                continue
            matches = set(find(pattern, where))
            if not matches:
                raise UserError(f"{where}: {pattern}: no such file")
            found |= matches
        known: dict[tuple[int, int], Path] = {}
        everything: list[Location] = [*sorted(found), *sorted(remote)]
        for path in everything:
            if format_of(path) is None:
                endings = ", ".join(kind.ending for kind in FORMATS)
                raise UserError(
                    f"{where}: {path}: unknown format, expected one of {endings} (.txt and .jsonl also with .gz or .zst)"
                )
            if isinstance(path, Path):
                status = path.stat()
                known.setdefault((status.st_dev, status.st_ino), path)
        return [*known.values(), *sorted(remote)]

    def describe(self) -> dict[str, Any]:
        """The patterns, and a fingerprint of names and contents."""
        files = self.files()
        size = sum(map(size_of, files))
        return {"files": list(self.source.input or ()), "count": len(files), "bytes": size, "fingerprint": fingerprint(files)}

    def text_bytes(self) -> int:
        """By the size of the files, and how text compresses."""
        return sum(self._format(file).text_bytes(file, size_of(file)) for file in self.files())

    def splits(self) -> Iterator[InputSplit]:
        """Segments of files; what can only be read from its start, and is large, is read here."""
        files = self.files()
        sizes = [size_of(file) for file in files]
        limit = splits.split_bytes(sum(sizes))
        many = self._many(files)
        pending: list[Any] = []
        filled = 0
        for file, size in zip(files, sizes, strict=True):
            form = self._format(file)
            if self._is_streamed(file, size, many):
                if pending:
                    yield InputSplit(tuple(pending))
                    pending, filled = [], 0
                yield from _streamed(file)
                continue
            for segment, weight in form.segments(file, size, limit):
                if pending and filled + weight > limit:
                    yield InputSplit(tuple(pending))
                    pending, filled = [], 0
                pending.append(segment)
                filled += weight
        if pending:
            yield InputSplit(tuple(pending))

    def splitting(self) -> str:
        """How many files are cut in which way."""
        files, counts = self.files(), dict.fromkeys(("by byte ranges", "by row groups", "whole", STREAMED), 0)
        many = self._many(files)
        for file in files:
            form = self._format(file)
            if isinstance(form, Parquet):
                counts["by row groups"] += 1
            elif self._is_streamed(file, size_of(file), many):
                counts[STREAMED] += 1
            elif is_compressed(file) or form.texts_of_lines(()) is None:
                counts["whole"] += 1
            else:
                counts["by byte ranges"] += 1
        return ", ".join(f"{number} file{'' if number == 1 else 's'} {how}" for how, number in counts.items() if number)

    @staticmethod
    def _many(files: Sequence[Location]) -> bool:
        """Whether there are enough files that cannot be cut to share the work by file."""
        return sum(is_compressed(file) or format_of(file) is Parquet for file in files) >= splits.MANY_FILES

    def _is_streamed(self, file: Location, size: int, many: bool) -> bool:
        """Whether a compressed file is read from its start, and handed out in parts."""
        large = is_compressed(file) and size > splits.STREAMED_ABOVE and not many
        return large and self._format(file).texts_of_lines(()) is not None

    def documents(self, split: InputSplit) -> Iterator[Document | BadRecord]:
        """Read by a worker."""
        if split.lines is not None:
            place, data = split.lines
            texts = self._format(place.path).texts_of_lines(splits.lines_of(place, data))
            assert texts is not None
            yield from map(_as_document, texts)
        for segment in split.segments:
            yield from map(_as_document, self._format(segment.path).texts(segment))


def _as_document(found: str | Document | BadRecord) -> Document | BadRecord:
    return Document(found, found) if isinstance(found, str) else found


def _streamed(file: Location) -> Iterator[InputSplit]:
    """A compressed line file, decompressed here."""
    place, total = Place(file), 0
    held: list[bytes] = []
    size, first = 0, 0
    with reading(place), closing(open_file(file)) as stream:
        for line in stream:
            held.append(line)
            size += len(line)
            place.number += 1
            if size >= splits.growing(total):
                yield InputSplit(lines=(Place(file, number=first), b"".join(held)))
                total, held, size, first = total + size, [], 0, place.number
    if held:
        yield InputSplit(lines=(Place(file, number=first), b"".join(held)))


def find(pattern: str, where: str) -> Iterator[Path]:
    """The files that a pattern names, as `glob` finds them, but nothing that cannot be reached is passed over.

    Raises:
        UserError: a link to nothing, a folder that cannot be read or that the pattern takes for a file, a name that is
            not UTF-8.
    """
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    for match in _find(Path(path.anchor), list(parts), set(), where):
        try:
            match.name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: {os.fsencode(match)!r}: its name is not UTF-8; rename the file") from None
        try:
            mode = match.stat().st_mode
        except FileNotFoundError:
            if match.is_symlink():
                raise UserError(f"{where}: {match}: a link to nothing ({os.readlink(match)}); fix or remove it") from None
            continue
        except OSError as error:
            raise UserError(f"{where}: {match}: {error.strerror}; every file of the input must be readable") from None
        if stat.S_ISREG(mode):
            yield match
        elif not parts or parts[-1] != "**":
            what = "a folder: name its files, such as `*.jsonl`" if stat.S_ISDIR(mode) else "no regular file"
            raise UserError(f"{where}: {match}: {what}")


def _find(folder: Path, parts: list[str], above: set[Path], where: str) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if not has_magic(first):
        yield from _find(folder / first, rest, above, where)
        return
    if first == "**":
        real = folder.resolve()
        if real in above:  # a link to a folder above
            return
        if rest:
            yield from _find(folder, rest, set(), where)
        for child in _children(folder, where):
            if child.name.startswith("."):
                continue
            if _is_folder(child, where):
                yield from _find(child, parts, {*above, real}, where)
            elif not rest:
                yield child
        return
    for child in _children(folder, where):
        hidden = child.name.startswith(".") and not first.startswith(".")
        if fnmatchcase(child.name, first) and not hidden and (not rest or _is_folder(child, where)):
            yield from _find(child, rest, set(), where)


def _children(folder: Path, where: str) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{where}: {folder}: {error.strerror}; every folder of the input must be readable") from None
    return [folder / name for name in names]


def _is_folder(path: Path, where: str) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{where}: {path}: {error.strerror}; every folder of the input must be readable") from None


def fingerprint(files: Iterable[Location]) -> str:
    """SHA-256 over the names and contents of `files`, in order; of an object its size and ETag stand for the content."""
    total = hashlib.sha256()
    for path in files:
        if isinstance(path, Remote):
            total.update(f"{path}\0{path.size}\0{path.etag}\0".encode())
            continue
        try:
            total.update(os.fsencode(path.name) + f"\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                while part := file.read(SAMPLE_BYTES):
                    total.update(part)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; every file of the input must be readable") from None
    return total.hexdigest()
