"""How much prepared sources share: equal documents, nearly equal ones, and validation text that training has seen.

All of it is read from the tokens. Memory is bounded: records of documents go to files by their hash, and each file is
looked at alone; what is known of single documents lies in files, too, whose mapped pages are given back after each.

A document of a packed source that is longer than a window lies there as two, its whole windows and its rest; padding is
left out.

exact  documents of the same tokens (64-bit XXH3).
near   documents whose sets of n-grams have a Jaccard similarity of at least a threshold, estimated by MinHash
       (A. Broder 1997) in one permutation with densification (A. Shrivastava 2017 for the family), `BINS` values, and
       found by locality-sensitive hashing in `BANDS` bands. Documents of a band are compared with the first one of each
       source in it, so that common boilerplate costs no square; counts are thus lower bounds.
seen   validation documents with an n-gram, of more tokens, that a training source holds, too.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_synth.config.errors import UserError
from megatron_synth.data.overlap.ngrams import Batch, batches, hashes, mix
from megatron_synth.data.shards.manifest import FILE_NAME, Manifest

BINS, BANDS = 64, 16
ROWS = BINS // BANDS
MOST_SOURCES = 64  # a document's marks are one bit per source
PARTITION_BYTES = 32 * 2**20
BLOCK = 2**18  # documents compared at a time
VALIDATION_NGRAMS = 2**22  # looked for in one reading of the training sources; each takes 40 bytes while they are sorted
FILTER_BITS = 26
RECORD = np.dtype([("hash", np.uint64), ("document", np.int64)])


@dataclass(frozen=True)
class Shared:
    """Documents of `source` that `other` holds too; within a source (source == other): those that occur again."""

    source: str
    other: str
    documents: int
    exact: int
    near: int


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


@dataclass(frozen=True)
class Duplicates:
    """The report. redundant: documents to remove so that none occurs twice in all sources together."""

    sources: dict[str, int]
    redundant: int
    shingle: int
    threshold: float
    ngram: int
    shared: tuple[Shared, ...]
    contamination: tuple[Contamination, ...]


def find_duplicates(folders: Sequence[Path], *, shingle: int = 8, threshold: float = 0.8, ngram: int = 13) -> Duplicates:
    """Compare prepared sources with each other and with themselves.

    Args:
        folders: each with a manifest.json, all of one tokenizer.
        shingle: tokens of the n-grams that near duplicates are judged by.
        threshold: least Jaccard similarity of near duplicates.
        ngram: tokens of the n-grams that count as seen in training.
    """
    if len(folders) > MOST_SOURCES:
        raise UserError(f"{len(folders)} sources, at most {MOST_SOURCES} are compared at a time")
    manifests = [Manifest.load(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.tokenizer.fingerprint != manifests[0].tokenizer.fingerprint:
            raise UserError(
                f"{folder / FILE_NAME}: made with another tokenizer than {folders[0]}: the same text has other tokens; "
                f"prepare both with one tokenizer"
            )
    names = [manifest.name for manifest in manifests]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    counts = [_documents_of(manifest) for manifest in manifests]
    with tempfile.TemporaryDirectory(prefix="megatron-synth-duplicates-") as temporary:
        shared, redundant = _documents(Path(temporary), folders, manifests, names, shingle, threshold)
    contamination = [
        found
        for at, manifest in enumerate(manifests)
        if manifest.split == "validation"
        for found in _contamination(at, folders, manifests, names, ngram)
    ]
    return Duplicates(
        sources=dict(zip(names, counts, strict=True)),
        redundant=redundant,
        shingle=shingle,
        threshold=threshold,
        ngram=ngram,
        shared=tuple(shared),
        contamination=tuple(contamination),
    )


def _documents_of(manifest: Manifest) -> int:
    """Entries of the index that hold text: documents, or, in a packed source, documents and parts of long ones."""
    padding = 0 if manifest.packing is None else manifest.packing.padding_tokens  # each an entry of its own
    return sum(info.documents for info in manifest.shards) - padding


# ---- equal and nearly equal documents


class _Spill:
    """Records by hash, in files small enough to be looked at one by one."""

    def __init__(self, folder: Path, name: str, records: int):
        count = max(1, -(-records * RECORD.itemsize // PARTITION_BYTES))
        self._paths = [folder / f"{name}-{number}" for number in range(count)]

    def add(self, values: np.ndarray, documents: np.ndarray) -> None:
        records = np.empty(values.size, RECORD)
        records["hash"], records["document"] = values, documents
        if len(self._paths) == 1:
            parts = np.zeros(values.size, np.int64)
        else:
            parts = (values % np.uint64(len(self._paths))).astype(np.int64)
        order = np.argsort(parts, kind="stable")
        bounds = np.searchsorted(parts[order], np.arange(len(self._paths) + 1))
        for path, first, last in zip(self._paths, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if last > first:
                with open(path, "ab") as file:
                    file.write(records[order[first:last]].tobytes())

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each file: documents sorted by hash, then number, and where runs of one hash start; runs of one are left out."""
        for path in self._paths:
            if not path.exists():
                continue
            records = np.fromfile(path, RECORD)
            path.unlink()
            records = records[np.lexsort((records["document"], records["hash"]))]
            same = np.concatenate([[False], records["hash"][1:] == records["hash"][:-1], [False]])
            records = records[same[:-1] | same[1:]]
            values = records["hash"]
            yield records["document"], np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: values.size])


def _documents(
    temporary: Path,
    folders: Sequence[Path],
    manifests: Sequence[Manifest],
    names: Sequence[str],
    shingle: int,
    threshold: float,
) -> tuple[list[Shared], int]:
    counts = [_documents_of(manifest) for manifest in manifests]
    sizes = [sum(info.documents for info in manifest.shards) for manifest in manifests]
    total = sum(sizes)
    firsts = np.cumsum([0, *sizes])
    equal, bands = _Spill(temporary, "equal", total), _Spill(temporary, "bands", total * BANDS)
    with open(temporary / "signatures", "wb") as file:
        for source, (folder, manifest) in enumerate(zip(folders, manifests, strict=True)):
            for batch in batches(folder, manifest):
                numbers = firsts[source] + batch.first + np.arange(batch.starts.size)
                spans = zip(batch.starts.tolist(), batch.ends.tolist(), strict=True)
                digests = [xxhash.xxh3_64_intdigest(batch.tokens[begin:end].data) for begin, end in spans]
                text = batch.ends > batch.starts
                equal.add(np.array(digests, np.uint64)[text], numbers[text])
                rows, values = minhash(batch, shingle)
                signatures = np.zeros((numbers.size, BINS), np.uint16)
                signatures[rows] = (values & np.uint64(0xFFFF)).astype(np.uint16)
                file.write(signatures.data)
                bands.add(np.concatenate([_band(values, band) for band in range(BANDS)]), np.tile(numbers[rows], BANDS))

    seen = _Column(temporary / "signatures", np.dtype(np.uint16), total, BINS)
    exact_marks, near_marks = (_Column(temporary / name, np.dtype(np.uint64), total) for name in ("exact", "near"))
    redundant = 0
    for documents, starts in equal.groups():
        redundant += documents.size - starts.size
        _mark_groups(documents, starts, firsts, exact_marks.values)
        exact_marks.release()
    for documents, starts in bands.groups():
        _mark_near(documents, starts, firsts, seen.values, threshold, near_marks.values)
        near_marks.release()
        seen.release()
    found = []
    for source, name in enumerate(names):
        own = range(int(firsts[source]), int(firsts[source + 1]))
        exact, near = (_count_bits(marks, own, len(names)) for marks in (exact_marks, near_marks))
        for other, other_name in enumerate(names):
            found.append(Shared(name, other_name, counts[source], exact[other], near[other]))
    return found, redundant


class _Column:
    """What is known of each document, in a file, mapped. values: [N] or [N, width]."""

    def __init__(self, path: Path, dtype: np.dtype[Any], documents: int, width: int = 1):
        size = max(documents, 1) * width * dtype.itemsize
        with open(path, "ab") as file:
            file.truncate(size)  # what was not written is 0
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        values = np.frombuffer(self._map, dtype)
        self.values: np.ndarray = values if width == 1 else values.reshape(-1, width)

    def release(self) -> None:
        """Give back the pages that were touched; what was written in them stays in the file."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _count_bits(marks: _Column, documents: range, bits: int) -> list[int]:
    """How many of the documents have each bit set."""
    counts = [0] * bits
    for begin in range(documents.start, documents.stop, BLOCK):
        part = marks.values[begin : min(begin + BLOCK, documents.stop)]
        for bit in range(bits):
            counts[bit] += int(np.count_nonzero(part & np.uint64(1 << bit)))
        marks.release()
    return counts


def minhash(batch: Batch, shingle: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N] of the documents with an n-gram and their MinHash values uint64 [N, BINS].

    Each hash falls into a bin by its upper bits, and a bin keeps its least. An empty bin takes the value of the next one
    that is not, changed by the distance.
    """
    values, rows = hashes(batch, shingle)
    flat = np.full(batch.starts.size * BINS, np.iinfo(np.uint64).max, np.uint64)
    at = rows * BINS + (values >> np.uint64(64 - BINS.bit_length() + 1)).astype(np.int64)
    np.minimum.at(flat, at, values)
    present = np.unique(rows)
    bins = flat.reshape(-1, BINS)[present]
    filled = bins != np.iinfo(np.uint64).max
    places = np.arange(2 * BINS)
    following = np.where(np.concatenate([filled, filled], axis=1), places, 2 * BINS)
    following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1][:, :BINS]
    distance = (following - places[:BINS]).astype(np.uint64)
    taken = np.take_along_axis(bins, following % BINS, axis=1)
    return present, mix(taken ^ mix(distance))


def _band(values: np.ndarray, band: int) -> np.ndarray:
    """One hash of the rows of a band [N]; bands differ, so that they do not meet."""
    total = np.full(values.shape[0], band, np.uint64)
    for row in range(band * ROWS, (band + 1) * ROWS):
        total = mix(total ^ values[:, row])
    return total


def _mark_groups(documents: np.ndarray, starts: np.ndarray, firsts: np.ndarray, marks: np.ndarray) -> None:
    """Mark each document of a run with the sources of the others in it."""
    if not documents.size:
        return
    sources = np.searchsorted(firsts, documents, side="right") - 1
    sizes = np.diff(np.append(starts, documents.size))
    for source in np.unique(sources).tolist():
        there = np.repeat(np.add.reduceat((sources == source).astype(np.int64), starts), sizes)
        others = there - (sources == source)
        marks[documents[others > 0]] |= np.uint64(1 << source)


def _mark_near(
    documents: np.ndarray,
    starts: np.ndarray,
    firsts: np.ndarray,
    signatures: np.ndarray,
    threshold: float,
    marks: np.ndarray,
) -> None:
    """Compare each document of a run with the first one of each source in it, and mark both."""
    if not documents.size:
        return
    sources = np.searchsorted(firsts, documents, side="right") - 1
    sizes = np.diff(np.append(starts, documents.size))
    nowhere = np.iinfo(np.int64).max
    for source in np.unique(sources).tolist():
        first = np.minimum.reduceat(np.where(sources == source, documents, nowhere), starts)
        partner = np.repeat(first, sizes)
        wanted = np.flatnonzero((partner != nowhere) & (partner != documents))
        for begin in range(0, wanted.size, BLOCK):
            part = wanted[begin : begin + BLOCK]
            alike = np.mean(signatures[documents[part]] == signatures[partner[part]], axis=1) >= threshold
            one, two = documents[part[alike]], partner[part[alike]]
            np.bitwise_or.at(marks, one, np.uint64(1 << source))
            np.bitwise_or.at(marks, two, np.uint64(1) << sources[part[alike]].astype(np.uint64))


# ---- validation text that training has seen


def _contamination(
    validation: int, folders: Sequence[Path], manifests: Sequence[Manifest], names: Sequence[str], ngram: int
) -> Iterator[Contamination]:
    training = [at for at, manifest in enumerate(manifests) if manifest.split == "train"]
    if not training:
        return
    documents = ngrams = 0
    any_seen, half_seen, seen_ngrams = (np.zeros(len(training), np.int64) for _ in range(3))
    held: list[tuple[np.ndarray, np.ndarray]] = []
    size = base = 0

    def look() -> None:
        nonlocal documents, ngrams
        values = np.concatenate([one for one, _ in held])
        rows = np.concatenate([one for _, one in held])
        held.clear()
        wanted, where = _unique(values)
        ngrams += values.size
        del values
        starts = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))  # documents come one after the other
        per_document = np.diff(np.append(starts, rows.size))
        documents += per_document.size
        for number, at in enumerate(training):
            hits = np.add.reduceat(_seen(wanted, folders[at], manifests[at], ngram)[where], starts, dtype=np.int64)
            any_seen[number] += np.count_nonzero(hits)
            half_seen[number] += np.count_nonzero(2 * hits >= per_document)
            seen_ngrams[number] += hits.sum()

    for batch in batches(folders[validation], manifests[validation]):
        values, rows = hashes(batch, ngram)
        held.append((values, (rows + base).astype(np.int32)))
        base += batch.starts.size
        size += values.size
        if size >= VALIDATION_NGRAMS:
            look()
            size = base = 0
    if size:
        look()
    for number, at in enumerate(training):
        yield Contamination(
            validation=names[validation],
            training=names[at],
            documents=documents,
            any=int(any_seen[number]),
            half=int(half_seen[number]),
            ngrams=ngrams,
            ngrams_seen=int(seen_ngrams[number]),
        )


def _unique(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values, sorted, and of each value which one it is, int32 [N]: np.unique in less memory."""
    order = np.argsort(values)
    in_order = values[order]
    new = np.concatenate([[True], in_order[1:] != in_order[:-1]])
    where = np.empty(values.size, np.int32)
    where[order] = np.cumsum(new, dtype=np.int32) - 1
    return in_order[new], where


def _seen(wanted: np.ndarray, folder: Path, manifest: Manifest, ngram: int) -> np.ndarray:
    """Which of the sorted hashes `wanted` [M] occur in a source, bool [M]."""
    found = np.zeros(wanted.size, bool)
    shift = np.uint64(64 - FILTER_BITS)
    likely = np.zeros(1 << FILTER_BITS, bool)
    likely[wanted >> shift] = True
    for batch in batches(folder, manifest):
        values, _ = hashes(batch, ngram)
        values = values[likely[values >> shift]]
        at = np.minimum(np.searchsorted(wanted, values), wanted.size - 1)
        found[at[wanted[at] == values]] = True
    return found
