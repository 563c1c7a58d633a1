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

LABELED = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "synthesis" / "labeled_outputs.jsonl"
HALVES = ("tune", "held_out")
LABELS = (*(reason for reason in REASONS if reason != "equal_to_another"), PREAMBLE)
"""What a single answer can be labeled with."""


@dataclass(frozen=True)
class Labeled:
    """An answer, its half, and what a reader found in it: reasons and `PREAMBLE`; a good document has no reason."""

    name: str
    half: str
    candidate: Candidate
    labels: frozenset[str]


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
            one = Labeled(row["id"], row["half"], candidate, frozenset(row["labels"]))
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


def rows(filters: Filters, answers: Sequence[Labeled]) -> list[list[str]]:
    """The table: for each half how often a label stands, precision and recall."""
    head = ["reason", *(f"{half.replace('_', '-')}: {what}" for half in HALVES for what in ("labeled", "precision", "recall"))]
    scores = [score(filters, [one for one in answers if one.half == half]) for half in HALVES]
    table = [head]
    for label in (*LABELS, "rejected"):
        cells = []
        for half in scores:
            one = half[label]
            cells += [str(one.right + one.missed), _fraction(one.right, one.wrong), _fraction(one.right, one.missed)]
        table.append([label, *cells])
    return table


def _fraction(right: int, others: int) -> str:
    total = right + others
    return f"{right / total:.2f} ({right}/{total})" if total else "n/a"


def main(argv: list[str]) -> int:
    """Print the table, and with --wrong each answer that is judged otherwise than it is labeled."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks filters",
        description="Precision and recall of the filters of synthetic text on answers that were labeled by hand.",
    )
    parser.add_argument("--labeled", type=Path, default=LABELED, metavar="FILE", help="default: the 200 of the tests")
    parser.add_argument("--wrong", choices=HALVES, help="also list what is judged wrongly in a half")
    options = parser.parse_args(argv)
    from megatron_synth.bench import tables
    from megatron_synth.core.log import one_line, say

    answers = read(options.labeled)
    filters = Filters(FiltersConfig())
    head: dict[str, Any] = tables.header("", [])
    head["command"] = " ".join(["python -m benchmarks filters", *argv])
    about = tables.header_lines(head)[:2]
    about.append(f"- {len(answers)} answers to {len({one.candidate.parents for one in answers})} parents, {language(filters)}")
    say("\n".join([*about, "", *tables.markdown_table(rows(filters, answers))]))
    for one in answers:
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
