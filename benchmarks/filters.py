"""`python -m benchmarks filters`: precision and recall of the filters of synthetic text on answers labeled by hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.synthesis.filters.base import KINDS, PREAMBLE, REASONS, Candidate, Filters, FiltersConfig

_FOLDER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "synthesis"
WRITTEN, GENERATED = _FOLDER / "labeled_outputs.jsonl", _FOLDER / "generated_outputs.jsonl"
HALVES = ("tune", "held_out")
LABELS = (*(reason for reason in REASONS if reason not in ("equal_to_another", "not_chosen")), PREAMBLE)
"""What a single answer can be labeled with."""


@dataclass(frozen=True)
class Labeled:
    """An answer, its half, and what a reader found in it.

    labels: reasons and `PREAMBLE`; a good document has no reason.
    faithful: whether it says what the parent says, which no filter can tell; None where nobody has looked.
    """

    name: str
    half: str
    candidate: Candidate
    labels: frozenset[str]
    faithful: bool | None


@dataclass(frozen=True)
class Score:
    """Answers that were found and are labeled, found alone, labeled alone."""

    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float | None:
        """Share of those found that are labeled."""
        return self.right / (self.right + self.wrong) if self.right + self.wrong else None

    @property
    def recall(self) -> float | None:
        """Share of those labeled that were found."""
        return self.right / (self.right + self.missed) if self.right + self.missed else None


def read(path: Path) -> list[Labeled]:
    """The labeled answers of a file.

    Raises:
        UserError: a line is not such an answer; it names file and line.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected labeled answers, a line of JSON each") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            candidate = Candidate(row["kind"], (row["parent"],), row["output"], row["finish_reason"])
            one = Labeled(row["id"], row["half"], candidate, frozenset(row["labels"]), row.get("faithful"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}:{number}: not a labeled answer, {error!r}") from None
        if one.half not in HALVES or candidate.kind not in KINDS or not one.labels <= set(LABELS):
            raise UserError(f"{path}:{number}: unknown half, kind or label; halves {HALVES}, kinds {KINDS}, labels {LABELS}")
        found.append(one)
    return found


def found_in(filters: Filters, candidate: Candidate) -> frozenset[str]:
    """All that the filters find in an answer: reasons and notes."""
    return frozenset((*filters.reasons(candidate), *filters.judge(candidate).notes))


def score(filters: Filters, answers: Sequence[Labeled]) -> dict[str, Score]:
    """By label, and `rejected`: whether there is any reason, whichever."""
    pairs = [(found_in(filters, one.candidate), one.labels) for one in answers]
    scores = {label: _score([(label in found, label in wanted) for found, wanted in pairs]) for label in LABELS}
    scores["rejected"] = _score([(bool(found - {PREAMBLE}), bool(wanted - {PREAMBLE})) for found, wanted in pairs])
    return scores


def _score(pairs: Sequence[tuple[bool, bool]]) -> Score:
    right = sum(found and wanted for found, wanted in pairs)
    return Score(right, sum(found for found, _ in pairs) - right, sum(wanted for _, wanted in pairs) - right)


def rows(filters: Filters, columns: dict[str, Sequence[Labeled]]) -> list[list[str]]:
    """The table: precision and recall by label, for each named group of answers."""
    scores = [score(filters, answers) for answers in columns.values()]
    table = [["reason", *(f"{name}: {what}" for name in columns for what in ("precision", "recall"))]]
    for label in (*LABELS, "rejected"):
        cells = []
        for one in (found[label] for found in scores):
            cells += [_fraction(one.right, one.wrong), _fraction(one.right, one.missed)]
        table.append([label, *cells])
    return table


def grouped() -> dict[str, Sequence[Labeled]]:
    """The groups of the table: written and generated answers, each in its halves."""
    files = {"": read(WRITTEN), "SmolLM2 ": read(GENERATED)}
    return {
        f"{name}{half.replace('_', '-')}": [one for one in answers if one.half == half]
        for name, answers in files.items()
        for half in HALVES
    }


def unfaithful(filters: Filters, answers: Sequence[Labeled]) -> tuple[int, int]:
    """Of answers whose truth was looked at: how many are kept, and how many of these say what the parent does not."""
    kept = [one for one in answers if one.faithful is not None and filters.judge(one.candidate).kept]
    return len(kept), sum(not one.faithful for one in kept)


def _fraction(right: int, others: int) -> str:
    total = right + others
    return f"{right / total:.2f} ({right}/{total})" if total else "none"


def main(argv: list[str]) -> int:
    """Print the table, and with --wrong each answer that is judged otherwise than it is labeled."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks filters",
        description="Precision and recall of the filters of synthetic text on answers that were labeled by hand.",
    )
    parser.add_argument("--wrong", choices=HALVES, help="also list what is judged wrongly in a half")
    options = parser.parse_args(argv)
    from megatron_synth.bench import tables
    from megatron_synth.core.log import one_line, say

    columns = grouped()
    filters = Filters(FiltersConfig())
    head: dict[str, Any] = tables.header("", [])
    head["command"] = " ".join(["python -m benchmarks filters", *argv])
    about = tables.header_lines(head)[:2]
    sizes = ", ".join(f"{name}: {len(answers)}" for name, answers in columns.items())
    about.append(f"- answers: {sizes}; {language(filters)}")
    kept, untrue = unfaithful(filters, [one for answers in columns.values() for one in answers])
    about.append(f"- of SmolLM2's answers {kept} are kept, of which {untrue} say what the parent does not")
    say("\n".join([*about, "", *tables.markdown_table(rows(filters, columns))]))
    for one in (one for answers in columns.values() for one in answers):
        found = found_in(filters, one.candidate)
        if one.half == options.wrong and found != one.labels:
            say(f"{one.name}: labeled {sorted(one.labels)}, found {sorted(found)}: {one_line(one.candidate.text[:200])}")
    return EXIT_OK


def language(filters: Filters) -> str:
    """By what the language was told."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"language by py3langid {version('py3langid')}"
    except PackageNotFoundError:
        return "language by function words"
