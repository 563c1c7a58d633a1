"""One source on its way from text to shards: read once, cut into pieces by workers, then assembled.

What is done is told to the journal, and what the journal tells is not done again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import VALID_SUFFIX, PrepareConfig, PrepareSource, Split
from megatron_synth.data.preparing.output import (
    Assembly,
    Journal,
    Packing,
    ShardTask,
    from_json,
    plan_shards,
    remove_strays,
    to_json,
    write_shard,
)
from megatron_synth.data.preparing.packing import cut_documents
from megatron_synth.data.preparing.readers import estimate_text_bytes
from megatron_synth.data.preparing.shuffle import bucket_count
from megatron_synth.data.preparing.splits import Portion, portions
from megatron_synth.data.preparing.token_runs import Piece, trim
from megatron_synth.data.preparing.workers import CHUNK_CHARACTERS, PIECE_BYTES, Job, Workers, tokenize_portion
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

STAGING = ".staging"  # of pieces, in the hidden folder


@dataclass(frozen=True)
class Prepared:
    """One finished source. seconds: time spent on it; sources that share one reading share its time."""

    manifest: Manifest
    seconds: float


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
    pool: Workers
    made: Provenance

    def run(self) -> list[Prepared]:
        """Tokenize the source and, in the same reading, its holdout; then write the shards of both."""
        name, source, journal = self.name, self.source, self.journal
        done = journal.of("source", source=name)
        if done:
            manifests = [Manifest.model_validate_json(json.dumps(one)) for one in done[0]["manifests"]]
            return [Prepared(manifest, done[0]["seconds"]) for manifest in manifests]
        start = time.perf_counter()
        targets = (name,) if source.holdout is None else (name, name + VALID_SUFFIX)
        planned = journal.of("plan", source=name)
        packing: dict[str, PackingInfo] = {}
        if planned:
            counts = {target: Counts(**count) for target, count in planned[0]["counts"].items()}
            pieces = [from_json(self.folder / STAGING, piece) for piece in planned[0]["pieces"]]
            cuts = {target: [(tuple(a), tuple(b)) for a, b in found] for target, found in planned[0]["cuts"].items()}
            packing = {target: PackingInfo(**found) for target, found in planned[0]["packing"].items()}
        else:
            pieces = self._tokenize()
            remove_strays(self.folder / STAGING, pieces)
            counts = {target: _count(pieces, target) for target in targets}
            self._refuse_empty(counts)
            cuts = {}
            for target in targets:
                assembly = self._assembly(pieces, target)
                cuts[target] = plan_shards(map(assembly.lengths, range(assembly.units)), self.config.shard_tokens)
                found = self._packing_info(assembly)
                if found is not None:
                    packing[target] = found
                    counts[target] = counts[target].model_copy(update={"tokens": counts[target].tokens + found.padding_tokens})
            plan = {
                "counts": {target: count.model_dump() for target, count in counts.items()},
                "cuts": cuts,
                "packing": {target: found.model_dump() for target, found in packing.items()},
            }
            journal.append({"kind": "plan", "source": name, "pieces": [to_json(piece) for piece in pieces], **plan})
        shards = {target: self._assemble(target, self._assembly(pieces, target), cuts[target]) for target in targets}
        manifests = [self._manifest(target, counts[target], shards[target], packing.get(target)) for target in targets]
        seconds = time.perf_counter() - start
        entry = {"manifests": [manifest.model_dump(mode="json") for manifest in manifests], "seconds": seconds}
        journal.append({"kind": "source", "source": name, **entry})
        return [Prepared(manifest, seconds) for manifest in manifests]

    def _tokenize(self) -> list[Piece]:
        """All pieces of the source in order; those of a run that was stopped are taken over."""
        config, source, name = self.config, self.source, self.name
        staging = self.folder / STAGING
        limit = source.max_bytes
        seed = None if config.shuffle is None else config.shuffle.seed
        job = Job(name, source, self.dtype, staging, seed, CHUNK_CHARACTERS, PIECE_BYTES)
        pieces: list[Piece] = []
        read = known = 0
        for entry in self.journal.of("portion", source=name):
            found = [from_json(staging, piece) for piece in entry["pieces"]]
            if not all(piece.is_whole() for piece in found):
                break
            pieces += found
            read += sum(piece.text_bytes for piece in found)
            known += 1
        remove_strays(staging, pieces)
        if limit is not None and read >= limit:
            return pieces
        numbered = islice(enumerate(portions(name, source)), known, None)
        tasks = ((job, number, portion) for number, portion in numbered)
        with (
            progress(name, estimate_text_bytes(name, source)) as bar,
            closing(self.pool.run(_tokenize_task, tasks)) as results,
        ):
            bar.update(read)
            for (_, number, _), found in results:
                size = sum(piece.text_bytes for piece in found)
                if limit is not None and read + size >= limit:
                    found = _cut(found, self.dtype, limit - read)
                self.journal.append(
                    {"kind": "portion", "source": name, "number": number, "pieces": [to_json(piece) for piece in found]}
                )
                pieces += found
                read += size
                bar.update(size)
                if limit is not None and read >= limit:
                    break
        return pieces

    def _assembly(self, pieces: list[Piece], target: str) -> Assembly:
        chosen = tuple(piece for piece in pieces if piece.target == target)
        packing = None
        # an evaluation reads a domain from front to back, and counts bits per byte of text: no padding there
        if self.config.packing is not None and self._split(target) == "train":
            packing = Packing(self.config.packing.sequence_length, self.tokenizer.eod_id)
        if self.config.shuffle is None:
            return Assembly(chosen, None, packing)
        return Assembly(chosen, bucket_count(sum(piece.tokens for piece in chosen), self.dtype.itemsize), packing)

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
        return PackingInfo(sequence_length=length, padding_tokens=packed - tokens, cut_documents=cut, cut_without=cut_without)

    def _split(self, target: str) -> Split:
        return "validation" if target != self.name else self.source.split

    def _assemble(self, target: str, assembly: Assembly, cuts: list[tuple[Any, Any]]) -> list[ShardInfo]:
        """Write the shards that are not there yet; all of them in order. Pieces that no shard needs any more are removed."""
        folder = self.folder / target
        folder.mkdir(exist_ok=True)
        known = [ShardInfo(**entry["shard"]) for entry in self.journal.of("shard", source=self.name, target=target)]
        shards = known
        tasks = (
            ShardTask(folder / f"shard-{number:05d}", self.dtype, assembly, start, end)
            for number, (start, end) in enumerate(cuts)
            if number >= len(known)
        )
        gone = 0
        with progress(f"{target} shards", sum(piece.tokens for piece in assembly.pieces)) as bar:
            with closing(self.pool.run(write_shard, tasks)) as results:
                for task, shard in results:
                    shards.append(shard)
                    self.journal.append(
                        {"kind": "shard", "source": self.name, "target": target, "shard": shard.model_dump(mode="json")}
                    )
                    bar.update(shard.tokens)
                    while assembly.buckets is None and gone < task.end[0]:
                        assembly.pieces[gone].path.unlink(missing_ok=True)
                        gone += 1
        return shards

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

    def _manifest(self, target: str, counts: Counts, shards: list[ShardInfo], packing: PackingInfo | None) -> Manifest:
        source, tokenizer = self.source, self.tokenizer
        return Manifest(
            name=target,
            kind=source.kind,
            generator=source.generator,
            split=self._split(target),
            dtype="uint16" if self.dtype == np.uint16 else "int32",
            tokenizer=TokenizerInfo(
                path=f"../{TOKENIZER}",
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
            ),
            counts=counts,
            packing=packing,
            shards=tuple(shards),
            made=self.made,
        )


def _tokenize_task(tokenizer: Tokenizer, task: tuple[Job, int, Portion]) -> list[Piece]:
    return tokenize_portion(tokenizer, *task)


def _count(pieces: list[Piece], target: str) -> Counts:
    chosen = [piece for piece in pieces if piece.target == target]
    return Counts(
        documents=sum(piece.documents for piece in chosen),
        tokens=sum(piece.tokens for piece in chosen),
        text_bytes=sum(piece.text_bytes for piece in chosen),
    )


def _cut(pieces: list[Piece], dtype: np.dtype[Any], limit: int) -> list[Piece]:
    """The documents of a portion up to and including the one that reaches `limit` bytes of text."""
    records = np.concatenate([piece.read_records() for piece in pieces])
    records = records[np.argsort(records["place"])]
    reached = int(np.searchsorted(np.cumsum(records["text_bytes"], dtype=np.int64), limit))
    cut = (trim(piece, dtype, int(records["place"][reached]) + 1) for piece in pieces)
    return [piece for piece in cut if piece is not None]


def _origin(source: PrepareSource) -> str:
    if source.input is not None:
        return ", ".join(source.input)
    return source.hf.path if source.hf is not None else f"builtin {source.builtin}"


@contextmanager
def progress(name: str, total: int) -> Iterator[Any]:
    """A bar of `total` bytes or tokens, on a terminal; 0: the end is not known."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    hidden = not sys.stderr.isatty()
    with tqdm(desc=name, total=total or None, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        yield bar
