"""`synthesize status` and `synthesize report`: what has been made, from the files of an output alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import human, one_line, table
from megatron_synth.data.preparing.readers.synthesized import CORPUS, RECORD, Account, SynthesisRecord, read_record
from megatron_synth.synthesis.answers.parts import REFUSED, lines
from megatron_synth.synthesis.corpus import REJECTED
from megatron_synth.synthesis.setup import ANSWERS, Setup
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

REPORT = "report.md"
SAMPLES = 5
SHOWN_CHARACTERS = 1500


@dataclass
class Totals:
    """Sums over raw answers."""

    answers: int = 0
    refused: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    finish: Counter[str] = field(default_factory=Counter)


def totals(folder: Path) -> Totals:
    """Of the raw answers of an output."""
    found = Totals()
    for line in lines(folder / ANSWERS):
        found.answers += 1
        found.refused += line["finish"] == REFUSED
        found.tokens_in += line["tokens_in"] or 0
        found.tokens_out += line["tokens_out"] or 0
        found.seconds += line["seconds"]
        found.finish[line["finish"]] += 1
    return found


def status_text(config: SynthesisConfig) -> str:
    """Where an output stands."""
    folder = config.folder
    if not (folder / ANSWERS).is_dir():
        return f"{folder}: nothing has been made yet"
    found = totals(folder)
    ends = ", ".join(f"{one_line(name)} {count:,}" for name, count in sorted(found.finish.items()))
    mean = found.seconds / max(found.answers, 1)
    text = (
        f"{folder}: {found.answers:,} answers ({ends or 'none'}), {human(found.tokens_in)} tokens read, "
        f"{human(found.tokens_out)} written, {mean:.2f} s an answer"
    )
    if not (folder / RECORD).is_file():
        return f"{text}\nno corpus yet: give `megatron-synth synthesize run` again to go on"
    record = read_record(folder)
    return f"{text}\n{account_text(record.account)}\n  {record.documents:,} documents in {folder / CORPUS}"


def account_text(account: Account) -> str:
    """The account as a table."""
    asked = max(account.asked, 1)

    def row(name: str, count: int) -> tuple[str, ...]:
        return name, f"{count:,}", f"{100 * count / asked:.1f} %"

    rows = [("", "requests", "share"), row("asked", account.asked), row("kept", account.kept)]
    rows += [row(f"rejected: {reason}", count) for reason, count in account.rejected.items()]
    rows += [row("refused by the engine", account.refused), row("unanswered", account.unanswered)]
    return table(rows)


def write_report(config: SynthesisConfig) -> Path:
    """Write the report of a finished corpus: account, cost, and samples beside their parents.

    Raises:
        UserError: there is no finished corpus.
    """
    record = read_record(config.folder)
    parts = [_head(record), _samples(config, record), _rejected(config.folder)]
    file = config.folder / REPORT
    write_atomic(file, "\n".join(parts))
    return file


def _head(record: SynthesisRecord) -> str:
    cost, account = record.cost, record.account
    flops = "not known" if cost.flops is None else f"{cost.flops:.2e}"
    rows = [
        ("text", f"{record.documents:,} documents of kind {record.kind}"),
        ("template", f"{record.template['name']} {record.template['version']}, {record.template['origin']}"),
        ("generator", str(record.generator_name)),
        ("tokens read, cached, written", f"{cost.tokens_in:,}, {cost.tokens_cached:,}, {cost.tokens_out:,}"),
        ("FLOPs of generation", flops),
        ("tokens written for each document kept", f"{cost.tokens_out / max(record.documents, 1):,.0f}"),
        ("license", record.license),
    ]
    shares = [("asked", account.asked), ("kept", account.kept)]
    shares += [(f"rejected: {reason}", count) for reason, count in account.rejected.items()]
    shares += [("refused by the engine", account.refused), ("unanswered", account.unanswered)]
    lines = ["# Synthetic text", "", "| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows), ""]
    lines += ["| requests | | share |", "|---|--:|--:|"]
    lines += [f"| {name} | {count:,} | {100 * count / max(account.asked, 1):.1f} % |" for name, count in shares]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def _samples(config: SynthesisConfig, record: SynthesisRecord) -> str:
    """A few documents of the corpus beside their parents, drawn with the seed of the file."""
    draw = random.Random(config.seed)
    chosen: list[dict[str, Any]] = []
    for number, entry in enumerate(entries(config.folder / CORPUS, record.files)):
        # reservoir sampling: each document is as likely as any other
        if len(chosen) < SAMPLES:
            chosen.append(entry)
        elif (place := draw.randrange(number + 1)) < SAMPLES:
            chosen[place] = entry
    wanted = {parent for entry in chosen for parent in entry["parents"]}
    texts: dict[str, str] = {}
    for parent in Setup.of(config, export=False).parents:
        if parent.id in wanted:
            texts.setdefault(parent.id, parent.text)
            if len(texts) == len(wanted):
                break
    lines = ["## Samples beside their parents", ""]
    for entry in chosen:
        lines += [f"### {entry['id']}", ""]
        for parent_id in entry["parents"]:
            lines += ["Parent:", "", *_quoted(texts.get(parent_id, "(not among the parents any more)")), ""]
        lines += ["Text:", "", *_quoted(entry["text"]), ""]
    return "\n".join(lines)


def _rejected(folder: Path) -> str:
    """One rejected answer for each reason."""
    shown: dict[str, str] = {}
    file = folder / REJECTED
    if file.is_file():
        for entry in entries(folder, [REJECTED]):
            shown.setdefault(entry["reason"], entry["text"])
    lines = ["## Rejected: one of each reason", ""]
    for reason, text in sorted(shown.items()):
        lines += [f"### {reason}", "", *_quoted(text), ""]
    return "\n".join(lines)


def entries(folder: Path, files: list[str]) -> Iterator[dict[str, Any]]:
    """Documents of the corpus, or rejected answers, of the files of a folder.

    Raises:
        UserError: a line is damaged.
    """
    for name in files:
        with open(folder / name, encoding="utf-8") as opened:
            for number, line in enumerate(opened, start=1):
                try:
                    entry = json.loads(line)
                    entry["text"], entry["parents"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{folder / name}, line {number}: damaged; give `megatron-synth synthesize run` again"
                    ) from None
                yield entry


def _quoted(text: str) -> list[str]:
    """Text as an indented block, which Markdown leaves as it is."""
    cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " [...]"
    return [f"    {one_line(line)}" for line in cut.splitlines()] or ["    (empty)"]
