"""The prepared sources that are compared, and how their documents are numbered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.share import Share
from megatron_synth.data.overlap.ngrams import ALL, Batch, batches
from megatron_synth.data.shards.manifest import FILE_NAME, Manifest, canonical_digest

MOST_SOURCES = 64  # a document's marks are one bit per source


class Sources:
    """Prepared sources of one tokenizer. Document d of all is document d - firsts[s] of source s.

    firsts: int64 [sources + 1] numbers of the first documents, and of all.
    """

    def __init__(self, folders: Sequence[Path]):
        """Read the manifests.

        Raises:
            UserError: too many, one without a manifest, or of another tokenizer.
        """
        if len(folders) > MOST_SOURCES:
            raise UserError(f"{len(folders)} sources, at most {MOST_SOURCES} are compared at a time")
        self.folders = tuple(folders)
        self.manifests = tuple(Manifest.load(folder) for folder in folders)
        for folder, manifest in zip(folders, self.manifests, strict=True):
            if manifest.tokenizer.fingerprint != self.manifests[0].tokenizer.fingerprint:
                raise UserError(
                    f"{folder / FILE_NAME}: made with another tokenizer than {folders[0]}: the same text has other tokens; "
                    f"prepare both with one tokenizer"
                )
        names = tuple(manifest.name for manifest in self.manifests)
        self.names = names if len(set(names)) == len(names) else tuple(str(folder) for folder in folders)
        self.firsts = np.cumsum([0, *(sum(info.documents for info in manifest.shards) for manifest in self.manifests)])
        self._shards_before = np.cumsum([0, *(len(manifest.shards) for manifest in self.manifests)]).tolist()

    @property
    def total(self) -> int:
        """Documents of all sources."""
        return int(self.firsts[-1])

    @cached_property
    def digest(self) -> str:
        """Of the content and the order of the sources."""
        content = zip(self.names, self.manifests, strict=True)
        return canonical_digest([[name, manifest.split, manifest.digest()] for name, manifest in content])

    def of_split(self, split: str) -> list[int]:
        """The sources of a split."""
        return [number for number, manifest in enumerate(self.manifests) if manifest.split == split]

    def documents(self, number: int) -> int:
        """Entries of the index that hold text: documents, or, in a packed source, documents and parts of long ones."""
        manifest = self.manifests[number]
        padding = 0 if manifest.packing is None else manifest.packing.padding_tokens  # each an entry of its own
        return sum(info.documents for info in manifest.shards) - padding

    def batches(self, number: int, share: Share = ALL) -> Iterator[Batch]:
        """The documents of a share's shards of a source."""
        return batches(self.folders[number], self.manifests[number], share, self._shards_before[number])

    def runs(self, share: Share) -> Iterator[tuple[int, int]]:
        """Numbers of the documents of a share, as ranges [first, after the last) in their order."""
        for number, manifest in enumerate(self.manifests):
            first = int(self.firsts[number])
            for at, info in enumerate(manifest.shards, self._shards_before[number]):
                if share.has_batch(at):
                    yield first, first + info.documents
                first += info.documents

    @staticmethod
    def read_part(file: BinaryIO, dtype: np.dtype[Any], count: int) -> np.ndarray:
        """The next values of a share's file.

        Raises:
            UserError: it ends before.
        """
        data = file.read(count * dtype.itemsize)
        if len(data) < count * dtype.itemsize:
            raise UserError(f"{file.name}: cut off; remove the folder it is in, and do its share again")
        return np.frombuffer(data, dtype)
