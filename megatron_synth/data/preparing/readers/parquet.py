"""Parquet, read by row groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.data.preparing.readers.documents import BadRecord, Document, check_column, checked_text
from megatron_synth.data.preparing.readers.formats import TYPICAL_COMPRESSION, FileFormat, Segment
from megatron_synth.data.preparing.readers.parts import document_of
from megatron_synth.data.preparing.readers.values import fields_of, values_of
from megatron_synth.storage.objects import open_binary
from megatron_synth.storage.remote import Location

BATCH_ROWS = 256
FOOTER_BYTES = 2**16  # of an object that are read at a time, unless more is asked for


def _opened(path: Location) -> Any:
    """What pyarrow reads: a path of a file, a file of ranges of an object."""
    return path if isinstance(path, Path) else open_binary(path, FOOTER_BYTES)


class Parquet(FileFormat):
    """.parquet; the text is the column `text_key` of the source."""

    ending = ".parquet"
    compressible = False  # it is, inside

    def text_bytes(self, path: Location, size: int) -> int:
        """As of other compressed files."""
        return round(size * TYPICAL_COMPRESSION)

    def segments(self, path: Location, size: int, limit: int) -> Iterator[tuple[Segment, int]]:
        """The row groups, each with its bytes before compression."""
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(_opened(path)) as file:
                metadata = file.metadata
                weights = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read after row 0: {error}; write the file again") from None
        for group, weight in enumerate(weights):
            yield Segment(path, group, group + 1), weight

    def texts(self, segment: Segment) -> Iterator[str | Document | BadRecord]:
        """The column of row groups [begin, end)."""
        import pyarrow
        from pyarrow import parquet

        source, path, row = self.source, segment.path, 0
        key = source.main_key
        try:
            with parquet.ParquetFile(_opened(path)) as file:
                check_column(
                    path, file.schema_arrow.names, key, "messages.field" if source.messages is not None else "text_key"
                )
                row = sum(file.metadata.row_group(group).num_rows for group in range(segment.begin))
                groups = list(range(segment.begin, segment.end))
                columns, held = source.columns, set(file.schema_arrow.names)
                more = [source.text_key, *([] if source.prompt is None else [source.prompt.field])] if source.masked else []
                fields = [field for field in dict.fromkeys([*more, *fields_of(columns)]) if field in held and field != key]
                for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(dict.fromkeys([key, *fields]))):
                    texts, others = batch.column(key).to_pylist(), [batch.column(field).to_pylist() for field in fields]
                    for place, value in enumerate(texts):
                        row += 1
                        where = f"{path}, row {row}"
                        record = {key: value} | {field: other[place] for field, other in zip(fields, others, strict=True)}
                        try:
                            if source.masked:
                                yield document_of(source, record, where)
                                continue
                            text = checked_text(value, where, key)
                            if not columns:
                                yield text
                                continue
                            yield Document(text, text, values_of(columns, record, text, where))
                        except BadRecord as error:
                            yield error
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read after row {row}: {error}; write the file again") from None
