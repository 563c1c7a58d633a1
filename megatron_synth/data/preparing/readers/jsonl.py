"""One JSON object per line."""

from __future__ import annotations

import json
from typing import Any

from megatron_synth.data.preparing.readers.documents import BadRecord, Document, Place, checked_text, decoded
from megatron_synth.data.preparing.readers.formats import LineFormat
from megatron_synth.data.preparing.readers.parts import document_of
from megatron_synth.data.preparing.readers.values import values_of


class JsonLines(LineFormat):
    """.jsonl; the text is the field `text_key` of the source."""

    ending = ".jsonl"

    def text_of(self, place: Place, line: bytes) -> str | Document | None:
        """The field of the text, with values where the source has columns; None for an empty line."""
        if not line.strip():
            return None
        source, key = self.source, self.source.main_key
        text = decoded(place, line)
        if not text.strip():
            return None
        try:
            record = self._parsed(place, text)
        except json.JSONDecodeError as error:
            raise BadRecord(f"{place}: broken JSON, {error}; one object per line was expected") from None
        except RecursionError:
            raise BadRecord(f"{place}: JSON nested too deeply to be read; leave out what is not text") from None
        if isinstance(record, dict) and source.masked:
            return document_of(source, record, place)
        if not isinstance(record, dict) or key not in record:
            keys = sorted(record) if isinstance(record, dict) else []
            raise BadRecord(f"{place}: no field {key!r}, found {keys}; set text_key to the field of the text")
        found = checked_text(record[key], place, key)
        columns = self.source.columns
        return Document(found, found, values_of(columns, record, found, place)) if columns else found

    def _parsed(self, place: Place, text: str) -> Any:
        key = self.source.main_key
        if text.count(f'"{key}"') > 1:  # most often in a text; to know costs a slower way
            last: list[tuple[str, Any]] = []

            def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
                nonlocal last
                last = pairs
                return dict(pairs)

            record = json.loads(text, object_pairs_hook=keep, parse_int=str)
            # the outermost object is the last to be complete
            if isinstance(record, dict) and sum(name == key for name, _ in last) > 1:
                raise BadRecord(f"{place}: the field {key!r} stands there more than once; write it once")
            return record
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of more digits than Python makes one of
            return json.loads(text, parse_int=str)
