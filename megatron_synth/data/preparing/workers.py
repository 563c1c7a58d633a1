"""Worker processes: splits of text in, token runs on disk out."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron_synth.config.prepare import VALID_SUFFIX, ColumnConfig, PrepareSource
from megatron_synth.data.preparing import fim, masks
from megatron_synth.data.preparing.journal import Entry
from megatron_synth.data.preparing.output import Unfinished
from megatron_synth.data.preparing.readers.documents import Document, Part, is_held_out, with_text
from megatron_synth.data.preparing.readers.inputs import reader_of
from megatron_synth.data.preparing.readers.reader import InputSplit
from megatron_synth.data.preparing.readers.values import Value, values_of
from megatron_synth.data.preparing.shuffle import document_keys, gather
from megatron_synth.data.preparing.token_runs import TokenRun, record_type, write_run
from megatron_synth.data.shards.columns import MISSING, text_id
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

    def entry(self, source: str, number: int) -> Entry:
        """What a journal tells of it. number: of the split."""
        runs = [run.to_json() for run in self.runs]
        return {"kind": "split", "source": source, "number": number, "runs": runs, "skipped": self.skipped}


@dataclass
class _Held:
    """Documents of one target that wait to be written."""

    part: int = 0
    tokens: list[np.ndarray] = field(default_factory=list)
    records: list[np.ndarray] = field(default_factory=list)
    learned: list[np.ndarray] = field(default_factory=list)
    size: int = 0
    categories: dict[str, dict[str, int]] = field(default_factory=dict)
    """By column of that type, the number of each text."""

    def take(self, columns: tuple[tuple[str, str], ...], values: list[tuple[Value, ...]]) -> None:
        """Put the values of documents into the records that were added last."""
        for (name, kind), of_column in zip(columns, zip(*values, strict=True), strict=True):
            missing = MISSING[kind]
            stored: list[Any]
            if kind == "category":
                known = self.categories.setdefault(name, {})
                stored = [missing if one is None else known.setdefault(str(one), len(known)) for one in of_column]
            elif kind == "id":
                stored = [missing if one is None else text_id(str(one)) for one in of_column]
            else:
                stored = [missing if one is None else one for one in of_column]
            self.records[-1][f"c.{name}"] = stored


def stored_columns(columns: Mapping[str, ColumnConfig]) -> tuple[tuple[str, str], ...]:
    """Name and stored type of each column of the settings."""
    as_stored = {"host": "category", "parent": "id", "text_id": "id"}
    return tuple((name, as_stored.get(column.type, column.type)) for name, column in columns.items())


def tokenize_split(tokenizer: Tokenizer, job: Job, number: int, split: InputSplit) -> Tokenized:
    """Read and tokenize a split: token runs that were written, in order. Memory is bounded by `run_bytes`.

    Documents of which the tokenizer leaves nothing are left out. Nothing is read beyond `max_bytes` of text, all of which
    may be in one split.
    """
    held: dict[str, _Held] = {}
    runs: list[TokenRun] = []
    batch: list[tuple[str, Document, int, tuple[Value, ...]]] = []  # target, document, UTF-8 bytes, values of the columns
    columns = stored_columns(job.source.columns)
    record = record_type(columns)
    settings = job.source.fim
    cutter = None if settings is None else fim.Cutter(settings, job.name, number)
    ids = (0, 0, 0) if settings is None else fim.special_ids(tokenizer, settings, f"sources.{job.name}.fim")
    messages: list[str] = []
    skipped: list[tuple[int, str]] = []
    limit = job.source.max_bytes
    place = characters = waiting = kept = 0

    def flush() -> None:
        nonlocal place, characters, waiting, kept
        texts, learned = [document.text for _, document, _, _ in batch], None
        if job.source.masked:
            parts = [document.parts or (Part(document.text, True),) for _, document, _, _ in batch]
            tokens, lengths, learned = masks.encode(tokenizer, parts, job.dtype)
        elif settings is None or cutter is None:
            tokens, lengths = tokenizer.encode(texts, job.dtype)
        else:
            cuts = [cutter.next() if target == job.name else None for target, _, _, _ in batch]
            tokens, lengths = fim.encode(tokenizer, texts, cuts, settings, ids, job.dtype)
        records = np.zeros(len(batch), record)
        records["length"], records["text_bytes"] = lengths, [size for _, _, size, _ in batch]
        records["place"] = np.arange(place, place + len(batch))
        targets = np.array([target for target, _, _, _ in batch])
        for target in dict.fromkeys(target for target, _, _, _ in batch):
            chosen = (targets == target) & (lengths > 1)
            if not chosen.any():
                continue
            one = held.setdefault(target, _Held())
            of_tokens = slice(None) if chosen.all() else np.repeat(chosen, lengths)
            one.tokens.append(tokens[of_tokens])
            if learned is not None:
                one.learned.append(learned[of_tokens])
            one.records.append(records[chosen])
            if columns:
                one.take(columns, [values for (*_, values), taken in zip(batch, chosen, strict=True) if taken])
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
        values = document.values
        if columns and values is None:  # of an input without records
            values = values_of(job.source.columns, {}, document.text, job.name)
        batch.append((target, document, size, values or ()))
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
    learned = np.concatenate(held.learned) if held.learned else None
    if job.shuffle_seed is not None:
        records["key"] = document_keys(job.shuffle_seed, target, number, records["place"])
        order = np.argsort(records["key"], kind="stable")
        starts = np.cumsum(records["length"], dtype=np.int64) - records["length"]
        records = records[order]
        tokens = gather(tokens, starts[order], records["length"])
        learned = None if learned is None else gather(learned, starts[order], records["length"])
    columns = stored_columns(job.source.columns)
    categories = tuple(tuple(held.categories.get(name, {})) for name, _ in columns)
    run = write_run(job.folder, target, number, held.part, records, tokens, columns, categories, learned)
    held.part, held.tokens, held.records, held.learned, held.size, held.categories = held.part + 1, [], [], [], 0, {}
    return run


class Pool(Protocol):
    """Whatever runs the tasks of a preparation."""

    def run(
        self, function: Callable[[Tokenizer, Task], Result], tasks: Iterable[Task]
    ) -> Generator[tuple[Task, Result], None, None]:
        """(task, function(tokenizer, task)) of each task, in the order of the tasks; `function` is importable.

        When the generator is closed no task runs any more.

        Raises:
            Unfinished: what ran a task has died.
        """

    def close(self) -> None:
        """Nothing more will be run."""


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
            raise Unfinished(
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
