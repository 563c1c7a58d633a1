"""Validation text that training has seen: n-grams of validation documents that a training source holds, too.

The n-grams of a validation source are looked at in rounds of so many that their hashes fit into memory, and the training
sources are read once for each round. In shares each reads its own shards of them; which hashes it met is one bit each, and the
bits of all shares together say what one reading of all would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_synth.core.share import Share
from megatron_synth.data.overlap.ngrams import batches, hashes
from megatron_synth.data.overlap.sources import Sources

VALIDATION_NGRAMS = 2**22  # looked for in one reading of the training sources; each takes 40 bytes while they are sorted
FILTER_BITS = 26


@dataclass(frozen=True)
class Contamination:
    """Of validation source `validation` against training source `training`.

    documents: those of at least one n-gram; any: with an n-gram seen in training; half: with at least half of them.
    """

    validation: str
    training: str
    documents: int
    any: int
    half: int
    ngrams: int
    ngrams_seen: int


@dataclass(frozen=True, eq=False)
class _Round:
    """Some n-grams of a validation source.

    wanted: their different hashes [M], sorted; where: of each n-gram [N] which of them; starts: first n-gram of each document.
    """

    wanted: np.ndarray
    where: np.ndarray
    starts: np.ndarray


def look(sources: Sources, ngram: int, share: Share, file: Path) -> None:
    """Write for each round and training source which hashes the share's shards hold, a bit each."""
    with open(file, "wb") as out:
        for validation in sources.of_split("validation"):
            for one in _rounds(sources, validation, ngram):
                for training in sources.of_split("train"):
                    out.write(np.packbits(_seen(one.wanted, sources, training, ngram, share)).tobytes())
                del one  # before the next is made


def count(sources: Sources, ngram: int, files: Sequence[Path]) -> Iterator[Contamination]:
    """What the shares that wrote `files` have found together.

    Raises:
        UserError: a file is not whole.
    """
    training = sources.of_split("train")
    readers = [open(file, "rb") for file in files]  # noqa: SIM115 (closed below)
    try:
        for validation in sources.of_split("validation") if training else []:
            documents = ngrams = 0
            any_seen, half_seen, seen_ngrams = (np.zeros(len(training), np.int64) for _ in range(3))
            for one in _rounds(sources, validation, ngram):
                per_document = np.diff(np.append(one.starts, one.where.size))
                documents += per_document.size
                ngrams += one.where.size
                size = -(-one.wanted.size // 8)
                for number in range(len(training)):
                    bits = np.zeros(size, np.uint8)
                    for reader in readers:
                        bits |= sources.read_part(reader, np.dtype(np.uint8), size)
                    found = np.unpackbits(bits, count=one.wanted.size).view(bool)
                    hits = np.add.reduceat(found[one.where], one.starts, dtype=np.int64)
                    any_seen[number] += np.count_nonzero(hits)
                    half_seen[number] += np.count_nonzero(2 * hits >= per_document)
                    seen_ngrams[number] += hits.sum()
                del one, per_document, bits, found, hits  # before the next is made
            for number, at in enumerate(training):
                yield Contamination(
                    validation=sources.names[validation],
                    training=sources.names[at],
                    documents=documents,
                    any=int(any_seen[number]),
                    half=int(half_seen[number]),
                    ngrams=ngrams,
                    ngrams_seen=int(seen_ngrams[number]),
                )
    finally:
        for reader in readers:
            reader.close()


def _rounds(sources: Sources, validation: int, ngram: int) -> Iterator[_Round]:
    held: list[tuple[np.ndarray, np.ndarray]] = []
    size = base = 0
    for batch in batches(sources.folders[validation], sources.manifests[validation]):
        values, rows = hashes(batch, ngram)
        held.append((values, (rows + base).astype(np.int32)))
        base += batch.starts.size
        size += values.size
        if size >= VALIDATION_NGRAMS:
            yield _round(held)
            held, size, base = [], 0, 0
    if size:
        yield _round(held)


def _round(held: list[tuple[np.ndarray, np.ndarray]]) -> _Round:
    values = np.concatenate([one for one, _ in held])
    rows = np.concatenate([one for _, one in held])
    held.clear()
    starts = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))  # documents come one after the other
    return _Round(*_unique(values), starts)


def _unique(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values, sorted, and of each value which one it is, int32 [N]: np.unique in less memory."""
    order = np.argsort(values)
    in_order = values[order]
    new = np.concatenate([[True], in_order[1:] != in_order[:-1]])
    where = np.empty(values.size, np.int32)
    where[order] = np.cumsum(new, dtype=np.int32) - 1
    return in_order[new], where


def _seen(wanted: np.ndarray, sources: Sources, training: int, ngram: int, share: Share) -> np.ndarray:
    """Which of the sorted hashes `wanted` [M] occur in the share's shards of a source, bool [M]."""
    found = np.zeros(wanted.size, bool)
    shift = np.uint64(64 - FILTER_BITS)
    likely = np.zeros(1 << FILTER_BITS, bool)
    likely[wanted >> shift] = True
    for batch in sources.batches(training, share):
        values, _ = hashes(batch, ngram)
        values = values[likely[values >> shift]]
        at = np.minimum(np.searchsorted(wanted, values), wanted.size - 1)
        found[at[wanted[at] == values]] = True
    return found
