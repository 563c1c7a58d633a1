"""`synthesize report`: the account, the cost, figures of the corpus beside its parents, and samples, on one page."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NotRequired

from pydantic import with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

import megatron_synth
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import VALID_SUFFIX
from megatron_synth.core.files import open_regular, write_atomic, write_json
from megatron_synth.core.records import OPEN, Reader
from megatron_synth.data.preparing.readers.synthesized import CORPUS, SynthesisRecord, read_record
from megatron_synth.synthesis.corpus import REJECTED
from megatron_synth.synthesis.measure.corpus import Synthetic, measure_corpus
from megatron_synth.synthesis.measure.page import Sample, render
from megatron_synth.synthesis.setup import Setup
from megatron_synth.synthesis.status import tokens_text
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

REPORT = "report.html"
FIGURES = "figures.json"
SAMPLES = 5


@with_config(OPEN)
class Entry(TypedDict):
    """A line of a corpus, or of what was rejected, as far as the page needs it."""

    text: str
    parents: list[str]
    reason: NotRequired[str]


_ENTRIES: Reader[Entry] = Reader(Entry, "give `megatron-synth synthesize run` again")


def write_report(config: SynthesisConfig) -> Path:
    """Write the page of a finished corpus and figures.json beside it; the path of the page. Parents are read three times.

    Raises:
        UserError: there is no finished corpus, it is damaged, or nothing was kept.
    """
    record = read_record(config.folder)
    setup = Setup.of(config, export=False)
    kept: list[Sample] = []
    draw = random.Random(config.seed)

    def documents() -> Iterator[Synthetic]:
        entries = _entries(config.folder / CORPUS, record.files)
        for number, (entry, parents) in enumerate(_beside(entries, setup)):
            sample = Sample(record.kind, parents, entry["text"], None)
            # reservoir sampling: each document is as likely as any other
            if len(kept) < SAMPLES:
                kept.append(sample)
            elif (place := draw.randrange(number + 1)) < SAMPLES:
                kept[place] = sample
            yield Synthetic(record.kind, parents, entry["text"])

    try:
        natural = (parent.text for parent in setup.parents)
        validation = {f"{name}{VALID_SUFFIX}": setup.parents.held_out(name) for name in setup.parents.with_holdout()}
        figures = measure_corpus(documents(), natural, validation=validation)
    except ValueError as error:
        raise UserError(
            f"{config.output}: {error}; loosen the filters and give `megatron-synth synthesize run` again"
        ) from None
    account = {"asked": record.account.asked, "kept": record.account.kept, **record.account.rejected}
    account |= {"refused by the engine": record.account.refused, "unanswered": record.account.unanswered}
    title = f"{record.template.name} by {record.generator_name}"
    samples = [*kept, *_rejected(config.folder, record, setup)]
    made_by = f"megatron-synth {megatron_synth.__version__}; {cost_text(record)}"
    file = config.folder / REPORT
    write_atomic(file, render(title, figures, samples, account=account, made_by=made_by))
    write_json(config.folder / FIGURES, asdict(figures))
    return file


def cost_text(record: SynthesisRecord) -> str:
    """What a corpus has cost, in a line."""
    cost = record.cost
    flops = "" if cost.flops is None else f", {cost.flops:.2e} FLOPs"
    corpus = f"; the corpus has {tokens_text(record.tokens)}" if record.tokens else ""
    return f"{cost.tokens_in:,} tokens read, {cost.tokens_out:,} written{flops}{corpus}; {record.license}"


def _rejected(folder: Path, record: SynthesisRecord, setup: Setup) -> Iterator[Sample]:
    """The first rejected answer of each reason."""
    seen: set[str] = set()
    wanted = set(record.account.rejected) | ({"refused"} if record.account.refused else set())
    for entry, texts in _beside(_entries(folder, [REJECTED]), setup):
        reason = entry.get("reason", "no reason")
        if reason not in seen:
            seen.add(reason)
            yield Sample(record.kind, texts, entry["text"], reason)
        if seen >= wanted:
            return


def _beside(entries: Iterable[Entry], setup: Setup) -> Iterator[tuple[Entry, tuple[str, ...]]]:
    """Entries with the texts of their parents. Both are in the order of the parents, so that only those of an entry are held;
    walks go anywhere, and all entries and parents of theirs are.
    """
    rest = iter(setup.parents)
    held: dict[str, str] = {}
    if setup.config.walks is not None:
        entries = list(entries)
        named = {name for entry in entries for name in entry["parents"]}
        everywhere = {parent.id: parent.text for parent in rest if parent.id in named}
        yield from ((entry, tuple(everywhere[name] for name in entry["parents"] if name in everywhere)) for entry in entries)
        return
    for entry in entries:
        wanted = entry["parents"]
        held = {name: text for name, text in held.items() if name in wanted}
        while not all(name in held for name in wanted):
            parent = next(rest, None)
            if parent is None:
                break  # the parents are others than when the corpus was made
            if parent.id in wanted:
                held[parent.id] = parent.text
        yield entry, tuple(held[name] for name in wanted if name in held)


def _entries(folder: Path, files: Iterable[str]) -> Iterator[Entry]:
    for name in files:
        try:
            opened = os.fdopen(open_regular(folder / name), "rb")
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror}; {_ENTRIES.remedy}") from None
        with opened:
            for number, line in enumerate(opened, start=1):
                yield _ENTRIES.parse(line, f"{folder / name}, line {number}")
