"""`python -m benchmarks synthesis`: how much of a server's speed the client of `synthesize` leaves unused.

A stub on another core answers at most so many requests a second, always the same. The client runs as in a synthesis: requests
have bodies of JSON, answers are parsed and written to parts. Its CPU time for each request says what one core can do whatever
else the machine does; the share of the server's rate says what came of it here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import psutil

from megatron_synth.config.errors import EXIT_OK
from megatron_synth.config.synthesis import EngineConfig, SamplingConfig
from megatron_synth.core.log import show, table
from megatron_synth.synthesis.answers.parts import Answer, Answers
from megatron_synth.synthesis.chunks import Chunk
from megatron_synth.synthesis.engines.openai import HttpEngine
from megatron_synth.synthesis.engines.protocol import Shape
from megatron_synth.synthesis.parents import Parent
from megatron_synth.synthesis.requests import Prompt, Request, digest

TEXT = "some words of a parent document that is to be rephrased " * 20


def _requests(count: int) -> Iterator[Request]:
    parent = Parent("0" * 32, 0, "web", TEXT)
    chunk = Chunk((parent,), TEXT, 0, 1, 200)
    for number in range(count):
        yield Request(digest(["bench", number]), number, chunk, 0, (TEXT,), Prompt(text=f"{number} {TEXT}"), number)


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks synthesis", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--rate", type=float, default=5000.0, help="answers a second that the stub gives at most")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args(argv)
    command = [sys.executable, "-m", "benchmarks.synthesis.stub", "--fixed", "--rate", str(arguments.rate)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = server.stdout.readline().strip()
        figures = _measure(url, arguments.requests, arguments.concurrency)
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
    figures["share"] = figures["rate"] / arguments.rate
    rows = [
        ("requests", "answers/s", "share of the server's rate", "CPU us/request", "memory at 1/10", "memory at the end"),
        (
            f"{arguments.requests:,}",
            f"{figures['rate']:,.0f}",
            f"{100 * figures['share']:.0f} %",
            f"{figures['cpu_us']:.0f}",
            f"{figures['first_mib']:.0f} MiB",
            f"{figures['last_mib']:.0f} MiB",
        ),
    ]
    show(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return EXIT_OK


def _measure(url: str, count: int, concurrency: int) -> dict[str, float]:
    shape = Shape("stub", "completions", SamplingConfig(), ())
    engine = HttpEngine(shape, EngineConfig(name="openai", servers=(url,), concurrency=concurrency), (url,), None)
    process = psutil.Process()
    memory: list[int] = []
    with tempfile.TemporaryDirectory() as folder, closing(Answers(Path(folder))) as answers:
        done = 0

        def sink(pairs: Sequence[tuple[Request, Answer]]) -> None:
            nonlocal done
            answers.add([(one.key, ["0" * 32], one.chunk.number, one.sample, answer) for one, answer in pairs])
            done += len(pairs)
            if done % max(count // 10, 1) == 0:
                memory.append(process.memory_info().rss)

        engine.check()
        engine.run(_requests(100), sink, 64)  # imports and connections
        done = 0
        memory.clear()
        cpu, start = time.process_time(), time.perf_counter()
        engine.run(_other(count), sink, 64)
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        assert done == count
    return {
        "requests": count,
        "rate": count / took,
        "cpu_us": 1e6 * cpu / count,
        "first_mib": memory[0] / 2**20,
        "last_mib": memory[-1] / 2**20,
    }


def _other(count: int) -> Iterator[Request]:
    """Requests with other keys than those of the start."""
    all_of_them = _requests(count + 100)
    for _ in range(100):
        next(all_of_them)
    yield from all_of_them
