"""From raw answers to a corpus: every request is looked up, judged and counted, and what is kept becomes documents.

This costs no generation: with other filters the same answers become another corpus. Documents stand in the order of their
parents, so that the bytes depend on the answers alone, not on the order in which they came.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import megatron_synth
from megatron_synth.config.errors import UserError
from megatron_synth.core.files import sync_folder, write_json
from megatron_synth.data.preparing.readers.files import fingerprint
from megatron_synth.data.preparing.readers.synthesized import CORPUS, RECORD, Account, Cost, SynthesisRecord
from megatron_synth.synthesis import licenses
from megatron_synth.synthesis.answers.parts import REFUSED, Answers, Line
from megatron_synth.synthesis.documents.counting import TokenCounter
from megatron_synth.synthesis.filters.base import Candidate, Filters, Verdict
from megatron_synth.synthesis.kinds.template import as_json
from megatron_synth.synthesis.recombined import extraction_record, is_asked
from megatron_synth.synthesis.requests import Request
from megatron_synth.synthesis.setup import Counted, Setup

FILE_BYTES = 2**28
FORWARD_FLOPS_PER_PARAMETER = 2
"""A multiply and an add; attention over the context is not counted."""
REJECTED = "rejected.jsonl"
PARTIAL = ".partial"


@dataclass
class Tally:
    """What is counted while answers are judged."""

    asked: int = 0
    kept: int = 0
    refused: int = 0
    unanswered: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    untold: int = 0

    def take(self, line: Line) -> None:
        """Count what an answer has cost."""
        tokens_in, tokens_out = line["tokens_in"], line["tokens_out"]
        if tokens_in is None or tokens_out is None:
            self.untold += line["finish"] != REFUSED
            return
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out
        self.tokens_cached += min(line["cached"], tokens_in)

    def account(self) -> Account:
        """The account, which must add up."""
        rejected = dict(sorted(self.rejected.items()))
        account = Account(asked=self.asked, kept=self.kept, rejected=rejected, refused=self.refused, unanswered=self.unanswered)
        assert account.is_balanced(), account
        return account

    def cost(self, parameters: int | None) -> Cost:
        """What generation took."""
        computed = self.tokens_in - self.tokens_cached + self.tokens_out
        flops = None if parameters is None else float(FORWARD_FLOPS_PER_PARAMETER * parameters * computed)
        return Cost(
            tokens_in=self.tokens_in,
            tokens_cached=self.tokens_cached,
            tokens_out=self.tokens_out,
            untold=self.untold,
            flops=flops,
        )


def make_corpus(setup: Setup, answers: Answers, filters: Filters, facts: dict[str, Any]) -> SynthesisRecord | Account:
    """Judge all answers and write the corpus; the account alone where too many requests have no answer.

    facts: what the engine said of itself.

    Raises:
        UserError: an answer is damaged, or the disk is full or fails.
    """
    config = setup.config
    partial = config.folder / f"{CORPUS}{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        counted, tally = Counted(), Tally()
        spool = partial / "judged"
        with open(spool, "w", encoding="utf-8") as file:
            late = filters.finish(_judged(setup, answers, counted, tally, filters, file))
        for reason in late.values():
            tally.rejected[reason] += 1
            tally.kept -= 1
        account = tally.account()
        if account.unanswered > config.max_unanswered:
            return account
        written = _write(setup, spool, late, partial)
        spool.unlink()
        record = _record(setup, counted, tally, account, facts, written, partial)
        _put(config.folder, partial, record)
        return record
    except OSError as error:
        reason = f"{error.strerror or error}; all {len(answers)} answers are kept; make room and give the same command again"
        raise UserError(f"{config.folder}: {reason}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _judged(
    setup: Setup, answers: Answers, counted: Counted, tally: Tally, filters: Filters, spool: IO[str]
) -> Iterator[tuple[str, Verdict]]:
    """Verdicts by key; what is needed of each to write it later goes to `spool`."""
    beginning = setup.template.beginning(setup.config.generator.api)
    for request in setup.requests(counted):
        tally.asked += 1
        line = answers.read(request.key)
        if line is None:
            tally.unanswered += 1
            continue
        tally.take(line)
        if line["finish"] == REFUSED:
            tally.refused += 1
            _spool(spool, request, line["text"], REFUSED)
            continue
        text = beginning + line["text"]
        verdict = filters.judge(Candidate(setup.template.source_kind, request.material, text, line["finish"]))
        if verdict.kept:
            tally.kept += 1
        else:
            assert verdict.reason is not None
            tally.rejected[verdict.reason] += 1
        _spool(spool, request, verdict.text if verdict.kept else text, verdict.reason)
        yield request.key, verdict


def _spool(spool: IO[str], request: Request, text: str, reason: str | None) -> None:
    parents = [parent.id for parent in request.chunk.parents]
    first = request.chunk.parents[0]
    entry = {
        "key": request.key,
        "order": first.order,
        "source": first.source,
        "parents": parents,
        "chunk": request.chunk.number,
        "of": request.chunk.of,
        "sample": request.sample,
        "reason": reason,
        "text": text,
    }
    spool.write(json.dumps(entry, ensure_ascii=False) + "\n")


@dataclass
class _Written:
    """What stands in the corpus. files: their names, in order."""

    documents: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)
    dropped: int = 0
    """Texts that were kept and stand in no document, as a chunk of theirs was not."""


def _write(setup: Setup, spool: Path, late: dict[str, str], folder: Path) -> _Written:
    """The corpus and the list of rejected answers."""
    written = _Written()
    writer = _Files(folder, written, setup.corpus_counters())
    rejected = folder / REJECTED
    with open(spool, encoding="utf-8") as lines, open(rejected, "w", encoding="utf-8") as refused:
        entries = map(json.loads, lines)
        for _, group in groupby(entries, lambda entry: (entry["order"], entry["parents"])):
            by_sample: dict[int, list[dict[str, Any]]] = {}
            for entry in group:
                reason = late.get(entry["key"], entry["reason"])
                if reason is not None:
                    refused.write(_line(key=entry["key"], reason=reason, parents=entry["parents"], text=entry["text"]))
                    continue
                by_sample.setdefault(entry["sample"], []).append(entry)
            for sample, kept in sorted(by_sample.items()):
                _documents(setup, sample, kept, writer, written)
    writer.close()
    return written


def _documents(setup: Setup, sample: int, kept: list[dict[str, Any]], writer: _Files, written: _Written) -> None:
    """The documents of one sample of one parent, given the texts of it that are kept, in order."""
    first = kept[0]
    if not setup.template.reassemble:
        for entry in kept:
            writer.add(entry, sample, entry["text"])
        return
    if len(kept) < first["of"] and setup.config.missing_chunks == "drop":
        written.dropped += len(kept)
        return
    writer.add(first, sample, "\n\n".join(entry["text"] for entry in kept))


class _Files:
    """Files of the corpus, each of FILE_BYTES or a little more."""

    def __init__(self, folder: Path, written: _Written, counters: Mapping[str, TokenCounter]):
        self._folder, self._written, self._counters = folder, written, counters
        self._file: IO[str] | None = None

    def add(self, entry: dict[str, Any], sample: int, text: str) -> None:
        """Write a document."""
        if self._file is None or self._file.tell() >= FILE_BYTES:
            self.close()
            self._written.files.append(f"part-{len(self._written.files):05d}.jsonl")
            self._file = open(self._folder / self._written.files[-1], "w", encoding="utf-8")  # noqa: SIM115
        number = f"{entry['parents'][0]}-{entry['chunk']}-{sample}"
        self._file.write(_line(id=number, text=text, parents=entry["parents"], source=entry["source"]))
        self._written.documents += 1
        for name, counter in self._counters.items():
            self._written.tokens[name] += counter.count([text])[0]

    def close(self) -> None:
        """Finish the last file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(**entry: Any) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _record(
    setup: Setup, counted: Counted, tally: Tally, account: Account, facts: dict[str, Any], written: _Written, folder: Path
) -> SynthesisRecord:
    config = setup.config
    skipped = {
        "short_parents": counted.skipped.short,
        "repeated_requests": counted.asking.repeated,
        "without_keywords": counted.asking.without_keywords,
        "kept_beside_missing_chunks": written.dropped,
    }
    return SynthesisRecord(
        program=f"megatron-synth {megatron_synth.__version__}",
        kind=setup.template.source_kind,
        template=as_json(setup.template),
        generator=setup.about_generator(facts),
        generator_name=setup.generator.name,
        sampling=config.sampling.model_dump(mode="json"),
        seed=config.seed,
        filters=config.filters.model_dump(mode="json"),
        settings_digest=config.settings_digest(),
        parents=setup.parents.describe(),
        documents=written.documents,
        tokens={name: written.tokens[name] for name in setup.corpus_counters()},
        parent_documents=counted.documents,
        skipped=skipped,
        account=account,
        cost=_cost(setup, tally),
        license=licenses.warning(setup.generator.license),
        files=written.files,
        fingerprint=fingerprint(folder / name for name in written.files),
    )


def _cost(setup: Setup, tally: Tally) -> Cost:
    """What generation took, that of the concepts before it included."""
    cost = tally.cost(setup.parameters)
    if not is_asked(setup.config):
        return cost
    first = extraction_record(setup.config).cost
    return Cost(
        tokens_in=cost.tokens_in + first.tokens_in,
        tokens_cached=cost.tokens_cached + first.tokens_cached,
        tokens_out=cost.tokens_out + first.tokens_out,
        untold=cost.untold + first.untold,
        flops=None if cost.flops is None or first.flops is None else cost.flops + first.flops,
    )


def _put(output: Path, partial: Path, record: SynthesisRecord) -> None:
    """Put the corpus in its place. Without its record, which is taken away first and comes last, it is no corpus."""
    (output / RECORD).unlink(missing_ok=True)
    (partial / REJECTED).replace(output / REJECTED)
    sync_folder(partial)
    shutil.rmtree(output / CORPUS, ignore_errors=True)
    partial.replace(output / CORPUS)
    write_json(output / RECORD, record.model_dump(mode="json"))
    sync_folder(output)
