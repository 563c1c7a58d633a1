"""`python -m benchmarks synthesis-vllm`: tokens/s of the client of `synthesize` beside those of `vllm bench serve`.

A vLLM is started as `engine: vllm` does it: on the loopback, with a key, watched. Turn by turn its own load generator and the
client send as many prompts of random tokens to it, as long and with as many in flight, so that both meet the same server in the
same minutes. What is compared are tokens written a second. The model may be made up: speed does not ask what it says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_synth.bench import tables
from megatron_synth.cli.options.types import count
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.synthesis import EngineConfig, SamplingConfig
from megatron_synth.core.log import show, table
from megatron_synth.synthesis.answers.parts import Answer
from megatron_synth.synthesis.documents.chunks import Chunk
from megatron_synth.synthesis.documents.parents import Parent
from megatron_synth.synthesis.engines.protocol import Shape
from megatron_synth.synthesis.engines.vllm import Vllm
from megatron_synth.synthesis.requests import Prompt, Request, digest

_RATE = re.compile(r"Output token throughput \(tok/s\):\s+([\d.]+)")


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks synthesis-vllm", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a model of Hugging Face with its tokenizer.json")
    parser.add_argument("--vllm", type=Path, required=True, metavar="FILE", help="the `vllm` of an environment of its own")
    parser.add_argument("--argument", action="append", default=[], metavar="WORD", help="more words for `vllm serve`")
    parser.add_argument("--requests", type=count, default=512, help="in a round (%(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="of each (%(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=100)
    parser.add_argument("--max-tokens", type=count, default=64)
    parser.add_argument("--concurrency", type=count, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(argv)
    if not os.access(options.vllm, os.X_OK):
        raise UserError(f"--vllm: {options.vllm} is no program")
    if not (options.model / "tokenizer.json").is_file():
        raise UserError(f"{options.model}: has no tokenizer.json")
    os.environ["PATH"] = f"{options.vllm.resolve().parent}{os.pathsep}{os.environ['PATH']}"
    assert shutil.which("vllm")
    figures = _measure(options)
    show(_table(figures))
    show(json.dumps(figures))
    if options.json is not None:
        options.json.write_text(json.dumps({**tables.header("", []), **figures}, indent=2) + "\n")
    return EXIT_OK


def _table(figures: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        ("", "tokens/s written, median"),
        ("vllm bench serve", f"{statistics.median(figures['vllm_bench']):,.0f}"),
        ("client", f"{statistics.median(figures['client']):,.0f}"),
        ("client / vllm bench serve, median of the rounds", f"{figures['ratio']:.3f}"),
    ]
    return table(rows)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = str(options.model.resolve())
    settings = EngineConfig(name="vllm", concurrency=options.concurrency, arguments=tuple(options.argument))
    shape = Shape(model, "completions", SamplingConfig(temperature=1.0, top_p=1.0, max_tokens=options.max_tokens), ())
    theirs, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        engine = Vllm(model, None, settings, shape, Path(folder) / "vllm.log")
        try:
            engine.check()
            _client(engine, options, 0)  # the server warms up
            for number in range(1, options.rounds + 1):
                theirs.append(_vllm_bench(engine, model, options, number))
                ours.append(_client(engine, options, number))
                show(f"round {number}: vllm bench {theirs[-1]:,.0f}, client {ours[-1]:,.0f} tokens/s", error=True)
        finally:
            engine.close()
    return {
        "requests": options.requests,
        "concurrency": options.concurrency,
        "vllm_bench": theirs,
        "client": ours,
        "ratio": statistics.median(one / other for one, other in zip(ours, theirs, strict=True)),
    }


def _client(engine: Vllm, options: argparse.Namespace, number: int) -> float:
    """Tokens/s of the client. Prompts differ from round to round, so that none is answered from a cache."""
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    draws = random.Random(number)
    size = tokenizer.get_vocab_size()
    parent = Parent("0" * 32, 0, "web", "")
    chunk = Chunk((parent,), "", 0, 1, options.prompt_tokens)
    asked = []
    for at in range(options.requests):
        text = tokenizer.decode([draws.randrange(size) for _ in range(options.prompt_tokens)])
        asked.append(Request(digest(["bench", number, at]), at, chunk, 0, (text,), Prompt(text=text), at))
    written = 0

    def sink(pairs: Sequence[tuple[Request, Answer]]) -> None:
        nonlocal written
        written += sum(answer.tokens_out or 0 for _, answer in pairs)

    start = time.perf_counter()
    engine.run(iter(asked), sink, options.max_tokens)
    return written / (time.perf_counter() - start)


def _vllm_bench(engine: Vllm, model: str, options: argparse.Namespace, number: int) -> float:
    """Tokens/s as vLLM's own load generator tells them."""
    (server,) = engine.servers
    words = ["vllm", "bench", "serve", "--backend", "openai", "--base-url", server.url.removesuffix("/v1")]
    words += ["--endpoint", "/v1/completions", "--model", model, "--tokenizer", model, "--dataset-name", "random"]
    words += ["--num-prompts", str(options.requests), "--max-concurrency", str(options.concurrency), "--seed", str(number)]
    words += ["--random-input-len", str(options.prompt_tokens), "--random-output-len", str(options.max_tokens)]
    environment = {**os.environ, "OPENAI_API_KEY": server.key, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    found = _RATE.search(done.stdout)
    if done.returncode or found is None:
        raise UserError(f"vllm bench serve ended with {done.returncode}: {(done.stderr or done.stdout)[-400:]}")
    return float(found[1])
