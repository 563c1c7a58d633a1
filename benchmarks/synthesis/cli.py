"""`python -m benchmarks synthesis`: how much of a server's speed the client of `synthesize` leaves unused.

A stub on one core answers at most so many requests a second, always the same. On another core, turn by turn, a bare load
generator and the client send to it. The generator writes bytes that were made before and counts those that come back: what it
reaches is what server, kernel and machine have to give just then. The client runs as in a synthesis: it makes bodies of JSON,
parses answers and writes them to parts. The ratio of both says what the client costs as long as its core is free enough; its
CPU time for a request says what one core can do by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count as numbers
from pathlib import Path
from typing import Any

import psutil
import uvloop

from megatron_synth.bench import tables
from megatron_synth.cli.options.types import count
from megatron_synth.config.errors import EXIT_OK
from megatron_synth.config.synthesis import EngineConfig, SamplingConfig
from megatron_synth.core.log import show, table
from megatron_synth.synthesis.answers.parts import Answer, Answers
from megatron_synth.synthesis.documents.chunks import Chunk
from megatron_synth.synthesis.documents.parents import Parent
from megatron_synth.synthesis.engines.http import Address
from megatron_synth.synthesis.engines.openai import HttpEngine
from megatron_synth.synthesis.engines.protocol import Shape
from megatron_synth.synthesis.requests import Prompt, Request, digest

TEXT = "some words of a parent document that is to be rephrased " * 20
SAMPLES = 20
"""Of memory, in a round."""
PARENT = Parent("0" * 32, 0, "web", TEXT)
CHUNK = Chunk((PARENT,), TEXT, 0, 1, 200)


def _requests(number: Iterator[int], amount: int) -> Iterator[Request]:
    """Requests of 1.2 kB, no two of them equal. number: of the next one."""
    for _ in range(amount):
        at = next(number)
        yield Request(digest(["bench", at]), at, CHUNK, 0, (TEXT,), Prompt(text=f"{at} {TEXT}"), at)


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks synthesis", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=count, default=20_000, help="in a round (%(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="of the generator and the client each (%(default)s)")
    parser.add_argument("--rate", type=float, default=5000.0, help="answers a second that the stub gives at most; 0: no limit")
    parser.add_argument("--concurrency", type=count, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    command = [
        sys.executable,
        "-m",
        "benchmarks.synthesis.stub",
        "--fixed",
        "--rate",
        str(options.rate),
        "--core",
        str(cores[0]),
    ]
    os.sched_setaffinity(0, {cores[-1]})
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = server.stdout.readline().strip()
        figures = _measure(url, options.requests, options.rounds, options.concurrency)
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
        os.sched_setaffinity(0, cores)
    figures = {"rate": options.rate, "concurrency": options.concurrency, "cores": [cores[0], cores[-1]], **figures}
    show(_table(figures))
    show(json.dumps(figures))
    if options.json is not None:
        head = tables.header("", [])
        options.json.write_text(json.dumps({**head, **figures}, indent=2) + "\n")
    return EXIT_OK


def _table(figures: dict[str, Any]) -> str:
    memory = figures["memory_mib"]
    rows: list[tuple[str, ...]] = [
        ("", "answers/s, median", "CPU us/request"),
        ("bare generator", f"{statistics.median(figures['bare']):,.0f}", f"{figures['bare_cpu_us']:.0f}"),
        ("client", f"{statistics.median(figures['client']):,.0f}", f"{figures['client_cpu_us']:.0f}"),
        ("client / bare generator", f"{figures['ratio']:.3f}", ""),
        ("memory of the client, MiB", f"{memory[0]:.0f} ... {memory[-1]:.0f}", f"at most {max(memory):.0f}"),
    ]
    return table(rows)


def _measure(url: str, amount: int, rounds: int, concurrency: int) -> dict[str, Any]:
    shape = Shape("stub", "completions", SamplingConfig(), ())
    engine = HttpEngine(shape, EngineConfig(name="openai", servers=(url,), concurrency=concurrency), (url,), None)
    process = psutil.Process()
    memory: list[float] = []
    bare, client, spent = [], [], [0.0, 0.0]
    number, done = numbers(), 0
    with tempfile.TemporaryDirectory() as folder, closing(Answers(Path(folder))) as answers:

        def sink(pairs: Sequence[tuple[Request, Answer]]) -> None:
            nonlocal done
            answers.add([(one.key, [PARENT.id], one.chunk.number, one.sample, answer) for one, answer in pairs])
            before, done = done, done + len(pairs)
            if before * SAMPLES // amount < done * SAMPLES // amount:
                memory.append(process.memory_info().rss / 2**20)

        engine.check()
        engine.run(_requests(number, 2 * concurrency), sink, 64)  # imports, and the first connections
        memory.clear()
        for _ in range(rounds):
            start, cpu = time.perf_counter(), time.process_time()
            uvloop.run(_bare(url, amount, concurrency))
            bare.append(amount / (time.perf_counter() - start))
            spent[0] += time.process_time() - cpu
            start, cpu, done = time.perf_counter(), time.process_time(), 0
            engine.run(_requests(number, amount), sink, 64)
            client.append(amount / (time.perf_counter() - start))
            spent[1] += time.process_time() - cpu
            assert done == amount
    return {
        "requests": amount,
        "bare": bare,
        "client": client,
        "ratio": statistics.median(one / other for one, other in zip(client, bare, strict=True)),
        "bare_cpu_us": 1e6 * spent[0] / amount / rounds,
        "client_cpu_us": 1e6 * spent[1] / amount / rounds,
        "memory_mib": memory,
    }


class _Generator(asyncio.Protocol):
    """A connection that writes the same bytes as soon as as many came back as the first reply had."""

    def __init__(self, request: bytes, left: list[int], done: asyncio.Event):
        self._request, self._left, self._done = request, left, done
        self._reply = self._came = 0

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self._transport = transport
        self._next()

    def _next(self) -> None:
        if self._left[0] > 0:
            self._left[0] -= 1
            self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """A reply, which the stub writes at once."""
        self._reply = self._reply or len(data)
        self._came += len(data)
        if self._came >= self._reply:
            self._came = 0
            self._left[1] -= 1
            if self._left[1] == 0:
                self._done.set()
            self._next()


async def _bare(url: str, amount: int, concurrency: int) -> None:
    """As many requests as the client sends, on as many connections, with bytes that were made before."""
    address = Address(url)
    shape = Shape("stub", "completions", SamplingConfig(), ())
    body = shape.body(next(_requests(numbers(), 1)), 64)
    request = address.head("POST", shape.path) + b"%d\r\n\r\n%b" % (len(body), body)
    left, done = [amount, amount], asyncio.Event()
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: _Generator(request, left, done), address.host, address.port)
        for _ in range(concurrency)
    ]
    await done.wait()
    for transport, _ in made:
        transport.close()
