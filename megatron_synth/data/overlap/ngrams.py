"""Hashes of the n-grams of prepared documents, read in batches of whole documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.share import Share
from megatron_synth.data.shards.indexed import HEADER, Shard
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.open_files import AGAIN

ALL = Share(0, 1)
BATCH_TOKENS = 2**20  # a longer document is a batch of its own, and beyond LONGEST its rest is left out
BATCH_DOCUMENTS = 2**14  # what is kept of a document is larger than a short document
LONGEST = 2**22
_BASE = 0x9E3779B97F4A7C15  # odd, so that every power is invertible modulo 2^64


@dataclass(frozen=True)
class Batch:
    """Some documents of one shard. first: number of the first in its source; starts, ends: of each [N] in tokens [T].

    The end-of-document token is left out: it is no text.
    """

    first: int
    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def batches(folder: Path, manifest: Manifest, share: Share = ALL, shards_before: int = 0) -> Iterator[Batch]:
    """The documents of a prepared source in order. Files are read, not mapped: mapped pages of a shard would pile up.

    share: only of the shards in it, counted from `shards_before` on, as sources of a single shard are to be in different ones.

    Raises:
        UserError: a shard is not the manifest's, or cannot be read; it names file and byte.
    """
    number = 0
    for at, info in enumerate(manifest.shards, shards_before):
        if not share.has_batch(at):
            number += info.documents
            continue
        shard = Shard(folder / info.name)
        if (shard.num_tokens, shard.num_documents) != (info.tokens, info.documents):
            raise UserError(f"{shard.bin_path}: not the shard of its manifest; see `megatron-synth prepare verify`")
        begin = first = 0
        while first < info.documents:
            count = min(BATCH_DOCUMENTS, info.documents - first)
            ahead = np.cumsum(_read(shard.idx_path, np.dtype(np.int32), HEADER.size + 4 * first, count), dtype=np.int64)
            count = max(int(np.searchsorted(ahead, BATCH_TOKENS, side="right")), 1)
            ends = ahead[:count]
            starts = np.concatenate([[0], ends[:-1]])
            tokens = _read(shard.bin_path, shard.dtype, begin * shard.dtype.itemsize, int(ends[-1]))
            yield Batch(number, tokens, starts, np.maximum(ends - 1, starts))
            begin, first, number = begin + int(ends[-1]), first + count, number + count


def _read(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> np.ndarray:
    try:
        found = np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error} at byte {offset}; {AGAIN}") from None
    if found.size < count:
        raise UserError(f"{path}: {count * dtype.itemsize} bytes expected at byte {offset}, found {found.nbytes}; {AGAIN}")
    return found


def hashes(batch: Batch, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 [M] of all n-grams of `size` tokens within documents, and the row int64 [M] of their documents.

    The polynomial sum of r(t_j) B^(size - 1 - j) modulo 2^64 with r a mixing of the token id, by doubling: the hash of
    2m tokens is that of the first m times B^m plus that of the last m.
    """
    lengths = np.minimum(np.maximum(batch.ends - batch.starts, 0), LONGEST)
    counts = np.maximum(lengths - size + 1, 0)
    total = int(counts.sum())
    if total == 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    with np.errstate(over="ignore"):
        power = mix(batch.tokens[: int((batch.starts + lengths).max())].astype(np.uint64))  # of 1, 2, 4, ... tokens
        result: np.ndarray | None = None
        done, width = 0, 1
        while True:
            if size & width:
                if result is None:
                    result = power
                else:  # the lower bits of `size` come last
                    joined = power[: power.size - done] * _power(done)
                    at = min(joined.size, result.size - width)
                    result = joined[:at] + result[width : width + at]
                done += width
            if done == size:
                break
            power = power[: power.size - width] * _power(width) + power[width:]
            width *= 2
    rows = np.repeat(np.arange(counts.size), counts)
    inside = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    assert result is not None
    return mix(result[batch.starts[rows] + inside]), rows


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: uint64 to uint64, one to one."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(_BASE)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 2**64))
