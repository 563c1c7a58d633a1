"""How fast text becomes token shards: our `prepare` beside the way Megatron-LM's preprocessing works, and datatrove.

All contenders read the same .jsonl files, use the same tokenizer.json and as many worker processes, and run one after
another in a process of their own. The clock starts when a contender has imported what it needs and stops when its last
file is written; starting workers counts. All must write the same tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.prepare import peers
from benchmarks.prepare.proc_sampler import watch
from megatron_synth.config.errors import UserError
from megatron_synth.data.preparing import builtin_corpus
from megatron_synth.data.tokenizer import train_tokenizer

EOD = "<|endoftext|>"
VOCABULARY = 16384
CONTENDERS = {
    "megatron-synth": "the whole verb: checks, token runs, shards, checksums, manifest",
    "megatron-lm": "one encode per document in a multiprocessing Pool, imap with chunks of 32, IndexedDatasetBuilder",
    "datatrove": "JsonlReader and DocumentTokenizer, one task per worker",
}


@dataclass(frozen=True)
class Run:
    """One run of one contender. cpu_s: of all its processes; peak_bytes: their proportional memory together, sampled."""

    contender: str
    tokens: int
    seconds: float
    cpu_s: float
    peak_bytes: int


@dataclass(frozen=True)
class PrepareBench:
    """All runs, in the order in which they were made, and what they worked on."""

    runs: tuple[Run, ...]
    workers: int
    documents: int
    text_bytes: int

    def of(self, contender: str) -> list[Run]:
        """Runs of one contender."""
        return [run for run in self.runs if run.contender == contender]

    def rate(self, contender: str) -> float:
        """Tokens per second and worker, median."""
        return statistics.median(run.tokens / run.seconds / self.workers for run in self.of(contender))

    def cpu_rate(self, contender: str) -> float:
        """Tokens per second of processor time, median: what a core does when nothing else wants it."""
        return statistics.median(run.tokens / run.cpu_s for run in self.of(contender))


def compare(megabytes: int, workers: int, rounds: int, *, datatrove: Path | None, say: Any = lambda line: None) -> PrepareBench:
    """Run all contenders, in turn.

    Args:
        megabytes: of text to tokenize: the built-in corpus, repeated with a number before each document.
        workers: processes that tokenize.
        rounds: runs of each contender.
        datatrove: the Python of an environment with datatrove; None leaves it out.
        say: gets a line after each run.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-synth-bench-") as temporary:
        folder = Path(temporary)
        texts = [text for builtin in ("natural", "qa", "unseen") for _, text in builtin_corpus.documents(builtin)]
        train_tokenizer(texts, VOCABULARY, EOD).save(folder / "tokenizer.json")
        documents, size = _write_corpus(folder / "corpus", texts, megabytes * 10**6, workers)
        names = [name for name in CONTENDERS if name != "datatrove" or datatrove is not None]
        runs: list[Run] = []
        expected: str | None = None
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                python = str(datatrove) if name == "datatrove" else sys.executable
                run, digest = _run(python, name, folder, workers)
                if digest != (expected := expected or digest):
                    raise UserError(f"{name} wrote other tokens than {runs[0].contender}: the comparison is void")
                runs.append(run)
                rate = run.tokens / run.seconds / workers
                say(f"round {turn + 1}/{rounds}: {name} {run.seconds:.1f} s, {rate:,.0f} tokens/s per worker")
        return PrepareBench(tuple(runs), workers, documents, size)


def _write_corpus(folder: Path, texts: Sequence[str], wanted: int, files: int) -> tuple[int, int]:
    """Documents to `files` .jsonl files of like size; their number and the bytes of their text."""
    folder.mkdir()
    documents = size = number = 0
    source = _numbered(texts)
    for at in range(files):
        with open(folder / f"{at:03d}.jsonl", "w", encoding="utf-8") as file:
            while size < wanted * (at + 1) // files:
                text = next(source)
                file.write(json.dumps({"id": number, "text": text}) + "\n")
                number += 1
                documents += 1
                size += len(text.encode())
    return documents, size


def _numbered(texts: Sequence[str]) -> Iterator[str]:
    copy = 0
    while True:
        for text in texts:
            yield text if copy == 0 else f"{copy}\n{text}"
        copy += 1


def _run(python: str, name: str, folder: Path, workers: int) -> tuple[Run, str]:
    """One run in a fresh process, and a digest of the tokens that it wrote."""
    output = folder / "out"
    script = Path(peers.__file__)
    command = [python, str(script), name, str(folder / "corpus"), str(folder / "tokenizer.json"), str(output), str(workers)]
    # a script finds its own folder, not the package: contenders of this environment need both
    path = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    threads = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | threads | ({"PYTHONPATH": path} if python == sys.executable else {"PYTHONPATH": ""})
    with open(folder / "errors", "w+") as errors:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            usage = watch(process)
            assert process.stdout is not None
            printed = process.stdout.read()
        if process.returncode != 0:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{name}: failed with exit code {process.returncode}: {last}")
    result = json.loads(printed.strip().splitlines()[-1])
    cpu_s = result["cpu_s"] + sum(seconds for pid, seconds in usage.cpu_s.items() if pid != process.pid)
    return Run(name, result["tokens"], result["seconds"], cpu_s, usage.pss), result["sha256"]


def render(head: dict[str, Any], result: PrepareBench) -> str:
    """The result as Markdown."""
    from megatron_synth.bench.tables import header_lines, markdown_table

    names = list(dict.fromkeys(run.contender for run in result.runs))
    ours = names[0]
    rows = [["contender", "seconds", "tokens/s/worker", "ratio", "tokens/CPU s", "ratio, CPU", "peak MiB"]]
    for name in names:
        runs = result.of(name)
        rows.append(
            [
                name,
                f"{statistics.median(run.seconds for run in runs):.2f}",
                f"{result.rate(name):,.0f}",
                "" if name == ours else f"x{result.rate(ours) / result.rate(name):.2f}",
                f"{result.cpu_rate(name):,.0f}",
                "" if name == ours else f"x{result.cpu_rate(ours) / result.cpu_rate(name):.2f}",
                f"{max(run.peak_bytes for run in runs) / 2**20:,.0f}",
            ]
        )
    first = result.runs[0]
    lines = [
        *header_lines(head),
        f"- text: {result.documents:,} documents of {result.text_bytes / 1e6:.1f} MB, {first.tokens:,} tokens, the same tokens "
        f"from all; {result.workers} worker{'' if result.workers == 1 else 's'} each",
        f"- timing: {len(result.of(ours))} runs each, in turn, medians; ratio: tokens/s of {ours} to the contender's",
        *(f"- {name}: {CONTENDERS[name]}" for name in names),
    ]
    return "\n".join([*lines, "", *markdown_table(rows)])


def to_json(head: dict[str, Any], result: PrepareBench) -> dict[str, Any]:
    """The result with every single run."""
    names = list(dict.fromkeys(run.contender for run in result.runs))
    rates = {name: {"tokens_per_s": result.rate(name), "tokens_per_cpu_s": result.cpu_rate(name)} for name in names}
    return {**head, **asdict(result), "per_worker": rates}
