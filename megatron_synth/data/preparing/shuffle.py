"""A shuffle of all documents of a source that never holds them in memory.

Each document gets a 64-bit key, a hash of the seed and of its place in the input; the shuffled order is that of the keys.
Workers write token runs sorted by key. The keys are cut into ranges ("buckets") that fit in memory, and a shard is made bucket
by bucket: its documents are read from all token runs, one contiguous part of each, and sorted. The bytes depend on the
seed and on the input alone.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_synth.data.preparing.token_runs import TokenRun

ValuesOf = Callable[[TokenRun, np.ndarray], np.ndarray]

BUCKET_BYTES = 32 * 2**20  # of tokens, about: a shard needs a few times that in memory
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def document_keys(seed: int, target: str, split: int, places: np.ndarray) -> np.ndarray:
    """Sort keys uint64 [N] of the documents at `places` [N] of a split.

    SplitMix64 (G. Steele, D. Lea, C. Flood 2014): the finaliser of a counter that starts at a hash of all else.
    """
    digest = hashlib.blake2b(f"{seed}\0{target}\0{split}".encode(), digest_size=8).digest()
    state = np.uint64(int.from_bytes(digest, "little"))
    with np.errstate(over="ignore"):
        mixed = state + (places.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        shuffled: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return shuffled


def bucket_count(tokens: int, itemsize: int) -> int:
    """Buckets for so many tokens."""
    return max(1, -(-tokens * itemsize // BUCKET_BYTES))


def bucket_lengths(runs: Sequence[TokenRun], bucket: int, buckets: int) -> np.ndarray:
    """Lengths [N] of the documents of a bucket in shuffled order; reads no tokens."""
    records = np.concatenate([_records(run, bucket, buckets)[["length", "key"]] for run in runs])
    lengths: np.ndarray = records["length"][np.argsort(records["key"], kind="stable")]
    return lengths


def read_bucket(
    runs: Sequence[TokenRun], dtype: np.dtype[Any], bucket: int, buckets: int, values_of: ValuesOf | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Tokens [T] and lengths [N] of the documents of a bucket in shuffled order, and what `values_of` tells of each.

    Last, bool [T], which tokens are learned; None where the runs do not say.

    values_of: given a token run and records of it, structured [N].
    """
    parts = [_records(run, bucket, buckets) for run in runs]
    found = np.concatenate([part[["length", "start", "key"]] for part in parts])
    stored, filled = np.empty(int(found["length"].sum(dtype=np.int64)), dtype), 0
    masked = any(run.masked for run in runs)
    learned = np.empty(stored.size if masked else 0, np.bool_)
    for run, records in zip(runs, parts, strict=True):
        if records.size:
            begin, end = int(records["start"][0]), int(records["start"][-1] + records["length"][-1])
            stored[filled : filled + end - begin] = run.read_tokens(dtype, begin, end)
            if masked:
                learned[filled : filled + end - begin] = run.read_learned(dtype, begin, end)
            filled += end - begin
    order = np.argsort(found["key"], kind="stable")
    starts = (np.cumsum(found["length"], dtype=np.int64) - found["length"])[order]
    lengths: np.ndarray = found["length"][order]
    values = None
    if values_of is not None:
        values = np.concatenate([values_of(run, records) for run, records in zip(runs, parts, strict=True)])[order]
    return gather(stored, starts, lengths), lengths, values, gather(learned, starts, lengths) if masked else None


def gather(stored: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The slices stored[start : start + length], one after the other."""
    out, filled = np.empty(int(lengths.sum(dtype=np.int64)), stored.dtype), 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        out[filled : filled + length] = stored[start : start + length]
        filled += length
    return out


def _records(run: TokenRun, bucket: int, buckets: int) -> np.ndarray:
    """What is known of the documents of a bucket in a token run, where they stand together: it is in order of the keys."""
    records = run.mapped_records()
    keys = records["key"]

    def first(limit: int) -> int:
        return bisect_left(range(run.documents), limit, key=lambda at: int(keys[at]))

    bounds = [-(-(edge << 64) // buckets) for edge in (bucket, bucket + 1)]
    return np.array(records[first(bounds[0]) : first(bounds[1])])
