"""How large the splits are that workers read at a time, and text that the parent has read cut into them.

Plain line files are cut at byte ranges and parquet files at row groups; large compressed files, data sets of the
`datasets` library and the built-in corpus can only be read from their start, so the parent reads them and hands out
text. How a source is cut depends on its files alone, not on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_synth.data.preparing.readers.documents import BadRecord, Document, Place
from megatron_synth.data.preparing.readers.reader import InputSplit

SMALL_SPLIT = 2**19
SPLIT_BYTES = 16 * 2**20
MOST_SPLITS = 4096  # larger sources get larger splits, so that a shuffle reads them in parts worth a disk access
STREAMED_BYTES = 8 * 2**20  # of a split that the parent reads: several are in memory at once
STREAMED_ABOVE = 16 * 2**20  # a compressed file of this size is worth the work of many, unless there are many of them
MANY_FILES = 32


def split_bytes(total: int) -> int:
    """Bytes of a split of files that are so large together."""
    return max(min(max(total // 64, SMALL_SPLIT), SPLIT_BYTES), total // MOST_SPLITS)


def growing(total: int) -> int:
    """Bytes of the next split after so many; small ones first, so that a small source, too, keeps all workers busy."""
    return min(max(total // 64, SMALL_SPLIT), STREAMED_BYTES)


def splits_of_documents(found: Iterable[Document | BadRecord]) -> Iterator[InputSplit]:
    """Documents that the parent has read."""
    held: list[Document | BadRecord] = []
    size = total = 0
    for one in found:
        held.append(one)
        size += len(one.text) if isinstance(one, Document) else 0
        if size >= growing(total):
            yield InputSplit(documents=tuple(held))
            held, total, size = [], total + size, 0
    if held:
        yield InputSplit(documents=tuple(held))


def lines_of(place: Place, data: bytes) -> Iterator[tuple[Place, bytes]]:
    """The lines of a part of a file; `place` is the line before the first."""
    lines: Sequence[bytes] = data.splitlines(keepends=True) if b"\r" not in data else _newlines(data)
    for line in lines:
        place.number += 1
        yield place, line


def _newlines(data: bytes) -> list[bytes]:
    """Lines that end in a newline only, as files give them."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]] + ([data.rsplit(b"\n", 1)[-1]] if data[-1:] != b"\n" else [])
