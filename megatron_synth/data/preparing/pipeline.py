"""One source on its way from text to shards: read once, cut into token runs by workers, then assembled.

What is done is recorded in the journal, and what the journal records is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import MAX_CATEGORIES, VALID_SUFFIX, PrepareConfig, PrepareSource, Split
from megatron_synth.core.files import sync_folder
from megatron_synth.data.preparing.assembly import (
    Assembly,
    Packing,
    Position,
    ShardTask,
    columns_of,
    is_whole,
    plan_shards,
    write_shard,
)
from megatron_synth.data.preparing.journal import Journal
from megatron_synth.data.preparing.output import remove, remove_strays
from megatron_synth.data.preparing.packing import cut_documents
from megatron_synth.data.preparing.progress import progress
from megatron_synth.data.preparing.readers.inputs import reader_of
from megatron_synth.data.preparing.shared import Told, take_over_task, tokenize_task
from megatron_synth.data.preparing.shuffle import bucket_count
from megatron_synth.data.preparing.token_runs import TokenRun, trim
from megatron_synth.data.preparing.workers import (
    CHUNK_CHARACTERS,
    RUN_BYTES,
    Job,
    Pool,
    Tokenized,
    stored_columns,
)
from megatron_synth.data.shards.columns import ColumnInfo
from megatron_synth.data.shards.manifest import (
    Counts,
    Manifest,
    PackingInfo,
    Provenance,
    ShardInfo,
    TokenizerInfo,
)
from megatron_synth.data.tokenizer import FILE_NAME as TOKENIZER
from megatron_synth.data.tokenizer import Tokenizer

SHOWN_ERRORS = 5
STAGING = ".staging"  # in the hidden folder: a folder of token runs for each source


@dataclass(frozen=True)
class Prepared:
    """One finished source.

    seconds: time spent on it; sources that share one reading share its time.
    """

    manifest: Manifest
    seconds: float
    skipped: tuple[str, ...] = ()
    """What was wrong with records that were left out; those of a holdout are recorded with the source itself."""


@dataclass(frozen=True)
class Plan:
    """What is known of a source once it is tokenized: by target, what it holds and where its shards begin and end."""

    runs: tuple[TokenRun, ...]
    counts: dict[str, Counts]
    cuts: dict[str, list[tuple[Position, Position]]]
    packing: dict[str, PackingInfo]

    def to_json(self) -> dict[str, Any]:
        """The plan as the journal tells of it."""
        return {
            "runs": [run.to_json() for run in self.runs],
            "counts": {target: count.model_dump() for target, count in self.counts.items()},
            "cuts": self.cuts,
            "packing": {target: found.model_dump() for target, found in self.packing.items()},
        }

    @classmethod
    def from_json(cls, staging: Path, entry: Mapping[str, Any]) -> Plan:
        """The plan that the journal tells of."""
        return cls(
            runs=tuple(TokenRun.from_json(staging, run) for run in entry["runs"]),
            counts={target: Counts(**count) for target, count in entry["counts"].items()},
            cuts={target: [(tuple(a), tuple(b)) for a, b in found] for target, found in entry["cuts"].items()},
            packing={target: PackingInfo(**found) for target, found in entry["packing"].items()},
        )


@dataclass(frozen=True)
class SourceWork:
    """One source on its way from text to shards."""

    name: str
    source: PrepareSource
    config: PrepareConfig
    tokenizer: Tokenizer
    dtype: np.dtype[Any]
    folder: Path
    journal: Journal
    pool: Pool
    made: Provenance
    shares: Mapping[tuple[str, int], Told] = field(default_factory=dict)
    """What shares have come to (shared.py)."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The source itself and, where it has one, its holdout."""
        return targets_of(self.name, self.source)

    @property
    def staging(self) -> Path:
        """The folder of the token runs: of this source alone."""
        return self.folder / STAGING / self.name

    def run(self) -> list[Prepared]:
        """Tokenize the source and, in the same reading, its holdout; then write the shards of both.

        What a run before this one has done is not done again where its files are as they were written.
        """
        prepared = self._finished()
        if prepared is not None:
            return prepared
        start = time.perf_counter()
        self.staging.mkdir(parents=True, exist_ok=True)
        plan = self._planned() or self._plan(self._tokenize())
        shards = {target: self._assemble(target, plan) for target in self.targets}
        manifests = [self._manifest(target, plan, shards[target]) for target in self.targets]
        seconds = time.perf_counter() - start
        entry = {"manifests": [manifest.model_dump(mode="json") for manifest in manifests], "seconds": seconds}
        self.journal.append({"kind": "source", "source": self.name, **entry})
        remove(self.staging)
        return self._prepared(manifests, seconds)

    def _prepared(self, manifests: Iterable[Manifest], seconds: float) -> list[Prepared]:
        skipped = tuple(self._skipped())
        return [Prepared(one, seconds, skipped if one.name == self.name else ()) for one in manifests]

    def _skipped(self) -> list[str]:
        """What was wrong with the records that were left out, in the order of the input."""
        told = sorted(self.journal.of("split", source=self.name), key=itemgetter("number"))
        return [message for entry in told for _, message in entry["skipped"]]

    def _finished(self) -> list[Prepared] | None:
        """What a run before this one has finished; None where there is something to do."""
        entry = self.journal.one("source", source=self.name)
        if entry is None:
            return None
        manifests = [Manifest.model_validate_json(json.dumps(one)) for one in entry["manifests"]]
        if not all(is_whole(self.folder / one.name, shard) for one in manifests for shard in one.shards):
            self._start_over()
            return None
        for one in manifests:
            remove_strays(self.folder / one.name, _files_of(one.shards))
        remove(self.staging)
        return self._prepared(manifests, entry["seconds"])

    def _start_over(self) -> None:
        """Forget all that was done for this source."""
        self.journal.drop(entry for entry in self.journal.entries if entry.get("source") == self.name)
        for path in [self.staging, *(self.folder / target for target in self.targets)]:
            remove(path)
        self.staging.mkdir(parents=True)

    def _planned(self) -> Plan | None:
        """The plan that a run before this one has made, when its shards and what the others are made of are whole."""
        entry = self.journal.one("plan", source=self.name)
        if entry is None:
            return None
        plan = Plan.from_json(self.staging, entry)
        needed: set[TokenRun] = set()
        for target in self.targets:
            told = self.journal.of("shard", source=self.name, target=target)
            whole = [one for one in told if is_whole(self.folder / target, ShardInfo(**one["shard"]))]
            self.journal.drop(one for one in told if one not in whole)
            done = {one["number"] for one in whole}
            assembly = self._assembly(plan.runs, target)
            for number, (start, end) in enumerate(plan.cuts[target]):
                if number not in done:
                    needed.update(assembly.runs_of(start[0], end[0] + (end[1] > 0)))
        if all(run.is_whole() for run in needed):
            return plan
        self._start_over()
        return None

    def _plan(self, runs: list[TokenRun]) -> Plan:
        plan = Plan(tuple(runs), {target: _count(runs, target) for target in self.targets}, {}, {})
        self._refuse_empty(plan.counts)
        self._refuse_bad_columns(runs)
        self._refuse_unused_parts(runs)
        for target in self.targets:
            assembly = self._assembly(plan.runs, target)
            plan.cuts[target] = plan_shards(map(assembly.lengths, range(assembly.units)), self.config.shard_tokens)
            found = self._packing_info(assembly)
            if found is not None:
                plan.packing[target] = found
                tokens = plan.counts[target].tokens + found.padding_tokens
                plan.counts[target] = plan.counts[target].model_copy(update={"tokens": tokens})
        self.journal.append({"kind": "plan", "source": self.name, **plan.to_json()})
        return plan

    def _known_runs(self) -> dict[int, list[TokenRun]]:
        """By split the token runs of a stopped preparation, but for missing or damaged ones, and then those of shares.

        What is not among them is taken back from the journal, so that it never counts again. Where `max_bytes` ends the source
        somewhere nothing counts that comes after the first missing one.
        """
        told = self.journal.of("split", source=self.name)
        by_number = {entry["number"]: entry for entry in told}
        known: dict[int, list[TokenRun]] = {}
        for number in sorted(by_number):
            if self.source.max_bytes is not None and number != len(known):
                break
            found = [TokenRun.from_json(self.staging, run) for run in by_number[number]["runs"]]
            if all(run.is_whole() for run in found):
                known[number] = found
        self.journal.drop(entry for entry in told if entry["number"] not in known)
        remove_strays(self.staging, {run.path.name for found in known.values() for run in found})
        if self.source.max_bytes is None:
            of_others = (
                (share, self.staging)
                for (name, number), share in sorted(self.shares.items())
                if name == self.name and number not in known
            )
            # the checksums of all token runs: as much to read as the shards themselves are
            for (share, _), taken in self.pool.run(take_over_task, of_others):
                if taken is not None:
                    sync_folder(self.staging)
                    skipped = tuple((at, text) for at, text in share.entry["skipped"])
                    self._tell(share.entry["number"], Tokenized(tuple(taken), skipped))
                    known[share.entry["number"]] = taken
        return known

    def _tell(self, number: int, found: Tokenized) -> None:
        self.journal.append(found.entry(self.name, number))
        self._refuse_too_many_errors()

    def _tokenize(self) -> list[TokenRun]:
        """All token runs of the source in order; those of a preparation that was stopped are taken over."""
        config, source, name = self.config, self.source, self.name
        limit = source.max_bytes
        seed = None if config.shuffle is None else config.shuffle.seed
        job = Job(name, source, self.dtype, self.staging, seed, CHUNK_CHARACTERS, RUN_BYTES)
        known = self._known_runs()
        read = sum(run.text_bytes for found in known.values() for run in found)
        if limit is not None and read >= limit:
            return _in_order(known)
        reader = reader_of(name, source)
        tasks = ((job, number, split) for number, split in enumerate(reader.splits()) if number not in known)
        expected = reader.text_bytes() if limit is None else min(reader.text_bytes(), limit)
        with progress(name, expected) as bar, closing(self.pool.run(tokenize_task, tasks)) as results:
            bar.update(read)
            for (_, number, _), found in results:
                if limit is not None and read + found.text_bytes >= limit:
                    found = _cut(found, self.dtype, limit - read)
                self._tell(number, found)
                known[number] = list(found.runs)
                read += found.text_bytes
                bar.update(found.text_bytes)
                if limit is not None and read >= limit:
                    break
        return _in_order(known)

    def _refuse_too_many_errors(self) -> None:
        skipped, most = self._skipped(), self.source.max_errors
        if len(skipped) > most:
            shown = "".join(f"\n  {message}" for message in skipped[:SHOWN_ERRORS])
            raise UserError(
                f"sources.{self.name}: more than max_errors = {most} records are no text; the first are{shown}\n"
                f"fix the input, or raise max_errors"
            )

    def _assembly(self, runs: tuple[TokenRun, ...], target: str) -> Assembly:
        chosen = tuple(run for run in runs if run.target == target)
        packing = None
        # an evaluation reads a domain from front to back, and counts bits per byte of text: no padding there
        if self.config.packing is not None and self._split(target) == "train":
            packing = Packing(self.config.packing.sequence_length, self.tokenizer.eod_id)
        columns = self._columns(runs)
        if self.config.shuffle is None:
            return Assembly(chosen, None, packing, columns)
        return Assembly(chosen, bucket_count(sum(run.tokens for run in chosen), self.dtype.itemsize), packing, columns)

    def _columns(self, runs: Iterable[TokenRun]) -> tuple[ColumnInfo, ...]:
        """The columns of the source and of its holdout, which share their categories."""
        described = self.source.columns.items()
        stored = zip(described, stored_columns(self.source.columns), strict=True)
        columns = [ColumnInfo(name=name, type=kind, parent=one.type == "parent") for (name, one), (_, kind) in stored]
        return columns_of(runs, columns)

    def _refuse_unused_parts(self, runs: list[TokenRun]) -> None:
        """A prompt that no record has, or chats of which all is learned: most likely a mistake."""
        if self.source.masked and all(run.learned == run.tokens for run in runs):
            setting, field = "messages.field", self.source.main_key
            if self.source.prompt is not None:
                setting, field = "prompt.field", self.source.prompt.field
            raise UserError(
                f"sources.{self.name}.{setting}: no document has a part that is not learned; set it to the field or column of "
                f"the input that holds it, {field!r} is none, or leave it out"
            )

    def _refuse_bad_columns(self, runs: list[TokenRun]) -> None:
        """Columns of which no document has a value, and categories that are too many: most likely a mistake."""
        for column in self._columns(runs):
            where = f"sources.{self.name}.columns.{column.name}"
            if len(column.categories) > MAX_CATEGORIES:
                raise UserError(
                    f"{where}: {len(column.categories)} different texts, at most {MAX_CATEGORIES} are categories; set its type "
                    "to id, by which documents can be told apart, or leave it out"
                )
            if all(column.is_missing(run.read_records()[f"c.{column.name}"]).all() for run in runs):
                raise UserError(f"{where}: no document has it; set `field` to the field or column of the input that holds it")

    @staticmethod
    def _packing_info(assembly: Assembly) -> PackingInfo | None:
        """What packing does to an assembly; None without."""
        if assembly.packing is None:
            return None
        length = assembly.packing.sequence_length
        tokens = packed = cut = cut_without = 0
        for unit in range(assembly.units):
            lengths = assembly.document_lengths(unit)
            cut += int((lengths > length).sum())
            cut_without += cut_documents(lengths, length, tokens)
            tokens += int(lengths.sum(dtype=np.int64))
            packed += int(assembly.lengths(unit).sum(dtype=np.int64))
        padding = packed - tokens + 1  # one closes the last window
        return PackingInfo(sequence_length=length, padding_tokens=padding, cut_documents=cut, cut_without=cut_without)

    def _split(self, target: str) -> Split:
        return "validation" if target != self.name else self.source.split

    def _assemble(self, target: str, plan: Plan) -> list[ShardInfo]:
        """Write the shards that are not there yet; all of them in order. Token runs that no shard needs are removed."""
        folder = self.folder / target
        folder.mkdir(exist_ok=True)
        told = self.journal.of("shard", source=self.name, target=target)
        shards = {entry["number"]: ShardInfo(**entry["shard"]) for entry in told}
        remove_strays(folder, _files_of(shards.values()))
        assembly = self._assembly(plan.runs, target)
        packed, last = assembly.packing is not None, len(plan.cuts[target]) - 1
        tasks = (
            ShardTask(folder / f"shard-{number:05d}", self.dtype, assembly, number, start, end, packed and number == last)
            for number, (start, end) in enumerate(plan.cuts[target])
            if number not in shards
        )
        gone = 0
        tokens = sum(run.tokens for run in assembly.runs)
        with progress(f"{target} shards", tokens, "tokens") as bar, closing(self.pool.run(write_shard, tasks)) as results:
            for task, shard in results:
                shards[task.number] = shard
                key = {"source": self.name, "target": target, "number": task.number}
                self.journal.append({"kind": "shard", **key, "shard": shard.model_dump(mode="json")})
                bar.update(shard.tokens)
                while assembly.buckets is None and gone < task.end[0]:
                    assembly.runs[gone].path.unlink(missing_ok=True)
                    gone += 1
        # a task that died, and was done again by another process, may have left something
        remove_strays(folder, _files_of(shards.values()))
        return [shards[number] for number in range(len(plan.cuts[target]))]

    def _refuse_empty(self, counts: dict[str, Counts]) -> None:
        name, source = self.name, self.source
        total = sum(count.documents for count in counts.values())
        if total == 0:
            raise UserError(f"sources.{name}: no text in {_origin(source)}; every document is empty")
        for target, count in counts.items():
            if count.documents == 0:
                raise UserError(
                    f"sources.{name}.holdout: {source.holdout} of {total} documents leaves none for {target!r}; "
                    f"change the share or give more text"
                )

    def _manifest(self, target: str, plan: Plan, shards: list[ShardInfo]) -> Manifest:
        source, tokenizer = self.source, self.tokenizer
        return Manifest(
            name=target,
            kind=source.kind,
            generator=reader_of(self.name, source).generator,
            split=self._split(target),
            dtype="uint16" if self.dtype == np.uint16 else "int32",
            tokenizer=TokenizerInfo(
                path=f"../{TOKENIZER}",
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
            ),
            counts=plan.counts[target],
            packing=plan.packing.get(target),
            columns=self._columns(plan.runs),
            shards=tuple(shards),
            made=self.made.model_copy(update={"skipped_records": len(self._skipped()) if target == self.name else 0}),
        )


def _in_order(by_split: Mapping[int, list[TokenRun]]) -> list[TokenRun]:
    return [run for number in sorted(by_split) for run in by_split[number]]


def targets_of(name: str, source: PrepareSource) -> tuple[str, ...]:
    """The prepared sources that a source of the settings becomes: itself and, where it has one, its holdout."""
    return (name,) if source.holdout is None else (name, name + VALID_SUFFIX)


def _files_of(shards: Iterable[ShardInfo]) -> set[str]:
    return {shard.name + suffix for shard in shards for suffix in shard.sizes}


def _count(runs: list[TokenRun], target: str) -> Counts:
    chosen = [run for run in runs if run.target == target]
    return Counts(
        documents=sum(run.documents for run in chosen),
        tokens=sum(run.tokens for run in chosen),
        text_bytes=sum(run.text_bytes for run in chosen),
    )


def _cut(found: Tokenized, dtype: np.dtype[Any], limit: int) -> Tokenized:
    """The documents of a split up to and including the one that reaches `limit` bytes of text."""
    records = np.concatenate([run.read_records() for run in found.runs])
    records = records[np.argsort(records["place"])]
    reached = int(np.searchsorted(np.cumsum(records["text_bytes"], dtype=np.int64), limit))
    last = int(records["place"][reached])
    cut = (trim(run, dtype, last + 1) for run in found.runs)
    skipped = tuple((place, message) for place, message in found.skipped if place <= last)
    return Tokenized(tuple(run for run in cut if run is not None), skipped)


def _origin(source: PrepareSource) -> str:
    if source.input is not None:
        return ", ".join(source.input)
    if source.synthesized is not None:
        return source.synthesized
    return source.hf.path if source.hf is not None else f"builtin {source.builtin}"
