"""Plain text: a document is a file, or a line."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_synth.data.preparing.readers.documents import BadRecord, Document, Place, decoded
from megatron_synth.data.preparing.readers.formats import LineFormat, Segment, read_lines


class Text(LineFormat):
    """.txt; `text_as` of the source says what a document is."""

    ending = ".txt"

    def by_lines(self) -> bool:
        """Whether a document is a line."""
        return self.source.text_as == "line"

    def texts(self, segment: Segment) -> Iterator[str | Document | BadRecord]:
        """The lines, or the whole file as one text."""
        if self.by_lines():
            yield from super().texts(segment)
            return
        try:
            yield "".join(decoded(place, line) for place, line in read_lines(segment.path))
        except BadRecord as error:
            yield error

    def text_of(self, place: Place, line: bytes) -> str | None:
        """The line without its end."""
        return decoded(place, line.rstrip(b"\r\n"))
