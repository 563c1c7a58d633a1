"""How much memory `prepare` and its checks take, on made-up text of several sizes: whether it grows with the text.

Each step is the verb itself, in a process of its own, with all that costs memory: a compressed file that the parent
decompresses, a shuffle, packing, a holdout; then `prepare verify`, and the report of duplicates and contamination. The
tokenizer is trained first, on a sample: its trainer, not ours, keeps every different word.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.prepare.corpus import Corpus, write_corpus
from benchmarks.prepare.proc_sampler import INTERVAL_S, watch
from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_json
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.tokenizer import FILE_NAME as TOKENIZER

VOCABULARY = 32_768
TRAINING_BYTES = 20 * 10**6
SEQUENCE_LENGTH = 4096
HOLDOUT = "1/500"
DISK_PER_TEXT = 2.0
"""Bytes on the disk per byte of text, at most: the corpus, and the tokens twice."""


@dataclass(frozen=True)
class Step:
    """One verb on one corpus. pss, rss, anonymous: bytes, see sampling.Usage."""

    verb: str
    text_bytes: int
    documents: int
    tokens: int
    workers: int
    seconds: float
    cpu_s: float
    pss: int
    rss: int
    anonymous: int


@dataclass(frozen=True)
class Found:
    """What the report of duplicates said, beside what the text was made with."""

    copies: int
    exact: int
    near_copies: int
    near: int


@dataclass(frozen=True)
class MemoryBench:
    """All steps, in the order in which they were made, and what was found in each corpus."""

    steps: tuple[Step, ...]
    found: tuple[Found, ...]


def measure(sizes: Sequence[int], workers: Sequence[int], folder: Path | None, say: Callable[[str], None]) -> MemoryBench:
    """Run every step on a corpus of each size.

    Args:
        sizes: bytes of text.
        workers: processes that tokenize; with several, `prepare` runs with each, and must write the same bytes.
        folder: where to put corpus and output, on a disk with room; None: the system's temporary folder.
        say: gets a line after each step.

    Raises:
        UserError: no room, a step that fails, or other bytes for other numbers of workers.
    """
    steps: list[Step] = []
    found: list[Found] = []
    place, needed = folder or Path(tempfile.gettempdir()), DISK_PER_TEXT * max(sizes)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB needed; give another --folder, or measure less text"
        )
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="megatron-synth-memory-", dir=folder) as temporary:
            corpus = write_corpus(Path(temporary) / "corpus", size)
            say(f"{corpus.documents:,} documents of {corpus.text_bytes / 1e6:,.0f} MB written")
            made, report = _steps(Path(temporary), corpus, workers, say)
            steps += made
            found.append(report)
    return MemoryBench(tuple(steps), tuple(found))


def _steps(folder: Path, corpus: Corpus, workers: Sequence[int], say: Callable[[str], None]) -> tuple[list[Step], Found]:
    steps: list[Step] = []
    output, sample = folder / "out", folder / "sample"
    web = {"kind": "natural", "input": [str(file) for file in corpus.files]}
    tokenizer = {"train": {"vocab_size": VOCABULARY}}
    few = {"output": str(sample), "tokenizer": tokenizer, "sources": {"web": web | {"max_bytes": TRAINING_BYTES}}}
    write_json(folder / "sample.json", few)
    settings = {
        "output": str(output),
        "tokenizer": {"path": str(sample / TOKENIZER)},
        "shuffle": {"seed": 1},
        "packing": {"sequence_length": SEQUENCE_LENGTH},
        "sources": {"web": web | {"holdout": HOLDOUT}},
    }
    write_json(folder / "all.json", settings)
    digests: set[str] = set()

    def run(verb: str, made: Path, count: int, *arguments: str) -> None:
        command = [sys.executable, "-m", "megatron_synth", "prepare", *arguments]
        environment = os.environ | {"TMPDIR": str(folder)}
        with open(folder / "printed", "w+") as printed:
            began = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
            usage = watch(process)
            seconds = time.perf_counter() - began
            if process.returncode:
                printed.seek(0)
                last = (printed.read().strip().splitlines() or ["no message"])[-1]
                raise UserError(f"prepare {verb}: failed with exit code {process.returncode}: {last}")
        counts = [manifest.counts for manifest in _manifests(made)]
        steps.append(
            Step(
                verb=verb,
                text_bytes=sum(one.text_bytes for one in counts),
                documents=sum(one.documents for one in counts),
                tokens=sum(one.tokens for one in counts),
                workers=count,
                seconds=seconds,
                cpu_s=sum(usage.cpu_s.values()),
                pss=usage.pss,
                rss=usage.rss,
                anonymous=usage.anonymous,
            )
        )
        say(f"{verb}, {count} workers: {seconds:.0f} s, {usage.pss / 2**20:,.0f} MiB at most")

    run("prepare a sample, train", sample, 1, str(folder / "sample.json"), "--workers", "1")
    for count in workers:
        if output.exists():
            shutil.rmtree(output)
        run("prepare", output, count, str(folder / "all.json"), "--workers", str(count))
        digests.add(json.dumps([manifest.digest() for manifest in _manifests(output)]))
    if len(digests) > 1:
        raise UserError(f"prepare wrote other bytes with other numbers of workers, of {list(workers)}")
    run("verify", output, max(workers), "verify", str(output), "--workers", str(max(workers)))
    run("duplicates", output, 1, "duplicates", str(output), "--json", str(folder / "duplicates.json"))
    report = json.loads((folder / "duplicates.json").read_text())
    within = [one for one in report["shared"] if one["source"] == one["other"] == "web"]
    return steps, Found(corpus.copies, within[0]["exact"], corpus.near_copies, within[0]["near"])


def _manifests(output: Path) -> list[Manifest]:
    return [Manifest.load(output / name) for name in ("web", "web-valid") if (output / name).exists()]


def render(head: dict[str, Any], result: MemoryBench) -> str:
    """The result as Markdown."""
    from megatron_synth.bench.tables import header_lines, markdown_table

    head_row = ["step", "workers", "text, MB", "documents", "tokens", "seconds", "tokens/CPU s"]
    head_row += ["peak PSS, MiB", "anonymous", "sum of RSS"]
    rows = [head_row]
    for step in result.steps:
        memory = (f"{value / 2**20:,.0f}" for value in (step.pss, step.anonymous, step.rss))
        size = [f"{step.text_bytes / 1e6:,.0f}", f"{step.documents:,}", f"{step.tokens:,}"]
        rows.append([step.verb, str(step.workers), *size, f"{step.seconds:,.0f}", f"{step.tokens / step.cpu_s:,.0f}", *memory])
    lines = [
        *header_lines(head),
        f"- text: made up, see benchmarks/prepare/corpus.py; a third of it in a .zst file; tokenizer of {VOCABULARY:,} "
        f"tokens trained on {TRAINING_BYTES / 1e6:.0f} MB; shuffle, packing to {SEQUENCE_LENGTH:,}, holdout {HOLDOUT}",
        f"- memory: of all processes together, the most in samples {INTERVAL_S} s apart; PSS divides shared pages among their "
        f"processes, RSS counts them for each",
        *(
            f"- duplicates found in {step.text_bytes / 1e6:,.0f} MB: {found.exact:,} documents of {found.copies:,} copies and "
            f"what they copy, {found.near:,} nearly equal ones of those and {found.near_copies:,} changed copies"
            for step, found in zip([step for step in result.steps if step.verb == "duplicates"], result.found, strict=True)
        ),
    ]
    return "\n".join([*lines, "", *markdown_table(rows)])


def to_json(head: dict[str, Any], result: MemoryBench) -> dict[str, Any]:
    """The result with the header."""
    return {**head, **asdict(result)}
