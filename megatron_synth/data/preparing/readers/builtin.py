"""The built-in corpus as a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_synth.data.preparing import builtin_corpus
from megatron_synth.data.preparing.readers.documents import Document
from megatron_synth.data.preparing.readers.reader import InputSplit, Reader
from megatron_synth.data.preparing.splits import splits_of_documents


class BuiltinCorpus(Reader):
    """Text that comes with the program; documents about one module go to one split."""

    def describe(self) -> dict[str, Any]:
        """Which part of it, and the digest of all."""
        return {"builtin": self.source.builtin, "fingerprint": builtin_corpus.SHA256}

    def text_bytes(self) -> int:
        """Of the part."""
        assert self.source.builtin is not None
        return builtin_corpus.text_bytes(self.source.builtin)

    def splits(self) -> Iterator[InputSplit]:
        """The documents, sorted by module."""
        assert self.source.builtin is not None
        yield from splits_of_documents(Document(text, key) for key, text in builtin_corpus.documents(self.source.builtin))
