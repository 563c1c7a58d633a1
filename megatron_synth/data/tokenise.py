"""Tokenising in worker processes: chunks of texts in, token arrays out, in the order of the chunks."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.data.tokenizer import Tokenizer

CHUNKS_PER_WORKER = 3  # in flight: enough to keep workers busy, and a bound on memory


@dataclass(frozen=True)
class Tokens:
    """Tokenised documents: tokens [T], one after the other, lengths [N], and the UTF-8 bytes of their text."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int


def tokenised(
    chunks: Iterable[tuple[str, list[str]]], tokenizer: Tokenizer, dtype: np.dtype[Any], workers: int
) -> Generator[tuple[str, Tokens], None, None]:
    """Tokenise chunks, in their order, in this process or in `workers` others; each runs on one thread."""
    if workers == 1:
        with _one_thread():
            for target, texts in chunks:
                yield target, _tokenise(tokenizer, dtype, texts)
        return
    arguments = (tokenizer.content, tokenizer.eod, dtype)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=arguments)
    waiting: deque[tuple[str, Future[Tokens]]] = deque()
    try:
        for target, texts in chunks:
            waiting.append((target, pool.submit(_work, texts)))
            if len(waiting) >= workers * CHUNKS_PER_WORKER:
                target, future = waiting.popleft()
                yield target, future.result()
        while waiting:
            target, future = waiting.popleft()
            yield target, future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died, most likely for want of memory; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, np.dtype[Any]] | None = None


def _start_worker(content: str, eod: str, dtype: np.dtype[Any]) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers ^C
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        # a killed parent cannot stop its workers, and they would wait for work for ever
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker = (Tokenizer(content, eod), dtype)


def _work(texts: list[str]) -> Tokens:
    assert _worker is not None
    return _tokenise(*_worker, texts)


def _tokenise(tokenizer: Tokenizer, dtype: np.dtype[Any], texts: list[str]) -> Tokens:
    tokens, lengths = tokenizer.encode(texts, dtype)
    return Tokens(tokens, lengths, sum(len(text.encode()) for text in texts))


@contextmanager
def _one_thread() -> Iterator[None]:
    """`tokenizers` starts a thread per core unless told not to: --workers says how many cores to use."""
    key = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(key)
    os.environ[key] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
