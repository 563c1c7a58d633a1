"""Data sets of the `datasets` library, from a folder or streamed from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import HubInput, PrepareSource
from megatron_synth.data.preparing.readers.documents import BadRecord, Document, check_column, checked_text
from megatron_synth.data.preparing.readers.files import fingerprint
from megatron_synth.data.preparing.readers.parts import document_of
from megatron_synth.data.preparing.readers.reader import InputSplit, Reader
from megatron_synth.data.preparing.readers.values import values_of
from megatron_synth.data.preparing.splits import splits_of_documents


class HubDataSet(Reader):
    """A data set that the parent reads, record by record; the text is the column `text_key` of the source."""

    def __init__(self, name: str, source: PrepareSource):
        super().__init__(name, source)
        assert source.hf is not None
        self._hub: HubInput = source.hf
        self._folder = Path(source.hf.path) if Path(source.hf.path).is_dir() else None
        self.rereadable = self._folder is not None

    def describe(self) -> dict[str, Any]:
        """The settings and, of a folder, a fingerprint."""
        described: dict[str, Any] = {"hf": self._hub.model_dump()}
        if self._folder is not None:
            described["fingerprint"] = fingerprint(self.files())
        return described

    def text_bytes(self) -> int:
        """The size of the tables in a folder; what is streamed is not known."""
        return sum(path.stat().st_size for path in self.files() if path.suffix == ".arrow")

    def files(self) -> list[Path]:
        """All files of a folder."""
        return [] if self._folder is None else sorted(path for path in self._folder.rglob("*") if path.is_file())

    def splits(self) -> Iterator[InputSplit]:
        """Documents as they come."""
        yield from splits_of_documents(self._documents())

    def _documents(self) -> Iterator[Document | BadRecord]:
        import datasets

        hub, key, where = self._hub, self.source.main_key, f"sources.{self.name}.hf"
        try:
            if self._folder is not None:
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
        if data.column_names is not None:
            check_column(where, data.column_names, key, "text_key" if self.source.messages is None else "messages.field")
        for number, record in enumerate(_records(data, where)):
            try:
                if self.source.masked:
                    yield document_of(self.source, record, f"{where}, record {number}")
                    continue
                if key not in record:
                    raise BadRecord(f"{where}, record {number}: no field {key!r}, found {sorted(record)}; set text_key")
                text = checked_text(record[key], f"{where}, record {number}", key)
                columns = self.source.columns
                values = values_of(columns, record, text, f"{where}, record {number}") if columns else None
            except BadRecord as error:
                yield error
                continue
            yield Document(text, text, values)


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
