"""`synthesize status`: what has been made, from the files of an output alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_synth.core.log import human, one_line, table
from megatron_synth.data.preparing.readers.synthesized import CORPUS, RECORD, Account, read_record
from megatron_synth.synthesis.answers.parts import REFUSED, lines
from megatron_synth.synthesis.setup import ANSWERS
from megatron_synth.synthesis.synthesis_file import SynthesisConfig


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
