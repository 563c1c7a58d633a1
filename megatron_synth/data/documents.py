"""Where documents come from: files, data sets of the `datasets` library, the built-in corpus. One stream each.

Files are read line by line here rather than through `datasets`, which reports a broken record without file and line.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import platform
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import HubInput, PrepareSource
from megatron_synth.data import pydocs
from megatron_synth.data.indexed import MAX_SEQUENCE_TOKENS

FORMATS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COMPRESSED = (".gz", ".zst", ".parquet")
TYPICAL_COMPRESSION = 3.5  # of gzip, zstd and parquet on text; only the estimate of the disk space uses it
WHOLE_HASH_BYTES = 64 * 2**20  # larger files are told apart by size, start, middle and end
SAMPLE_BYTES = 2**20
BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Document:
    """text: what is tokenised; key: what decides its split. Documents that share a key go to the same split."""

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
        return {"builtin": source.builtin, "python": platform.python_version(), "fingerprint": pydocs.fingerprint()}
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
        documents = (Document(text, key) for key, text in pydocs.documents(source.builtin))
    elif source.hf is not None:
        documents = (Document(text, text) for text in _hub_texts(name, source))
    else:
        documents = (Document(text, text) for file in input_files(name, source) for text in _file_texts(file, source))
    read = 0
    for document in documents:
        if not document.text or document.text.isspace():
            continue
        size = len(document.text.encode())
        if size > MAX_SEQUENCE_TOKENS:  # a byte is a token at worst
            raise UserError(f"sources.{name}: a document of {size} bytes, at most {MAX_SEQUENCE_TOKENS} fit; split it")
        yield document
        read += size
        if source.max_bytes is not None and read >= source.max_bytes:
            return


def _file_texts(path: Path, source: PrepareSource) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _parquet_texts(path, source.text_key)
        return
    if ".jsonl" in path.suffixes[-2:]:
        for number, line in _lines(path):
            if line.strip():
                yield _json_text(path, number, line, source.text_key)
    elif source.text_as == "line":
        for number, line in _lines(path):
            yield _utf8(path, number, line.rstrip(b"\r\n"))
    else:
        lines = []
        for number, line in _lines(path):
            lines.append(_utf8(path, number, line))
        yield "".join(lines)


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), SAMPLE_BYTES)
    return open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end) of a plain or compressed file."""
    number = 0
    try:
        with closing(_open(path)) as file:
            for line in file:
                number += 1
                yield number, line
    except (OSError, EOFError, zlib.error) as error:  # of the decompressors, too
        raise UserError(f"{path}: cannot be read after line {number}: {error}; copy or compress the file again") from None


def _utf8(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not UTF-8, {error.reason} at byte {error.start} of the line; convert the file"
        ) from None


def _json_text(path: Path, number: int, line: bytes, key: str) -> str:
    try:
        record = json.loads(_utf8(path, number, line))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: broken JSON, {error}; one object per line was expected") from None
    keys = sorted(record) if isinstance(record, dict) else []
    if key not in keys:
        raise UserError(f"{path}, line {number}: no field {key!r}, found {keys}; set text_key to the field of the text")
    return _checked_text(record[key], f"{path}, line {number}", key)


def _checked_text(value: Any, where: str, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} holds {type(value).__name__}, expected text; set text_key to the field of the text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid Unicode, a lone surrogate at character {error.start}; mend the text") from None
    return value


def _parquet_texts(path: Path, key: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise UserError(f"{path}: no column {key!r}, found {names}; set text_key to the column of the text")
            for batch in file.iter_batches(BATCH_ROWS, columns=[key]):
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
