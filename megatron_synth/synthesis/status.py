"""`synthesize status`: what has been made, from the files of an output alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_synth.core.log import duration, human, one_line, table
from megatron_synth.data.preparing.readers.synthesized import CORPUS, RECORD, Account, read_record
from megatron_synth.synthesis.answers.parts import REFUSED, lines, parts_of
from megatron_synth.synthesis.jobs import job_states
from megatron_synth.synthesis.recombined import extraction, is_missing
from megatron_synth.synthesis.setup import ANSWERS
from megatron_synth.synthesis.shares import FOLDERS
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
    """Of the raw answers in a folder of parts."""
    found = Totals()
    for line in lines(folder):
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
    if is_missing(config):
        return status_text(extraction(config))
    if not (folder / ANSWERS).is_dir():
        return f"{folder}: nothing has been made yet"
    found = totals(folder / ANSWERS)
    ends = ", ".join(f"{one_line(name)} {count:,}" for name, count in sorted(found.finish.items()))
    mean = found.seconds / max(found.answers, 1)
    text = (
        f"{folder}: {found.answers:,} answers ({ends or 'none'}), {human(found.tokens_in)} tokens read, "
        f"{human(found.tokens_out)} written, {mean:.2f} s an answer"
    )
    text += _shares(folder / ANSWERS) + _jobs(config)
    if not (folder / RECORD).is_file():
        return f"{text}\nno corpus yet: give `megatron-synth synthesize run` again to go on"
    record = read_record(folder)
    tokens = f", {tokens_text(record.tokens)}" if record.tokens else ""
    return f"{text}\n{account_text(record.account)}\n  {record.documents:,} documents{tokens} in {folder / CORPUS}"


def tokens_text(tokens: Mapping[Any, int]) -> str:
    """Tokens of a corpus by whose tokenizer counts."""
    return " or ".join(f"{count:,} tokens of the {name}" for name, count in tokens.items())


def _shares(answers: Path) -> str:
    """Answers by share, where there are some."""
    rows: list[tuple[str, ...]] = [("share", "answers", "tokens written", "last answer")]
    for share in sorted(answers.glob(f"{FOLDERS}/")):
        found = totals(share)
        last = max((part.stat().st_mtime for part in parts_of(share)), default=None)
        ago = "never" if last is None else f"{duration(max(time.time() - last, 0))} ago"
        rows.append((share.name, f"{found.answers:,}", human(found.tokens_out), ago))
    return "\n" + table(rows) if len(rows) > 1 else ""


def _jobs(config: SynthesisConfig) -> str:
    """What SLURM says of jobs that go on, and of those that failed."""
    rows: list[tuple[str, ...]] = [("job", "state", "restarts", "nodes")]
    for job, state in job_states(config).items():
        if state.state != "COMPLETED":
            told = f"{state.state} ({state.reason})" if state.reason else state.state
            rows.append((job, told, "n/a" if state.restarts is None else str(state.restarts), state.nodes))
    return "\n" + table(rows) if len(rows) > 1 else ""


def account_text(account: Account) -> str:
    """The account as a table."""
    asked = max(account.asked, 1)

    def row(name: str, count: int) -> tuple[str, ...]:
        return name, f"{count:,}", f"{100 * count / asked:.1f} %"

    rows = [("", "requests", "share"), row("asked", account.asked), row("kept", account.kept)]
    rows += [row(f"rejected: {reason}", count) for reason, count in account.rejected.items()]
    rows += [row("refused by the engine", account.refused), row("unanswered", account.unanswered)]
    return table(rows)
