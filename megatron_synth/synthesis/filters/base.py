"""Which answers of a generator become documents, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_synth.config.schema import Section


@dataclass(frozen=True)
class Candidate:
    """An answer beside the texts that its prompt was made from."""

    kind: str
    parents: tuple[str, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Verdict:
    """What becomes of an answer: kept or not, the reason, and its text without a preamble."""

    kept: bool
    reason: str | None
    text: str


class FiltersConfig(Section):
    """Thresholds of the filters."""


class Filters:
    """Judges answers."""

    def __init__(self, config: FiltersConfig):
        self.config = config

    def judge(self, candidate: Candidate) -> Verdict:
        """The verdict on one answer, without regard to others."""
        text = candidate.text.strip()
        reason = "cut_at_limit" if candidate.finish_reason == "length" else None if text else "empty"
        return Verdict(reason is None, reason, text)

    def finish(self, verdicts: Iterable[tuple[str, Verdict]]) -> dict[str, str]:
        """Reasons that only all answers together show, by key."""
        kept: dict[str, str] = {}
        return {
            key: "equal_to_another" for key, verdict in verdicts if verdict.kept and kept.setdefault(verdict.text, key) != key
        }
