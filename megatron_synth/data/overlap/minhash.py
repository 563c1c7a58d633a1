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

from megatron_synth.core.share import Share
from megatron_synth.data.overlap import contamination
from megatron_synth.data.overlap.contamination import Contamination
from megatron_synth.data.overlap.ngrams import ALL, Batch, hashes, mix
from megatron_synth.data.overlap.sources import Sources

BINS, BANDS = 64, 16
ROWS = BINS // BANDS
PARTITION_BYTES = 32 * 2**20
BLOCK = 2**18  # documents looked at in a row
COMPARED = 2**14  # pairs compared at a time: each may touch a page of signatures, and another one
RECORD = np.dtype([("hash", np.uint64), ("document", np.int64)])
SIGNATURES, SEEN = "signatures", "seen"


@dataclass(frozen=True)
class Settings:
    """What is compared, and in parts of how many bytes of records; see `find_duplicates`."""

    shingle: int
    threshold: float
    ngram: int
    part_bytes: int


@dataclass(frozen=True)
class Shared:
    """Documents of `source` that `other` holds too; within a source (source == other): those that occur again."""

    source: str
    other: str
    documents: int
    exact: int
    near: int


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


def find_duplicates(
    folders: Sequence[Path],
    *,
    shingle: int = 8,
    threshold: float = 0.8,
    ngram: int = 13,
    part_bytes: int | None = None,
) -> Duplicates:
    """Compare prepared sources with each other and with themselves.

    Args:
        folders: each with a manifest.json, all of one tokenizer.
        shingle: tokens of the n-grams that near duplicates are judged by.
        threshold: least Jaccard similarity of near duplicates.
        ngram: tokens of the n-grams that count as seen in training.
        part_bytes: of the records that are sorted at a time. Default: PARTITION_BYTES.
    """
    sources = Sources(folders)
    settings = Settings(shingle, threshold, ngram, part_bytes or PARTITION_BYTES)
    with tempfile.TemporaryDirectory(prefix="megatron-synth-duplicates-") as temporary:
        gather(sources, settings, ALL, Path(temporary))
        return join(sources, settings, [Path(temporary)], Path(temporary), keep=False)


def gather(sources: Sources, settings: Settings, share: Share, folder: Path) -> None:
    """Read the documents of a share once, and write what is to be compared of them to files in a folder."""
    equal = _Spill(folder, "equal", sources.total, settings.part_bytes)
    bands = _Spill(folder, "bands", sources.total * BANDS, settings.part_bytes)
    with open(folder / SIGNATURES, "wb") as file:
        for source in range(len(sources.names)):
            for batch in sources.batches(source, share):
                numbers = int(sources.firsts[source]) + batch.first + np.arange(batch.starts.size)
                spans = zip(batch.starts.tolist(), batch.ends.tolist(), strict=True)
                digests = [xxhash.xxh3_64_intdigest(batch.tokens[begin:end].data) for begin, end in spans]
                text = batch.ends > batch.starts
                equal.add(np.array(digests, np.uint64)[text], numbers[text])
                rows, values = minhash(batch, settings.shingle)
                signatures = np.zeros((numbers.size, BINS), np.uint16)
                signatures[rows] = (values & np.uint64(0xFFFF)).astype(np.uint16)
                file.write(signatures.data)
                bands.add(np.concatenate([_band(values, band) for band in range(BANDS)]), np.tile(numbers[rows], BANDS))
    contamination.look(sources, settings.ngram, share, folder / SEEN)


def join(sources: Sources, settings: Settings, shares: Sequence[Path], temporary: Path, *, keep: bool = True) -> Duplicates:
    """Compare what all shares have gathered.

    Args:
        sources: the same ones.
        settings: the same ones.
        shares: folders of share 0, 1, ... of so many.
        temporary: for files that are not kept.
        keep: what shares have gathered; otherwise it is removed as soon as it has been looked at.

    Raises:
        UserError: what a share has gathered is not whole.
    """
    seen = _Column(temporary / "all-signatures", np.dtype(np.uint16), sources.total, BINS)
    for number, folder in enumerate(shares):  # each has those of its own documents, one after the other
        with open(folder / SIGNATURES, "rb") as file:
            for first, last in sources.runs(Share(number, len(shares))):
                for begin in range(first, last, BLOCK):
                    end = min(begin + BLOCK, last)
                    values = sources.read_part(file, np.dtype(np.uint16), (end - begin) * BINS)
                    seen.values[begin:end] = values.reshape(-1, BINS)
                    seen.release()
        if not keep:
            (folder / SIGNATURES).unlink()
    exact_marks, near_marks = (_Column(temporary / name, np.dtype(np.uint64), sources.total) for name in ("exact", "near"))
    redundant = 0
    for documents, starts in _groups(shares, "equal", sources.total, settings.part_bytes, keep):
        redundant += documents.size - starts.size
        _mark_groups(documents, starts, sources.firsts, exact_marks.values)
        exact_marks.release()
    for documents, starts in _groups(shares, "bands", sources.total * BANDS, settings.part_bytes, keep):
        for one, two, of_one, of_two in _alike(documents, starts, sources.firsts, seen.values, settings.threshold):
            np.bitwise_or.at(near_marks.values, one, of_two)
            np.bitwise_or.at(near_marks.values, two, of_one)
            near_marks.release()
            seen.release()
    found = []
    for source, name in enumerate(sources.names):
        own = range(int(sources.firsts[source]), int(sources.firsts[source + 1]))
        exact, near = (_count_bits(marks, own, len(sources.names)) for marks in (exact_marks, near_marks))
        for other, other_name in enumerate(sources.names):
            found.append(Shared(name, other_name, sources.documents(source), exact[other], near[other]))
    return Duplicates(
        sources={name: sources.documents(number) for number, name in enumerate(sources.names)},
        redundant=redundant,
        shingle=settings.shingle,
        threshold=settings.threshold,
        ngram=settings.ngram,
        shared=tuple(found),
        contamination=tuple(contamination.count(sources, settings.ngram, [folder / SEEN for folder in shares])),
    )


# ---- equal and nearly equal documents


class _Spill:
    """Records by hash, in files small enough to be looked at one by one."""

    def __init__(self, folder: Path, name: str, records: int, part_bytes: int):
        self._paths = [folder / f"{name}-{number}" for number in range(_parts(records, part_bytes))]

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


def _parts(records: int, part_bytes: int) -> int:
    """How many files records of all shares are in, of about so many bytes each."""
    return max(1, -(-records * RECORD.itemsize // part_bytes))


def _groups(
    shares: Sequence[Path], name: str, most: int, part_bytes: int, keep: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each file of all shares: documents sorted by hash, then number, and where runs of one hash start; no runs of one."""
    for part in range(_parts(most, part_bytes)):
        files = [file for file in (folder / f"{name}-{part}" for folder in shares) if file.exists()]
        if not files:
            continue
        found = [np.fromfile(file, RECORD) for file in files]
        for file in files if not keep else ():
            file.unlink()
        records = np.concatenate(found)
        del found
        records = records[np.lexsort((records["document"], records["hash"]))]
        same = np.concatenate([[False], records["hash"][1:] == records["hash"][:-1], [False]])
        records = records[same[:-1] | same[1:]]
        values = records["hash"]
        yield records["document"], np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: values.size])


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


def _alike(
    documents: np.ndarray, starts: np.ndarray, firsts: np.ndarray, signatures: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Compare each document of a run with the first one of each source in it.

    Yields pairs that are alike, documents [N] and [N], and the sources of both as bits, uint64 [N] and [N].
    """
    if not documents.size:
        return
    sources = np.searchsorted(firsts, documents, side="right") - 1
    sizes = np.diff(np.append(starts, documents.size))
    nowhere = np.iinfo(np.int64).max
    for source in np.unique(sources).tolist():
        first = np.minimum.reduceat(np.where(sources == source, documents, nowhere), starts)
        partner = np.repeat(first, sizes)
        wanted = np.flatnonzero((partner != nowhere) & (partner != documents))
        for begin in range(0, wanted.size, COMPARED):
            part = wanted[begin : begin + COMPARED]
            alike = np.mean(signatures[documents[part]] == signatures[partner[part]], axis=1) >= threshold
            own = np.uint64(1) << sources[part[alike]].astype(np.uint64)
            yield documents[part[alike]], partner[part[alike]], own, np.full(own.size, 1 << source, np.uint64)
