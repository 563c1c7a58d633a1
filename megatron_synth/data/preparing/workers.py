"""Worker processes: splits of text in, token runs on disk out."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import VALID_SUFFIX, PrepareSource
from megatron_synth.data.preparing.readers.documents import is_held_out, with_text
from megatron_synth.data.preparing.readers.inputs import reader_of
from megatron_synth.data.preparing.readers.reader import InputSplit
from megatron_synth.data.preparing.shuffle import document_keys, gather
from megatron_synth.data.preparing.token_runs import RECORD, TokenRun, write_run
from megatron_synth.data.tokenizer import Tokenizer

CHUNK_CHARACTERS = 2**19  # of text that is tokenized at once
RUN_BYTES = 16 * 2**20  # of tokens that a worker holds
TASKS_PER_WORKER = 2  # in flight: enough to keep workers busy, and a bound on memory

Task = TypeVar("Task")
Result = TypeVar("Result")


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """What workers need to know beside the split: of one source.

    shuffle_seed: None keeps the order of the input; chunk_characters, run_bytes: see the constants of this module.
    """

    name: str
    source: PrepareSource
    dtype: np.dtype[Any]
    folder: Path
    shuffle_seed: int | None
    chunk_characters: int
    run_bytes: int


@dataclass(frozen=True)
class Tokenized:
    """What a split has become. skipped: of each bad record how many documents with text came before it, and what is wrong."""

    runs: tuple[TokenRun, ...]
    skipped: tuple[tuple[int, str], ...] = ()

    @property
    def text_bytes(self) -> int:
        """Of all token runs."""
        return sum(run.text_bytes for run in self.runs)


@dataclass
class _Held:
    """Documents of one target that wait to be written."""

    part: int = 0
    tokens: list[np.ndarray] = field(default_factory=list)
    records: list[np.ndarray] = field(default_factory=list)
    size: int = 0


def tokenize_split(tokenizer: Tokenizer, job: Job, number: int, split: InputSplit) -> Tokenized:
    """Read and tokenize a split: token runs that were written, in order. Memory is bounded by `run_bytes`.

    Documents of which the tokenizer leaves nothing are left out. Nothing is read beyond `max_bytes` of text, all of which
    may be in one split.
    """
    held: dict[str, _Held] = {}
    runs: list[TokenRun] = []
    batch: list[tuple[str, str, int]] = []  # target, text, UTF-8 bytes
    messages: list[str] = []
    skipped: list[tuple[int, str]] = []
    limit = job.source.max_bytes
    place = characters = waiting = kept = 0

    def flush() -> None:
        nonlocal place, characters, waiting, kept
        tokens, lengths = tokenizer.encode([text for _, text, _ in batch], job.dtype)
        records = np.zeros(len(batch), RECORD)
        records["length"], records["text_bytes"] = lengths, [size for _, _, size in batch]
        records["place"] = np.arange(place, place + len(batch))
        targets = np.array([target for target, _, _ in batch])
        for target in dict.fromkeys(target for target, _, _ in batch):
            chosen = (targets == target) & (lengths > 1)
            if not chosen.any():
                continue
            one = held.setdefault(target, _Held())
            one.tokens.append(tokens if chosen.all() else tokens[np.repeat(chosen, lengths)])
            one.records.append(records[chosen])
            one.size += one.tokens[-1].nbytes
            if one.size >= job.run_bytes:
                runs.append(_write(job, target, number, one))
        place += len(batch)
        kept += int(records["text_bytes"][lengths > 1].sum(dtype=np.int64))
        characters = waiting = 0
        batch.clear()

    holdout: Fraction | None = job.source.holdout
    reader = reader_of(job.name, job.source)
    for document, size in with_text(job.name, job.source, reader.documents(split), messages):
        skipped += [(place + len(batch), message) for message in messages]
        messages.clear()
        target = job.name + VALID_SUFFIX if holdout is not None and is_held_out(document.key, holdout) else job.name
        batch.append((target, document.text, size))
        characters += len(document.text)
        waiting += size
        if characters >= job.chunk_characters or (limit is not None and kept + waiting >= limit):
            flush()
        if limit is not None and kept >= limit:
            break
    else:
        skipped += [(place + len(batch), message) for message in messages]
    if batch:
        flush()
    runs += [_write(job, target, number, one) for target, one in held.items() if one.size]
    return Tokenized(tuple(runs), tuple(skipped))


def _write(job: Job, target: str, number: int, held: _Held) -> TokenRun:
    tokens, records = np.concatenate(held.tokens), np.concatenate(held.records)
    if job.shuffle_seed is not None:
        records["key"] = document_keys(job.shuffle_seed, target, number, records["place"])
        order = np.argsort(records["key"], kind="stable")
        starts = np.cumsum(records["length"], dtype=np.int64) - records["length"]
        records = records[order]
        tokens = gather(tokens, starts[order], records["length"])
    run = write_run(job.folder, target, number, held.part, records, tokens)
    held.part, held.tokens, held.records, held.size = held.part + 1, [], [], 0
    return run


class Workers:
    """Runs tasks in this process or in `count` others, each on one thread; results come in the order of the tasks."""

    def __init__(self, tokenizer: Tokenizer, count: int):
        self._tokenizer, self._count = tokenizer, count
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self, function: Callable[[Tokenizer, Task], Result], tasks: Iterable[Task]
    ) -> Generator[tuple[Task, Result], None, None]:
        """(task, function(tokenizer, task)) of each task; `function` is importable, and few tasks are alive at a time."""
        if self._count == 1:
            with _one_thread():
                for task in tasks:
                    yield task, function(self._tokenizer, task)
            return
        if self._pool is None:
            arguments = (self._tokenizer.content, self._tokenizer.eod)
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__, "tokenizers"])  # imported once, not in each worker
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_start_worker, initargs=arguments)
        waiting: deque[tuple[Task, Future[Result]]] = deque()
        try:
            for task in tasks:
                waiting.append((task, _submit(self._pool, function, task)))
                if len(waiting) >= self._count * TASKS_PER_WORKER:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, most likely for want of memory; use fewer --workers: what is done is kept, and the "
                "same command goes on"
            ) from None
        finally:
            # what runs still writes to the folder, which the caller may remove
            wait([future for _, future in waiting if not future.cancel()])

    def close(self) -> None:
        """Stop the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_worker: Tokenizer | None = None


def _start_worker(content: str, eod: str) -> None:
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
    _worker = Tokenizer(content, eod)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Tokenizer, Task], Result], task: Task) -> Future[Result]:
    """Hand a task to the pool, which starts its workers when there is something to do.

    Raises:
        BrokenProcessPool: a worker has died, or the process that starts them.
    """
    try:
        return pool.submit(_work, function, task)
    except (EOFError, ConnectionError) as error:  # how a fork server that was killed shows itself
        raise BrokenProcessPool(str(error)) from error


def _work(function: Callable[[Tokenizer, Task], Result], task: Task) -> Result:
    assert _worker is not None
    return function(_worker, task)


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
