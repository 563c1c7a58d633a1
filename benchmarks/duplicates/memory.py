"""Memory of `prepare duplicates` against the size of the corpus: one process, shares, and the comparison after them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.usage import Usage, usage_of

SHARES, SHARDS = 4, 16
DOCUMENT_TOKENS = 300
DOCUMENTS = (20_000, 80_000, 320_000, 1_280_000)


@dataclass(frozen=True)
class Memory:
    """Of one corpus. share: of the share that took most; equal: whether both ways gave the same bytes."""

    documents: int
    alone: Usage
    share: Usage
    compare: Usage
    equal: bool


def write(folder: Path, documents: int) -> Path:
    """Random documents, one in fifty a changed copy of the one before."""
    from benchmarks.made_up import save_manifest
    from megatron_synth.data.shards.indexed import ShardWriter
    from megatron_synth.data.shards.manifest import ShardInfo

    folder.mkdir()
    random, infos = np.random.default_rng(0), []
    for number in range(SHARDS):
        writer = ShardWriter(folder / f"shard-{number:05d}", np.dtype(np.uint16))
        tokens = random.integers(1, 50_000, (documents // SHARDS, DOCUMENT_TOKENS), dtype=np.uint16)
        tokens[50::50] = tokens[49:-1:50]
        tokens[50::50, 7] = 1
        tokens[:, -1] = 0
        writer.add(tokens.reshape(-1), np.full(len(tokens), DOCUMENT_TOKENS))
        infos.append(ShardInfo(name=f"shard-{number:05d}", **vars(writer.finish())))
    save_manifest(folder, infos, "uint16", 50_000)
    return folder


def run(sizes: Sequence[int] = DOCUMENTS) -> list[Memory]:
    """Measure each size."""
    found = []
    for documents in sizes:
        with tempfile.TemporaryDirectory(prefix="bench-duplicates-") as name:
            folder = Path(name)
            command = ["prepare", "duplicates", str(write(folder / "web", documents))]
            alone = _use([*command, "--json", str(folder / "alone.json")])
            shared = [*command, "--work", str(folder / "work")]
            shares = [_use([*shared, "--share", f"{number}/{SHARES}"]) for number in range(SHARES)]
            compare = _use([*shared, "--json", str(folder / "shared.json")])
            equal = (folder / "alone.json").read_bytes() == (folder / "shared.json").read_bytes()
            found.append(Memory(documents, alone, max(shares, key=lambda one: one.peak), compare, equal))
    return found


def _use(arguments: Sequence[str]) -> Usage:
    return usage_of([sys.executable, "-m", "megatron_synth", *arguments])


def rows(results: Sequence[Memory]) -> list[list[str]]:
    """The table, head first."""
    head = [
        "documents",
        "tokens",
        "one process, MiB",
        "CPU s",
        f"one of {SHARES} shares, MiB",
        "CPU s",
        "comparison, MiB",
        "CPU s",
    ]
    table = [[*head, "same bytes"]]
    for one in results:
        row = [f"{one.documents:,}", f"{one.documents * DOCUMENT_TOKENS:,}"]
        for use in (one.alone, one.share, one.compare):
            row += [f"{use.peak / 2**20:.0f}", f"{use.cpu_s:.1f}"]
        table.append([*row, "yes" if one.equal else "NO"])
    return table
