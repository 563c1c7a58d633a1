"""Where the tokens of a source lie: in which shards, in which documents."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_synth.data.shards.indexed import Shard
from megatron_synth.data.shards.selection import SelectedSource
from megatron_synth.data.shards.source import Source


@dataclass(frozen=True)
class Span:
    """Part of a window that lies in one shard."""

    shard: Shard
    documents_before: int
    """Documents of the source in the shards before."""
    begin: int
    """First token, of the shard."""
    end: int
    """Token after the last."""
    at: int
    """Where the part begins in the window."""


def spans(source: Source, begin: int, end: int) -> list[Span]:
    """Where the tokens [begin, end) of a source's stream lie. Opens the shards that hold them."""
    found: list[Span] = []
    if isinstance(source, SelectedSource):
        at = 0
        for _, number, first, count in source.pieces(begin, end):
            shard = source.shard(number)
            before = sum(info.documents for info in source.manifest.shards[:number]) if source.manifest else 0
            found.append(Span(Shard(shard.prefix), before, first, first + count, at))
            at += count
        return found
    if source.manifest is None:
        return [Span(Shard(source.path), 0, begin, end, 0)]
    tokens, documents = 0, 0
    for info in source.manifest.shards:
        first, last = max(begin, tokens), min(end, tokens + info.tokens)
        if first < last:
            found.append(Span(Shard(source.path / info.name), documents, first - tokens, last - tokens, first - begin))
        tokens, documents = tokens + info.tokens, documents + info.documents
    return found


def documents(span: Span) -> Iterator[tuple[int, int, int]]:
    """The documents of a span: number in its shard, first token there, token after the last."""
    edges = np.append(span.shard.document_starts(0, span.shard.num_tokens), span.shard.num_tokens).tolist()
    for number in range(max(0, bisect.bisect_right(edges, span.begin) - 1), bisect.bisect_left(edges, span.end)):
        yield number, edges[number], edges[number + 1]


def described(source: Source, begin: int, end: int) -> str:
    """The tokens [begin, end) of a source in words: `data/web/shard-00000.bin, documents 3 to 5`."""
    parts = []
    for span in spans(source, begin, end):
        numbers = [span.documents_before + number for number, *_ in documents(span)]
        which = f"document {numbers[0]}" if len(numbers) == 1 else f"documents {numbers[0]} to {numbers[-1]}"
        parts.append(f"{span.shard.bin_path}, {which}")
    return "; ".join(parts)
