"""Where the documents of a shard begin, found for many stretches of it at once."""

from __future__ import annotations

import ctypes

import numpy as np

from megatron_synth.data.shards import native

SAMPLED = 4096
"""Documents of a shard whose place is kept in memory."""
SAMPLED_OF_MANY = 512
"""The same where a source has many shards: between two of them lies about a page of the file."""


class DocumentIndex:
    """Finds the documents of stretches of a shard, many stretches at once.

    The arrays lie in the file at odd addresses, where numpy's own search would first copy them whole. A sample of the
    first tokens of the documents, `SAMPLED` of them, is kept instead; between two of them a binary search goes on in the
    file. Compiled code does it row by row, numpy for all stretches in step.
    """

    def __init__(
        self,
        content: np.ndarray,
        at: int,
        num_sequences: int,
        document_entries: int,
        num_tokens: int,
        token_bytes: int,
        sampled: int = SAMPLED,
    ):
        """What the index file says.

        Args:
            content: uint8, the file.
            at: where the byte offsets of the sequences begin in it; the first sequences of the documents follow.
            num_sequences: how many of the former.
            document_entries: how many of the latter, one more than documents.
            num_tokens: of the shard.
            token_bytes: bytes of a token.
            sampled: documents whose place is kept in memory.

        Raises:
            BusError: the file could not be read.
        """
        self.content = content
        pointers = np.frombuffer(content, np.int64, num_sequences, at)
        documents = np.frombuffer(content, np.int64, document_entries, at + pointers.nbytes)
        self._prepare(pointers, documents, max(document_entries - 1, 0), num_tokens, token_bytes, sampled)

    @classmethod
    def of_starts(cls, starts: np.ndarray, num_tokens: int) -> DocumentIndex:
        """Of documents that begin at `starts` [N], ascending, of a stream of so many tokens. int64, contiguous."""
        index = cls.__new__(cls)
        index.content = starts.view(np.uint8)
        index._prepare(starts, None, len(starts), num_tokens, 1)
        return index

    def _prepare(
        self,
        pointers: np.ndarray,
        documents: np.ndarray | None,
        entries: int,
        num_tokens: int,
        token_bytes: int,
        most: int = SAMPLED,
    ) -> None:
        """documents: None where each is one sequence."""
        self._pointers, self._documents = pointers, documents
        self._num_tokens, self._token_bytes, self._entries = num_tokens, token_bytes, entries
        self._step = -(-self._entries // most) or 1
        sampled = np.arange(0, self._entries, self._step)
        self._compiled = native.library()
        if self._compiled is None:
            self._sample = self._offsets(sampled)
            return
        self._sample = np.empty(len(sampled), np.int64)
        self._index = native.Index(
            native.address_of(self._pointers),
            None if documents is None else native.address_of(documents),
            len(pointers),
            self._entries,
            num_tokens,
            token_bytes,
            native.address_of(self._sample),
            len(sampled),
            self._step,
        )
        native.sample_documents(self._compiled, self.address)

    @property
    def address(self) -> int:
        """Where compiled code finds what it needs of this; 0 without such code."""
        return 0 if self._compiled is None else ctypes.addressof(self._index)

    def starts(self, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token offsets in the shard at which a document starts, for each of N stretches [begin, end), begin <= end.

        Returns all of them, stretch by stretch, and how many belong to each, int64 [N].

        Raises:
            BusError: the file could not be read.
        """
        if self._compiled is not None:
            first = np.zeros(len(begins), np.int64)
            offsets, counts = native.document_starts(self._compiled, [np.array([self.address])], first, first, begins, ends)
            return offsets + np.repeat(begins, counts), counts
        found = self._first_from(np.concatenate([begins, ends]))
        first, last = found[: len(begins)], found[len(begins) :]
        counts = last - first
        before = np.cumsum(counts) - counts
        entries = np.arange(int(counts.sum())) + np.repeat(first - before, counts)
        offsets = self._offsets(entries)
        # an empty document starts where the next one does: one start
        again = np.zeros(len(offsets), bool)
        again[1:] = offsets[1:] == offsets[:-1]
        if again.any():
            rows = np.repeat(np.arange(len(counts)), counts)
            again[1:] &= rows[1:] == rows[:-1]
            counts = np.bincount(rows[~again], minlength=len(counts))
            offsets = offsets[~again]
        return offsets, counts

    def containing(self, positions: np.ndarray) -> np.ndarray:
        """Of each token [N] of the shard the document that it is in, int64 [N].

        Raises:
            BusError: the file could not be read.
        """
        if self._compiled is not None:
            return native.first_documents(self._compiled, self.address, positions + 1) - 1
        return self._first_from(positions + 1) - 1

    def _first_from(self, positions: np.ndarray) -> np.ndarray:
        """Of each position, the first document that starts there or later: int64 [N]."""
        after = np.searchsorted(self._sample, positions)  # the first sampled one that does
        high = np.minimum(after * self._step, self._entries)
        low = np.maximum(after * self._step - self._step + 1, 0)
        for _ in range((self._step - 1).bit_length()):
            middle = (low + high) >> 1
            open_ = low < high
            later = self._offsets(np.minimum(middle, self._entries - 1)) >= positions
            high = np.where(open_ & later, middle, high)
            low = np.where(open_ & ~later, middle + 1, low)
        return high

    def _offsets(self, entries: np.ndarray) -> np.ndarray:
        """Token offset at which each of these documents starts."""
        sequences = entries if self._documents is None else self._documents[entries]
        # documents without a sequence at the end of the shard start where it ends
        beyond = sequences >= len(self._pointers)
        offsets = self._pointers[np.where(beyond, 0, sequences)] // self._token_bytes
        return np.where(beyond, self._num_tokens, offsets)
