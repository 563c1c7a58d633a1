"""What it costs a rank to start on a corpus of trillions of tokens, and the commands that plan with it.

python -m benchmarks.scale.start CONFIG RANK RANKS      # one rank, in a process of its own: one line of JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from benchmarks.loader.memory import anonymous_bytes
from benchmarks.scale import corpus

SEQUENCE_LENGTH = 4096
STEPS = 256
"""Steps after the first that are read."""
COMMANDS = ("mix plan {config}", "mix show {config} {sample}", "train {config} --dry-run --world-size {ranks}")


@dataclass(frozen=True)
class Start:
    """One rank's start. Times in seconds; of the steps after the first the median and the longest."""

    config_s: float
    open_s: float
    first_s: float
    median_s: float
    longest_s: float
    anonymous: int
    """Bytes of memory that are no pages of files, at the end: what no other rank of the node shares."""
    peak: int
    """The most bytes resident until the data was open."""


@dataclass(frozen=True)
class Command:
    """A command of the program: seconds, and the most bytes resident."""

    words: str
    seconds: float
    peak: int


@dataclass(frozen=True)
class Result:
    """All figures of one corpus."""

    tokens: int
    shards: int
    sources: int
    manifest_bytes: int
    start: Start
    commands: tuple[Command, ...]


def write_config(folder: Path, prepared: Sequence[Path], *, tokens: int, ranks: int) -> Path:
    """A run over so many tokens of all sources, in data-parallel ranks of one sequence each."""
    ratios = corpus.ratios(len(prepared))
    sources = {
        path.name: {"path": str(path), "ratio": str(ratio), "max_epochs": 1000}
        for path, ratio in zip(prepared, ratios, strict=True)
    }
    train = {"global_batch_size": ranks, "micro_batch_size": 1, "sequence_length": SEQUENCE_LENGTH}
    train["steps"] = max(1, tokens // (ranks * SEQUENCE_LENGTH))
    model = Path(__file__).resolve().parents[2] / "configs" / "model" / "3b.yaml"
    config = {"base": str(model), "model": {"vocab_size": corpus.VOCABULARY}, "train": train}
    config["data"] = {"sources": sources, "document_masks": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "config.yaml"


def run(*, tokens: int, shards: int, sources: int, ranks: int) -> Result:
    """Make the corpus, start a rank in the middle of the others, and run the commands."""
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as name:
        folder = Path(name)
        prepared = corpus.write(folder / "data", tokens=tokens, shards=shards, sources=sources)
        config = write_config(folder, prepared, tokens=tokens, ranks=ranks)
        rank = [sys.executable, "-m", "benchmarks.scale.start", str(config), str(ranks // 2), str(ranks)]
        done = subprocess.run(rank, stdout=subprocess.PIPE, text=True, check=True)
        sample = tokens // SEQUENCE_LENGTH // 2
        commands = [
            _command(words.format(config=config, ranks=ranks, sample=sample), words.split(" {")[0]) for words in COMMANDS
        ]
        return Result(
            tokens=tokens,
            shards=shards,
            sources=sources,
            manifest_bytes=sum((path / "manifest.json").stat().st_size for path in prepared),
            start=Start(**json.loads(done.stdout.splitlines()[-1])),
            commands=tuple(commands),
        )


def _command(arguments: str, words: str) -> Command:
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "megatron_synth", *arguments.split()], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{words}: exit code {process.returncode}"
    return Command(words, time.perf_counter() - began, usage.ru_maxrss * 1024)


def measure(file: str, rank: int, ranks: int) -> Start:
    """Start as `train` does, and read the first steps."""
    import resource

    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config

    began = time.perf_counter()
    config = load_file(Config, file, [])
    configured = time.perf_counter()
    from megatron_synth.data.loading.loader import Loader
    from megatron_synth.data.loading.run_data import open_data

    imported = time.perf_counter()
    data = open_data(config, part=(rank, ranks))
    opened = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loader = Loader(
        data.plan,
        data.sources,
        sequence_length=SEQUENCE_LENGTH,
        micro_batch_size=1,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        with_boundaries=True,
    )
    times = []
    for step in range(STEPS + 1):
        before = time.perf_counter()
        list(loader.micro_batches(step * ranks, ranks))
        times.append(time.perf_counter() - before)
    later = sorted(times[1:])
    return Start(
        config_s=configured - began,
        open_s=opened - imported,
        first_s=times[0],
        median_s=later[len(later) // 2],
        longest_s=later[-1],
        anonymous=anonymous_bytes(),
        peak=peak,
    )


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The table, head first."""
    head = ["tokens", "shards", "manifests, MB", "file read, s", "data opened, s", "first batch, s", "longest of 256, s"]
    head += ["own memory, MiB", *(f"{command.words}, s" for command in results[0].commands), "most memory of these, MiB"]
    table = [head]
    for one in results:
        start = one.start
        row = [f"{one.tokens:.0e}".replace("+", ""), f"{one.shards:,}", f"{one.manifest_bytes / 1e6:.0f}"]
        row += [f"{value:.2f}" for value in (start.config_s, start.open_s, start.first_s, start.longest_s)]
        row += [f"{max(start.anonymous, start.peak) / 2**20:.0f}", *(f"{command.seconds:.1f}" for command in one.commands)]
        row.append(f"{max(command.peak for command in one.commands) / 2**20:.0f}")
        table.append(row)
    return table


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))), flush=True)
