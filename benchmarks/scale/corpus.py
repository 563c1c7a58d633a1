"""Sources of trillions of tokens that take hardly any room: sparse .bin files, true indexes, whole manifests.

Each source has one file pair of its own, and all its shards are names of that pair. Sizes, documents and manifests are those of
a corpus of that many tokens; tokens are all 0, and the checksums in the manifests are made up, since opening compares none.
"""

from __future__ import annotations

import itertools
import os
import random
from fractions import Fraction
from pathlib import Path

import numpy as np

from benchmarks.made_up import save_manifest
from megatron_synth.data.shards.block_hash import BLOCK_BYTES, DIGITS, block_count
from megatron_synth.data.shards.indexed import HEADER, MAGIC, VERSION, token_code
from megatron_synth.data.shards.manifest import ShardInfo

MOST_LINKS = 50_000
"""Names of one file; ext4 allows 65,000."""
DOCUMENT_TOKENS = 500
VOCABULARY = 128_256
DTYPE = np.dtype(np.int32)
DENOMINATOR = 10**6


def sizes(shards: int, sources: int) -> list[int]:
    """Shards of each source: like 1, 1/2, 1/3, ..., at least one each, so many together."""
    weights = [1 / (number + 1) for number in range(sources)]
    found = [max(1, int(shards * weight / sum(weights))) for weight in weights]
    found[0] += shards - sum(found)
    return found


def ratios(sources: int, seed: int = 0) -> list[Fraction]:
    """Random ratios in millionths that sum to 1."""
    cuts = sorted(random.Random(seed).sample(range(1, DENOMINATOR), sources - 1))
    return [Fraction(end - begin, DENOMINATOR) for begin, end in itertools.pairwise([0, *cuts, DENOMINATOR])]


def write_source(folder: Path, shards: int, tokens: int, seed: int) -> Path:
    """A source of so many shards of `tokens` tokens each."""
    folder.mkdir(parents=True)
    assert shards <= MOST_LINKS, f"{folder}: {shards} shards are more names than one file may have"
    names = [f"shard-{number:05d}" for number in range(shards)]
    bin_bytes, documents = tokens * DTYPE.itemsize, -(-tokens // DOCUMENT_TOKENS)
    with open(folder / f"{names[0]}.bin", "wb") as file:
        file.truncate(bin_bytes)
    lengths = np.full(documents, DOCUMENT_TOKENS, np.int32)
    lengths[-1] = tokens - (documents - 1) * DOCUMENT_TOKENS
    pointers = np.arange(documents, dtype=np.int64) * (DOCUMENT_TOKENS * DTYPE.itemsize)
    header = HEADER.pack(MAGIC, VERSION, token_code(DTYPE), documents, documents + 1)
    index = b"".join([header, lengths.tobytes(), pointers.tobytes(), np.arange(documents + 1, dtype=np.int64).tobytes()])
    (folder / f"{names[0]}.idx").write_bytes(index)
    for name in names[1:]:
        for suffix in (".bin", ".idx"):
            os.link(folder / f"{names[0]}{suffix}", folder / f"{name}{suffix}")
    digits = random.Random(seed)

    def checksum(length: int) -> str:
        return f"{digits.getrandbits(4 * length):0{length}x}"

    blocks = block_count(bin_bytes, BLOCK_BYTES) * DIGITS
    written = {"documents": documents, "tokens": tokens, "bin_bytes": bin_bytes, "idx_bytes": len(index)}
    infos = tuple(
        ShardInfo(name=name, **written, bin_sha256=checksum(64), idx_sha256=checksum(64), bin_blocks=checksum(blocks))
        for name in names
    )
    save_manifest(folder, infos, DTYPE.name, VOCABULARY, text_bytes=4 * shards * tokens)
    return folder


def write(folder: Path, *, tokens: int, shards: int, sources: int) -> list[Path]:
    """All sources, `tokens` tokens in `shards` shards together."""
    each = tokens // shards
    return [
        write_source(folder / f"source-{number:02d}", count, each, number)
        for number, count in enumerate(sizes(shards, sources))
    ]
