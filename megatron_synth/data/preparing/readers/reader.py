"""Where a source's documents come from, as `prepare` sees it: what the input is, how it is split, what it holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_synth.config.prepare import PrepareSource
from megatron_synth.data.preparing.readers.documents import BadRecord, Document, Place
from megatron_synth.data.preparing.readers.formats import Segment
from megatron_synth.storage import remote


@dataclass(frozen=True)
class InputSplit:
    """What one worker does at a time: segments of files that it reads, lines that were read for it, or documents."""

    segments: tuple[Segment, ...] = ()
    lines: tuple[Place, bytes] | None = None
    documents: tuple[Document | BadRecord, ...] = ()


class Reader(ABC):
    """One kind of input. Its splits depend on the input alone, not on the number of workers."""

    rereadable = True
    """Whether reading it again costs little more than the disk."""

    def __init__(self, name: str, source: PrepareSource):
        self.name, self.source = name, source

    @property
    def generator(self) -> str | None:
        """What wrote the text; None for natural text."""
        return self.source.generator

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the source is read from, so that changed inputs are noticed, down to a fingerprint of the content.

        Raises:
            UserError: something of it is missing or cannot be read.
        """

    @abstractmethod
    def text_bytes(self) -> int:
        """Roughly how much text it holds; 0 where nothing is known before reading."""

    @abstractmethod
    def splits(self) -> Iterator[InputSplit]:
        """All of it in order."""

    def documents(self, split: InputSplit) -> Iterator[Document | BadRecord]:
        """The documents of a split, empty ones included."""
        yield from split.documents

    def splitting(self) -> str:
        """How it is cut into splits, in words."""
        return "read from its start by every share"

    def files(self) -> Sequence[remote.Location]:
        """The files that it reads, each once; none where the input is no files."""
        return []
