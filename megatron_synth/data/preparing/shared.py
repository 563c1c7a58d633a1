"""Shares of a preparation, done by processes that know nothing of each other: on nodes of a cluster, or side by side.

    .OUTPUT.shares/tokenizer.json              trained by the first that comes, where none is given; and a journal that says so
    .OUTPUT.shares/share-00003-of-00016/       of one share: its journal, and its token runs

Share K of N has the splits whose number is K modulo N. What is done stands in the journals and nowhere else: a process that was
killed goes on where it was, with another N too, and what any journal tells is not done twice. The preparation itself, without a
share, takes all of it over, does what is lacking, and assembles the shards: the same bytes as alone.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.core.lock import Held, Lock, holder
from megatron_synth.core.log import show
from megatron_synth.core.share import Share
from megatron_synth.data.preparing.journal import JOURNAL, Entry, Journal, read_journal
from megatron_synth.data.preparing.output import lock_file, partial_folders, remove, remove_strays
from megatron_synth.data.preparing.progress import progress
from megatron_synth.data.preparing.readers.reader import InputSplit, Reader
from megatron_synth.data.preparing.token_runs import TokenRun
from megatron_synth.data.preparing.workers import CHUNK_CHARACTERS, RUN_BYTES, Job, Tokenized, Workers, tokenize_split
from megatron_synth.data.tokenizer import Tokenizer

RUNS, LOCK = "runs", ".lock"
FOLDERS = "share-*"
_WAIT_S = 1.0


@dataclass(frozen=True)
class Told:
    """What the journal of a share tells of one split."""

    folder: Path
    entry: Entry

    def runs(self) -> list[TokenRun]:
        """The token runs that it has become."""
        return [TokenRun.from_json(self.folder / RUNS / self.entry["source"], run) for run in self.entry["runs"]]


def folder_of(output: Path) -> Path:
    """Where those who do shares of an output write."""
    return output.with_name(f".{output.name}.shares")


def told_by_all(output: Path, head: Mapping[str, Any], tokenizer: str) -> dict[tuple[str, int], Told]:
    """By source and number of the split what the shares have come to, with these settings and this tokenizer (its SHA-256)."""
    found: dict[tuple[str, int], Told] = {}
    for path in sorted(folder_of(output).glob(f"{FOLDERS}/{JOURNAL}")):
        entries = read_journal(path)
        if not entries or entries[0] != head or {"kind": "tokenizer", "sha256": tokenizer} not in entries:
            continue
        for entry in entries[1:]:
            if entry["kind"] == "split":
                found.setdefault((entry["source"], entry["number"]), Told(path.parent, entry))
    return found


def shared_lock(output: Path) -> Lock:
    """Of what all shares need. Its holder trains the tokenizer."""
    return Lock(folder_of(output) / LOCK, "prepare")


@contextmanager
def wait_for(lock: Lock) -> Iterator[None]:
    """Hold a lock as soon as another process has let it go."""
    told = False
    while True:
        try:
            with lock:
                yield
                return
        except Held:
            if not told:
                show("another process trains the tokenizer; waiting for it", error=True)
                told = True
            time.sleep(_WAIT_S)


def run_share(
    config: PrepareConfig,
    readers: Mapping[str, Reader],
    tokenizer: Tokenizer,
    tokenizer_digest: str,
    dtype: np.dtype[Any],
    head: Mapping[str, Any],
    share: Share,
    workers: int,
) -> tuple[int, int]:
    """Tokenize the splits of a share that no journal tells of yet; how many these were, and how many were there.

    A source with `max_bytes` ends where its text in order reaches them: the preparation reads it, and no share.

    Raises:
        UserError: the input cannot be read, or another process does this share.
    """
    output = Path(config.output)
    folder = folder_of(output) / share.folder
    folder.mkdir(parents=True, exist_ok=True)
    made = there = 0
    with Lock(folder / LOCK, "prepare"), closing(Workers(tokenizer, workers)) as pool:
        found = read_journal(folder / JOURNAL)
        trained = {"kind": "tokenizer", "sha256": tokenizer_digest}
        if found and (found[0] != head or trained not in found):  # of other settings, inputs or tokens
            for path in (folder / JOURNAL, folder / RUNS):
                remove(path)
        journal = Journal(folder, head)
        if trained not in journal.entries:
            journal.append(trained)
        known = told_by_all(output, head, tokenizer_digest)
        for name, source in config.sources.items():
            if source.max_bytes is not None:
                show(f"{name}: has max_bytes, and is left to the preparation itself", error=True)
                continue
            runs = folder / RUNS / name
            runs.mkdir(parents=True, exist_ok=True)
            own = journal.of("split", source=name)
            whole = [entry for entry in own if all(run.is_whole() for run in Told(folder, entry).runs())]
            journal.drop(entry for entry in own if entry not in whole)
            done = {entry["number"] for entry in whole}
            done |= {number for (of, number), told in known.items() if of == name and told.folder != folder}
            remove_strays(runs, {run["path"] for entry in whole for run in entry["runs"]})
            there += len([number for number in done if share.has_batch(number)])
            seed = None if config.shuffle is None else config.shuffle.seed
            job = Job(name, source, dtype, runs, seed, CHUNK_CHARACTERS, RUN_BYTES)
            tasks = (
                (job, number, split)
                for number, split in enumerate(readers[name].splits())
                if share.has_batch(number) and number not in done
            )
            expected = readers[name].text_bytes() // share.of
            with (
                progress(f"{name}, share {share.number} of {share.of}", expected) as bar,
                closing(pool.run(tokenize_task, tasks)) as results,
            ):
                for (_, number, _), result in results:
                    journal.append(result.entry(name, number))
                    made += 1
                    bar.update(result.text_bytes)
            journal.drop(journal.of("done", source=name))
            journal.append({"kind": "done", "source": name})
    return made, there


def tokenize_task(tokenizer: Tokenizer, task: tuple[Job, int, InputSplit]) -> Tokenized:
    """What a worker does with a split."""
    return tokenize_split(tokenizer, *task)


def take_over_task(_: Tokenizer, task: tuple[Told, Path]) -> list[TokenRun] | None:
    """The token runs of a split, in the preparation's own folder; None where one is missing or damaged."""
    told, staging = task
    taken: list[TokenRun] = []
    for run in told.runs():
        if not run.is_whole():
            return None
        copy = TokenRun.from_json(staging, run.to_json())
        copy.path.unlink(missing_ok=True)
        try:
            os.link(run.path, copy.path)
        except OSError:  # not every file system has hard links
            shutil.copyfile(run.path, copy.path)
        taken.append(copy)
    return taken


def progress_text(output: Path) -> str:
    """How far an output is that is not there yet: a line for each share, and one for the whole, from their journals."""
    rows = []
    for folder in sorted(folder_of(output).glob(FOLDERS)):
        rows.append(f"{folder.name}: {_progress(read_journal(folder / JOURNAL)[1:], 'done', folder / LOCK)}")
    for folder in partial_folders(output):
        rows.append(f"{output}: {_progress(read_journal(folder / JOURNAL)[1:], 'source', lock_file(output))}")
    return "\n".join(rows) if rows else f"{output}: nothing of it has begun"


def _progress(entries: list[Entry], end: str, lock: Path) -> str:
    """What a journal tells, in words. end: kind of the entry after all that is done for a source."""
    splits = [entry for entry in entries if entry["kind"] == "split"]
    tokens = sum(run["tokens"] for entry in splits for run in entry["runs"])
    skipped = sum(len(entry["skipped"]) for entry in splits)
    bad = f", {skipped:,} bad records" if skipped else ""
    written = len([entry for entry in entries if entry["kind"] == "shard"])
    shards = f", {written:,} shards written" if written else ""
    ended = [entry["source"] for entry in entries if entry["kind"] == end]
    at_work = "" if holder(lock) is None else "; at work, or died there"
    return f"{len(splits):,} splits, {tokens:,} tokens{bad}{shards}; done: {', '.join(ended) or 'none'}{at_work}"
