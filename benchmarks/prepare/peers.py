"""The contenders of `python -m benchmarks prepare`, each run as a script: NAME CORPUS TOKENIZER OUTPUT WORKERS.

It prints a line of JSON, whose cpu_s is of this process alone. datatrove may live in another environment, so nothing of
this project is imported up here.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

EOD = "<|endoftext|>"
CHUNK = 32  # documents that Megatron-LM hands to a worker at a time

Timed = tuple[float, float, list[np.ndarray]]


def megatron_synth(corpus: Path, tokenizer: Path, output: Path, workers: int) -> Timed:
    """Our own verb."""
    from megatron_synth.config.prepare import PrepareConfig
    from megatron_synth.data.preparing.prepare import prepare
    from megatron_synth.data.shards.source import open_source  # noqa: F401  # imports count for nobody

    source = {"kind": "natural", "input": str(corpus / "*.jsonl")}
    settings = {"output": str(output), "tokenizer": {"path": str(tokenizer), "eod": EOD}, "sources": {"web": source}}
    config = PrepareConfig.model_validate(settings)
    start, cpu = time.perf_counter(), time.process_time()
    made = prepare(config, workers=workers)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert made is not None
    manifest = made[0].manifest
    return seconds, cpu, [np.fromfile(output / "web" / f"{shard.name}.bin", manifest.dtype) for shard in manifest.shards]


_encoder: Any = None


def _start_encoder(tokenizer: str) -> None:
    global _encoder
    from tokenizers import Tokenizer

    _encoder = Tokenizer.from_file(tokenizer)
    _encoder.encode_special_tokens = True  # as ours reads text


def _encode(line: str) -> tuple[list[int], int]:
    ids = _encoder.encode(json.loads(line)["text"], add_special_tokens=False).ids
    ids.append(_encoder.token_to_id(EOD))
    return ids, len(line)


def megatron_lm(corpus: Path, tokenizer: Path, output: Path, workers: int) -> Timed:
    """How Megatron-LM preprocesses: lines to a Pool, one encode per document, lists of ids back to one writer."""
    import warnings

    warnings.simplefilter("ignore")
    import tokenizers  # noqa: F401  # imports count for nobody
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def lines() -> Iterator[str]:
        for path in sorted(corpus.glob("*.jsonl")):
            with open(path, encoding="utf-8") as file:
                yield from file

    output.mkdir()
    start, cpu = time.perf_counter(), time.process_time()
    builder = IndexedDatasetBuilder(str(output / "web.bin"), dtype=np.uint16)
    with multiprocessing.get_context("fork").Pool(workers, initializer=_start_encoder, initargs=(str(tokenizer),)) as pool:
        for ids, _ in pool.imap(_encode, lines(), CHUNK):
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(output / "web.idx"))
        pool.close()
        pool.join()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return seconds, cpu, [np.fromfile(output / "web.bin", np.uint16)]


def datatrove(corpus: Path, tokenizer: Path, output: Path, workers: int) -> Timed:
    """Datatrove's own tokenizing pipeline, a file per task."""
    from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
    from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found]
    from datatrove.pipeline.tokens import DocumentTokenizer  # type: ignore[import-not-found]

    pipeline = [
        JsonlReader(str(corpus), glob_pattern="*.jsonl"),
        DocumentTokenizer(
            str(output),
            local_working_dir=None,
            tokenizer_name_or_path=str(tokenizer),
            eos_token=EOD,
            shuffle_documents=False,
            max_tokens_per_file=None,
        ),
    ]
    start, cpu = time.perf_counter(), time.process_time()
    LocalPipelineExecutor(pipeline, tasks=workers, workers=workers, logging_dir=str(output / "logs")).run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return seconds, cpu, [np.fromfile(path, np.uint16) for path in sorted(output.glob("*.ds"))]


def token_digest(parts: Sequence[np.ndarray]) -> tuple[int, str]:
    """Number and SHA-256 of tokens, whatever type they are stored in."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.astype(np.uint32).data)
    return sum(part.size for part in parts), total.hexdigest()


def main(argv: Sequence[str]) -> None:
    """Run one contender and print what it did."""
    name, corpus, tokenizer, output, workers = argv
    contenders: dict[str, Callable[[Path, Path, Path, int], Timed]] = {
        "megatron-synth": megatron_synth,
        "megatron-lm": megatron_lm,
        "datatrove": datatrove,
    }
    folder = Path(output)
    try:
        seconds, cpu_s, parts = contenders[name](Path(corpus), Path(tokenizer), folder, int(workers))
        tokens, digest = token_digest(parts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_s": cpu_s, "sha256": digest}))


if __name__ == "__main__":
    main(sys.argv[1:])
