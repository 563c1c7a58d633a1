"""Documents put into windows of S tokens so that few are cut: best fit decreasing.

A stream of documents that is cut every S tokens cuts nearly every window's last document in two. Here only a document
longer than S is cut, and only into whole windows and one rest; rests and shorter documents are then placed, longest
first, each into the fullest window that still has room for it (H. Ding et al., "Fewer Truncations Improve Language
Modeling", ICML 2024; at most 11/9 of the fewest possible windows, D. S. Johnson 1973). What stays free is filled with
end-of-document tokens, each a document of its own, so that a loss mask at document ends leaves them out.

The windows are those of the plain stream, so nothing of the loader changes: window w still begins at token w x S, and
which one a sample shows is still a function of its number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PADDING = -1


@dataclass(frozen=True, eq=False)
class Packed:
    """E entries in M bins; a bin is one window, or the whole windows of one long document."""

    documents: np.ndarray
    """int64 [E] which document an entry is a part of; PADDING: one token that only fills."""
    begins: np.ndarray
    """int64 [E] place of the entry's first token in its document."""
    lengths: np.ndarray
    """int64 [E] tokens of the entry."""
    bins: np.ndarray
    """int64 [M + 1] first entry of each bin, and E."""
    sizes: np.ndarray
    """int64 [M] tokens of each bin, multiples of S."""


def pack(lengths: np.ndarray, sequence_length: int) -> Packed:
    """Place documents of `lengths` [N] > 0 into windows. Depends on nothing else; equal lengths keep their order."""
    whole, rests = np.divmod(lengths.astype(np.int64), sequence_length)
    contents: list[list[int]] = []
    room: dict[int, list[int]] = {}  # bins by free tokens
    rooms = 0  # bit c: there is a bin with c free tokens
    free: list[int] = []
    order = np.argsort(-rests, kind="stable")
    for document, length in zip(order.tolist(), rests[order].tolist(), strict=True):
        if length == 0:
            break
        fitting = rooms >> length
        if fitting:
            capacity = length + (fitting & -fitting).bit_length() - 1
            bins = room[capacity]
            number = bins.pop()
            if not bins:
                rooms ^= 1 << capacity
            contents[number].append(document)
        else:
            capacity, number = sequence_length, len(contents)
            contents.append([document])
            free.append(0)
        left = free[number] = capacity - length
        if left:
            room.setdefault(left, []).append(number)
            rooms |= 1 << left
    long = np.flatnonzero(whole)
    packed = np.array([document for bin_ in contents for document in bin_], dtype=np.int64)
    padding = np.array(free, dtype=np.int64)
    members = np.array([len(bin_) for bin_ in contents], dtype=np.int64)
    documents = np.insert(packed, np.repeat(np.cumsum(members), padding), PADDING)
    rest_begins = np.where(documents == PADDING, 0, (whole * sequence_length)[documents])
    rest_lengths = np.where(documents == PADDING, 1, rests[documents])
    sizes = np.concatenate([whole[long] * sequence_length, np.full(len(contents), sequence_length)])
    entries = np.concatenate([np.ones(len(long), np.int64), members + padding])
    return Packed(
        documents=np.concatenate([long, documents]),
        begins=np.concatenate([np.zeros(len(long), np.int64), rest_begins]),
        lengths=np.concatenate([whole[long] * sequence_length, rest_lengths]),
        bins=np.concatenate([[0], np.cumsum(entries)]),
        sizes=sizes,
    )


def arrange(
    packed: Packed, first: int, last: int | None, tokens: np.ndarray, lengths: np.ndarray, eod: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [T], lengths [E] and documents [E] of the entries of bins [first, last), as `Packed` has them.

    From all tokens and lengths [N] of the documents.
    """
    last = len(packed.sizes) if last is None else last
    chosen = slice(int(packed.bins[first]), int(packed.bins[last]))
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    documents, sizes = packed.documents[chosen], packed.lengths[chosen]
    begins = np.where(documents == PADDING, PADDING, starts[documents] + packed.begins[chosen])
    out, filled = np.empty(int(sizes.sum()), tokens.dtype), 0
    for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
        out[filled : filled + size] = eod if begin == PADDING else tokens[begin : begin + size]
        filled += size
    return out, sizes, documents


def cut_documents(lengths: np.ndarray, sequence_length: int, offset: int = 0) -> int:
    """Documents of a plain stream that lie in more than one window; it begins `offset` tokens after a window's start."""
    ends = offset + np.cumsum(lengths, dtype=np.int64)
    return int(((ends - lengths) // sequence_length != (ends - 1) // sequence_length).sum())
