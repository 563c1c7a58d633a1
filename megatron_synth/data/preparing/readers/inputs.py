"""Which reader a source has."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_synth.config.prepare import PrepareSource
from megatron_synth.data.preparing.readers.builtin import BuiltinCorpus
from megatron_synth.data.preparing.readers.documents import Document, with_text
from megatron_synth.data.preparing.readers.files import Files
from megatron_synth.data.preparing.readers.hub import HubDataSet
from megatron_synth.data.preparing.readers.reader import Reader
from megatron_synth.data.preparing.readers.synthesized import Synthesized


def reader_of(name: str, source: PrepareSource) -> Reader:
    """The reader of a source's input."""
    if source.builtin is not None:
        return BuiltinCorpus(name, source)
    if source.synthesized is not None:
        return Synthesized(name, source)
    return HubDataSet(name, source) if source.hf is not None else Files(name, source)


def read_documents(reader: Reader) -> Iterator[tuple[Document, int]]:
    """All documents of a source with text, in order, and their UTF-8 bytes, up to `max_bytes`; bad ones may be skipped."""
    found = (document for split in reader.splits() for document in reader.documents(split))
    read = 0
    for document, size in with_text(reader.name, reader.source, found):
        yield document, size
        read += size
        if reader.source.max_bytes is not None and read >= reader.source.max_bytes:
            return
