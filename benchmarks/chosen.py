"""`python -m benchmarks chosen`: how fast chosen documents, and documents with prompts, are read beside the whole source."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shlex
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from benchmarks.made_up import save_manifest
from megatron_synth.bench.tables import header, header_lines, markdown_table
from megatron_synth.cli.options.types import count
from megatron_synth.config.errors import EXIT_OK
from megatron_synth.config.expression import parse
from megatron_synth.core.log import show
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards.columns import SUFFIX, ColumnInfo, file_content, missing_values
from megatron_synth.data.shards.indexed import ShardWriter, with_suffix
from megatron_synth.data.shards.learned import SUFFIX as LEARNED
from megatron_synth.data.shards.learned import LearnedWriter
from megatron_synth.data.shards.manifest import Manifest, ShardInfo
from megatron_synth.data.shards.selection import select
from megatron_synth.data.shards.source import Source, open_source

LENGTH, ROWS = 4096, 8
COLUMNS = (ColumnInfo(name="score", type="float32"),)


def write(folder: Path, tokens: int, mean: int) -> Path:
    """A source of so many tokens in documents of `mean` on average, each with a score in [0, 1)."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    lengths = generator.geometric(1 / mean, size=2 * tokens // mean + 1).astype(np.int32) + 1
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]
    writer = ShardWriter(folder / "shard-00000", np.dtype(np.uint16))
    writer.add(generator.integers(0, 50_000, int(lengths.sum()), dtype=np.uint16), lengths)
    info = ShardInfo(name="shard-00000", **vars(writer.finish()))
    values = missing_values(COLUMNS, info.documents)
    values["score"] = generator.random(info.documents)
    content = file_content(COLUMNS, values)
    with_suffix(folder / info.name, SUFFIX).write_bytes(content)
    info = info.model_copy(update={"columns_bytes": len(content), "columns_sha256": hashlib.sha256(content).hexdigest()})
    save_manifest(folder, [info], "uint16", 50_000, text_bytes=info.tokens, columns=COLUMNS)
    return folder


def with_prompts(source: Path, folder: Path) -> Path:
    """The same source, of whose documents the first part is not learned: a prompt of any length."""
    folder.mkdir()
    manifest = Manifest.load(source)
    (info,) = manifest.shards
    for suffix in info.sizes:
        os.link(with_suffix(source / info.name, suffix), with_suffix(folder / info.name, suffix))
    lengths = open_source(source, "web").shard(0).document_lengths()
    prompts = (np.random.default_rng(2).random(len(lengths)) * lengths).astype(np.int64)
    writer = LearnedWriter(with_suffix(folder / info.name, LEARNED))
    writer.add(np.repeat(np.tile([False, True], len(lengths)), np.stack([prompts, lengths - prompts], axis=1).ravel()))
    sha256, learned = writer.finish()
    info = info.model_copy(update={"learned_sha256": sha256, "learned_tokens": learned})
    manifest.model_copy(update={"shards": (info,)}).save(folder)
    return folder


class Reader:
    """Reads one source for ever, with document boundaries and loss masks."""

    def __init__(self, source: Source):
        spec = SourceSpec(source.name, Fraction(1), source.num_windows(LENGTH), math.inf)
        self._loader = Loader(
            MixturePlan([spec], 1),
            [source],
            sequence_length=LENGTH,
            micro_batch_size=ROWS,
            data_parallel_rank=0,
            data_parallel_size=1,
            with_boundaries=True,
        )
        self._step = 0

    def tokens_per_second(self, batches: int) -> float:
        """Over the next so many batches."""
        start = time.perf_counter()
        for _ in range(batches):
            for batch in self._loader.micro_batches(self._step * ROWS, ROWS):
                assert batch.boundaries is not None
                batch.boundaries.loss_mask(batch.learned)
            self._step += 1
        return batches * ROWS * LENGTH / (time.perf_counter() - start)


def measured(folder: Path, batches: int, rounds: int) -> list[list[str]]:
    """A row of the table for each choice, and one for prompts; the whole source and these take turns."""
    rows, whole = [], Reader(open_source(folder, "web"))
    prompts = open_source(with_prompts(folder, folder.parent / "prompts"), "web")
    ratio, speed = _beside(whole, Reader(prompts), batches, rounds)
    rows.append(["all, prompts not learned", f"{prompts.num_documents:,}", "", speed, ratio, "", ""])
    for text in ("score >= 0.0", "score < 0.9", "score < 0.5", "score < 0.1"):
        start = time.perf_counter()
        chosen = select(open_source(folder, "web"), parse(text), folder.parent / "cache", "where")
        made = time.perf_counter() - start
        start = time.perf_counter()
        chosen = select(open_source(folder, "web"), parse(text), folder.parent / "cache", "where")
        opened = time.perf_counter() - start
        ratio, speed = _beside(whole, Reader(chosen), batches, rounds)
        parts = f"{chosen.num_tokens / len(chosen.index.shards):,.0f}"
        times = [f"{made:.3f}", f"{opened:.3f}"]
        rows.append([f"`{text}`", f"{chosen.num_documents:,}", parts, speed, ratio, *times])
    return rows


def _beside(whole: Reader, reader: Reader, batches: int, rounds: int) -> tuple[str, str]:
    """The speed of a reader as a part of the whole source's, in turn, and in millions of tokens per second; medians."""
    for one in (whole, reader):
        one.tokens_per_second(batches)
    pairs = [(whole.tokens_per_second(batches), reader.tokens_per_second(batches)) for _ in range(rounds)]
    return f"{statistics.median(b / a for a, b in pairs):.2f}", f"{statistics.median(b for _, b in pairs) / 1e6:,.0f}"


def main(argv: list[str]) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks chosen", description="Reading chosen documents, and prompts.")
    parser.add_argument("--tokens", type=count, default=200_000_000, help="of the source; default 200000000")
    parser.add_argument("--document", type=count, default=1000, help="tokens of a document on average; default 1000")
    parser.add_argument("--batches", type=count, default=2000, help="of 8 x 4096 tokens in each turn; default 2000")
    parser.add_argument("--rounds", type=count, default=7, help="turns; default 7")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "web", options.tokens, options.document)
        rows = measured(source, options.batches, options.rounds)
    heads = ["where", "documents", "tokens in a run", "M tokens/s", "of the whole source", "index made, s", "opened again, s"]
    head = header("chosen", argv)
    head["command"] = shlex.join(["python", "-m", "benchmarks", "chosen", *argv])
    show("\n".join([*header_lines(head), "", *markdown_table([heads, *rows])]))
    return EXIT_OK
