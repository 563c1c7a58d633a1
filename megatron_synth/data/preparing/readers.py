"""Where documents come from: files, data sets of the `datasets` library, the built-in corpus. One stream each.

Files are read line by line here rather than through `datasets`, which reports a broken record without file and line.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import HubInput, PrepareSource
from megatron_synth.data.preparing import builtin_corpus
from megatron_synth.data.shards.indexed import MAX_SEQUENCE_TOKENS

FORMATS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COMPRESSED = (".gz", ".zst", ".parquet")
TYPICAL_COMPRESSION = 3.5  # of gzip, zstd and parquet on text; only the estimate of the disk space uses it
WHOLE_HASH_BYTES = 64 * 2**20  # larger files are told apart by size, start, middle and end
SAMPLE_BYTES = 2**20
BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Document:
    """text: what is tokenized; key: what decides its split. Documents that share a key go to the same split."""

    text: str
    key: str


def is_held_out(key: str, holdout: Fraction) -> bool:
    """Whether a document belongs to the `holdout` share: a function of its key alone, not of its place."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") * holdout.denominator < holdout.numerator << 64


def input_files(name: str, source: PrepareSource) -> list[Path]:
    """The files behind `input`, sorted, each once; a UserError for a pattern without files or an unknown format."""
    assert source.input is not None
    files: set[Path] = set()
    for pattern in source.input:
        found = [Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file()]
        if not found:
            hint = "a folder: name its files, such as `*.jsonl`" if Path(pattern).is_dir() else "no such file"
            raise UserError(f"sources.{name}.input: {pattern}: {hint}")
        files.update(found)
    for file in sorted(files):
        if not file.name.endswith(FORMATS):
            raise UserError(f"sources.{name}.input: {file}: unknown format, expected one of {', '.join(FORMATS)}")
    return sorted(files)


def hub_folder(hub: HubInput) -> Path | None:
    """The folder of a data set on disk; None when `path` is a name on the Hub."""
    folder = Path(hub.path)
    return folder if folder.is_dir() else None


def describe_input(name: str, source: PrepareSource) -> dict[str, Any]:
    """What the source is read from, so that changed inputs are noticed: patterns and a fingerprint of the content."""
    if source.builtin is not None:
        return {"builtin": source.builtin, "fingerprint": builtin_corpus.SHA256}
    if source.hf is not None:
        folder = hub_folder(source.hf)
        described: dict[str, Any] = {"hf": source.hf.model_dump()}
        if folder is not None:
            described["fingerprint"] = _fingerprint(sorted(path for path in folder.rglob("*") if path.is_file()))
        return described
    files = input_files(name, source)
    size = sum(file.stat().st_size for file in files)
    assert source.input is not None
    return {"files": list(source.input), "count": len(files), "bytes": size, "fingerprint": _fingerprint(files)}


def estimate_text_bytes(name: str, source: PrepareSource) -> int:
    """Roughly how much text the source holds; 0 where nothing is known before reading."""
    if source.builtin is not None:
        return 0
    if source.hf is not None:
        folder = hub_folder(source.hf)
        text = sum(path.stat().st_size for path in folder.rglob("*.arrow")) if folder else 0
    else:
        text = 0
        for file in input_files(name, source):
            factor = TYPICAL_COMPRESSION if file.name.endswith(COMPRESSED) else 1.0
            text += round(file.stat().st_size * factor)
    return text if source.max_bytes is None else min(text, source.max_bytes)


def read_documents(name: str, source: PrepareSource) -> Iterator[Document]:
    """All documents of a source, in a fixed order, without the empty ones; memory is bounded by the longest."""
    if source.builtin is not None:
        documents = (Document(text, key) for key, text in builtin_corpus.documents(source.builtin))
    elif source.hf is not None:
        documents = (Document(text, text) for text in _hub_texts(name, source))
    else:
        documents = (Document(text, text) for file in input_files(name, source) for text in file_texts(file, source))
    read = 0
    for document, size in with_text(name, documents):
        yield document
        read += size
        if source.max_bytes is not None and read >= source.max_bytes:
            return


def with_text(name: str, documents: Iterable[Document]) -> Iterator[tuple[Document, int]]:
    """The documents that are not empty, and the UTF-8 bytes of each."""
    for document in documents:
        if not document.text or document.text.isspace():
            continue
        size = len(document.text) if document.text.isascii() else len(document.text.encode())
        if size > MAX_SEQUENCE_TOKENS:  # a byte is a token at worst
            raise UserError(f"sources.{name}: a document of {size} bytes, at most {MAX_SEQUENCE_TOKENS} fit; split it")
        yield document, size


@dataclass
class Place:
    """A line of a file, for messages. number: of the line, from 1, counted from byte `begin` of the file."""

    path: Path
    begin: int = 0
    number: int = 0

    def __str__(self) -> str:
        return f"{self.path}, line {self.number + self._before()}"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns errors of the disk and of the decompressors into a UserError."""
        try:
            yield
        except (OSError, EOFError, zlib.error) as error:
            last = self.number + self._before()
            raise UserError(
                f"{self.path}: cannot be read after line {last}: {error}; copy or compress the file again"
            ) from None

    def _before(self) -> int:
        """Lines before `begin`, counted only when something is wrong."""
        lines, left = 0, self.begin
        with open(self.path, "rb") as file:
            while left > 0 and (part := file.read(min(left, SAMPLE_BYTES))):
                lines += part.count(b"\n")
                left -= len(part)
        return lines


def file_texts(path: Path, source: PrepareSource, begin: int = 0, end: int | None = None) -> Iterator[str]:
    """The texts of a file, or of the lines that start at bytes [begin, end), or of row groups [begin, end) of parquet."""
    if path.suffix == ".parquet":
        yield from _parquet_texts(path, source.text_key, begin, end)
    elif ".jsonl" in path.suffixes[-2:] or source.text_as == "line":
        yield from line_texts(_lines(path, begin, None if path.name.endswith(COMPRESSED) else end), source)
    else:
        yield "".join(_utf8(place, line) for place, line in _lines(path))


def line_texts(lines: Iterable[tuple[Place, bytes]], source: PrepareSource) -> Iterator[str]:
    """The texts of the lines of a .jsonl or .txt file."""
    for place, line in lines:
        if ".jsonl" not in place.path.suffixes[-2:]:
            yield _utf8(place, line.rstrip(b"\r\n"))
        elif line.strip():
            yield _json_text(place, line, source.text_key)


def open_file(path: Path) -> io.BufferedIOBase:
    """A plain or compressed file."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), SAMPLE_BYTES)
    return open(path, "rb")


def _lines(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[Place, bytes]]:
    """The lines that start at bytes [begin, end) of a plain file, or all lines of any, with their ends."""
    place, at = Place(path, begin), begin
    with place.reading(), closing(open_file(path)) as file:
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


def _utf8(place: Place, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8, {error.reason} at byte {error.start} of the line; convert the file") from None


def _json_text(place: Place, line: bytes, key: str) -> str:
    try:
        record = json.loads(_utf8(place, line))
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: broken JSON, {error}; one object per line was expected") from None
    if not isinstance(record, dict) or key not in record:
        keys = sorted(record) if isinstance(record, dict) else []
        raise UserError(f"{place}: no field {key!r}, found {keys}; set text_key to the field of the text")
    return _checked_text(record[key], place, key)


def _checked_text(value: Any, where: object, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} holds {type(value).__name__}, expected text; set text_key to the field of the text")
    if value.isascii():  # known without looking
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid Unicode, a lone surrogate at character {error.start}; mend the text") from None
    return value


def row_groups(path: Path) -> list[int]:
    """Bytes of each row group of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            metadata = file.metadata
            return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read after row 0: {error}; write the file again") from None


def _parquet_texts(path: Path, key: str, begin: int, end: int | None) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise UserError(f"{path}: no column {key!r}, found {names}; set text_key to the column of the text")
            metadata = file.metadata
            row = sum(metadata.row_group(group).num_rows for group in range(begin))
            groups = list(range(begin, metadata.num_row_groups if end is None else end))
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _checked_text(value, f"{path}, row {row}", key)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read after row {row}: {error}; write the file again") from None


def _hub_texts(name: str, source: PrepareSource) -> Iterator[str]:
    import datasets

    assert source.hf is not None
    hub, where = source.hf, f"sources.{name}.hf"
    try:
        if hub_folder(hub) is not None:
            data = datasets.load_from_disk(hub.path)
        else:
            data = datasets.load_dataset(hub.path, hub.subset, split=hub.split, revision=hub.revision, streaming=True)
    except Exception as error:  # the library has no common base for network, name and format errors
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{where}: cannot open {hub.path!r}: {reason}; check path, subset, split and the network") from None
    if isinstance(data, datasets.DatasetDict):
        if hub.split not in data:
            raise UserError(f"{where}: {hub.path} has no split {hub.split!r}, found {sorted(map(str, data))}")
        data = data[hub.split]
    columns = data.column_names
    if columns is not None and source.text_key not in columns:
        raise UserError(f"{where}: no column {source.text_key!r}, found {columns}; set text_key to the column of the text")
    for number, record in enumerate(_records(data, where)):
        if source.text_key not in record:
            raise UserError(f"{where}, record {number}: no field {source.text_key!r}, found {sorted(record)}; set text_key")
        yield _checked_text(record[source.text_key], f"{where}, record {number}", source.text_key)


def _records(data: Any, where: str) -> Iterator[dict[str, Any]]:
    """The records of a data set; what goes wrong on the way, such as a lost connection, becomes a UserError."""
    iterator, number = iter(data), 0
    while True:
        try:
            record = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # as above
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{where}: reading failed after {number} records: {reason}; try again") from None
        yield record
        number += 1


def _fingerprint(files: list[Path]) -> str:
    """SHA-256 over the names and contents of `files`, in order; of large files size, start, middle and end."""
    total = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        total.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= WHOLE_HASH_BYTES:
                while part := file.read(SAMPLE_BYTES):
                    total.update(part)
            else:
                for at in (0, size // 2, size - SAMPLE_BYTES):
                    file.seek(at)
                    total.update(file.read(SAMPLE_BYTES))
    return total.hexdigest()
