"""`python -m benchmarks duplicates`: near duplicates by ours and by other libraries."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.duplicates import corpus, memory, peers
from megatron_synth.cli.options.types import count
from megatron_synth.config.errors import EXIT_OK

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks duplicates",
        description="Near duplicates planted in the built-in corpus: speed, memory, recall and precision, beside others.",
    )
    parser.add_argument("--rounds", type=count, default=3, help="runs of each, in turn; the median is shown (%(default)s)")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="the environment of the others; default: this one")
    parser.add_argument(
        "--memory", action="store_true", help="instead: memory of ours against the size of the corpus, in shares"
    )
    options = parser.parse_args(argv)

    from megatron_synth.bench.tables import header, header_lines, markdown_table
    from megatron_synth.core.log import say

    head = header("duplicates", argv) | {"command": shlex.join(["python", "-m", "benchmarks", "duplicates", *argv])}
    lines = header_lines(head)
    if options.memory:
        table = memory.rows(memory.run())
    else:
        table, planned = compare(options.rounds, options.peers)
        lines.append(f"- text: {planned}")
    say("\n" + "\n".join([*lines, "", *markdown_table(table)]))
    return EXIT_OK


def compare(rounds: int, python: Path | None) -> tuple[list[list[str]], str]:
    """The table of all contenders, head first, and what they read."""
    with tempfile.TemporaryDirectory(prefix="bench-duplicates-") as name:
        folder = Path(name)
        file = folder / "text.jsonl"
        planted = corpus.write(file)
        documents = write_prepared(file, folder / "web")
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(rounds):
            for contender in peers.CONTENDERS:
                one = _run(contender, file, folder / "web", None if contender == "ours" else python)
                if one is not None:
                    found.setdefault(contender, []).append(one)
        table = [["contender", "documents / CPU s", "ratio", "peak above start, MiB", "pairs", "precision", "planted found"]]
        median = {key: sorted(ones, key=lambda one: one["cpu_s"])[len(ones) // 2] for key, ones in found.items()}
        for contender, one in median.items():
            pairs = sorted({(min(pair), max(pair)) for pair in one["pairs"]})
            table.append(
                [
                    contender,
                    f"{documents / one['cpu_s']:,.0f}",
                    f"{one['cpu_s'] / median['ours']['cpu_s']:.2f}",
                    f"{(one['peak'] - one['idle']) / 2**20:.0f}",
                    f"{len(pairs):,}",
                    f"{corpus.precision(file, pairs):.3f}",
                    f"{_together(planted, pairs, documents) / len(planted):.3f}",
                ]
            )
    return table, f"{documents:,} documents; {len(planted):,} planted pairs of a similarity of 0.8 or more"


def write_prepared(file: Path, folder: Path) -> int:
    """The same documents as a prepared source whose tokens are words; returns how many there are."""
    from benchmarks.made_up import save_manifest
    from megatron_synth.data.shards.indexed import ShardWriter
    from megatron_synth.data.shards.manifest import ShardInfo

    folder.mkdir()
    numbers: dict[str, int] = {}
    writer = ShardWriter(folder / "shard-00000", np.dtype(np.int32))
    documents = 0
    for line in file.open():
        tokens = [numbers.setdefault(word, len(numbers) + 1) for word in json.loads(line)["text"].split()]
        writer.add(np.array([*tokens, 0], np.int32), np.array([len(tokens) + 1]))
        documents += 1
    written = writer.finish()
    shard = ShardInfo(name="shard-00000", **vars(written))
    save_manifest(folder, [shard], "int32", len(numbers) + 1, text_bytes=file.stat().st_size)
    return documents


def _run(contender: str, file: Path, prepared: Path, python: Path | None) -> dict[str, Any] | None:
    """What one found; None where it is not installed."""
    if python is None and contender != "ours" and importlib.util.find_spec(contender) is None:
        return None
    command = [str(python or sys.executable), str(ROOT / "benchmarks" / "duplicates" / "peers.py"), contender, str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT)} if contender == "ours" else {}
    done = subprocess.run([*command, str(prepared)], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _together(planted: list[tuple[int, int]], pairs: list[tuple[int, int]], documents: int) -> int:
    """How many planted pairs are in one group of what pairs tie together."""
    parent = list(range(documents))

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for one, two in pairs:
        parent[root(one)] = root(two)
    return sum(root(one) == root(two) for one, two in planted)
