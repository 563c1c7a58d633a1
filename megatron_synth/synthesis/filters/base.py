"""Which answers of a generator become documents, and why the others do not.

`Filters.judge` looks at one answer beside the texts that it was made from; `Filters.finish` looks at all that were kept. A
rejection has one reason, the first of `REASONS` that applies, so that the counts of an account add up; `Filters.reasons`
names all. Thresholds are settings. Nothing here depends on the order or on the number of answers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field, model_validator

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import Kind
from megatron_synth.config.section import Ratio, Section, Seed
from megatron_synth.synthesis.filters import phrases
from megatron_synth.synthesis.filters.language import LanguageCheck
from megatron_synth.synthesis.filters.numbers import numbers_in, supported_by
from megatron_synth.synthesis.filters.repetition import is_repetitive
from megatron_synth.synthesis.filters.words import content_stems, copied_share, words_of

Reason = Literal[
    "cut_at_limit",
    "empty",
    "refusal",
    "wrong_language",
    "repetition",
    "too_short",
    "too_long",
    "no_question",
    "copy_of_parent",
    "little_of_parent",
    "numbers_not_in_parent",
    "talk_about_text",
    "equal_to_another",
    "not_chosen",
]
REASONS: tuple[str, ...] = get_args(Reason)
"""Every reason of a rejection, in the order in which they are asked."""
MOST_COMPARED = 100_000
PREAMBLE = "preamble_stripped"
"""The note on an answer that lost a preamble or a closing remark; no rejection."""
KINDS: tuple[str, ...] = get_args(Kind)

Share = Annotated[float, Field(ge=0, le=1)]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Candidate:
    """An answer beside what it was made from.

    kind: of the text, one of `KINDS`.
    parents: the texts that the prompt was made from; of a textbook, the keywords as they stand in the prompt.
    text: the answer as it came.
    finish_reason: why the generator stopped, as the OpenAI API names it: `stop`, `length`, `content_filter`.
    """

    kind: str
    parents: tuple[str, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Verdict:
    """What becomes of an answer.

    kept: whether it becomes a document.
    reason: the first reason against it, one of `REASONS`; None when it is kept.
    text: the answer without preamble and closing remark.
    notes: what was done to it, such as `PREAMBLE`.
    """

    kept: bool
    reason: str | None
    text: str
    notes: tuple[str, ...] = ()


class ChoiceConfig(Section):
    """A choice among the answers that are kept, so that few stand for many."""

    method: Literal["coverage", "random"]
    """coverage: those that are most similar to the others (arXiv 2504.14508). random: any, to hold the first against."""
    share: Ratio
    """How many of them are chosen, such as 1/2, rounded up."""
    coverage: Annotated[float, Field(gt=0, le=1)] = 0.9
    """coverage: share of the answers that shall be chosen or similar to one that is; how similar follows from it."""
    seed: Seed = 1
    """random: of the choice."""

    @model_validator(mode="after")
    def _check(self) -> ChoiceConfig:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected a share above 0 and at most 1, got {self.share}")
        return self


class FiltersConfig(Section):
    """Thresholds of the filters. Shares are of words or of characters, as each says."""

    off: tuple[Reason, ...] = ()
    """Reasons that are not asked."""
    faithful: tuple[Kind, ...] = ("rephrased", "qa")
    """Kinds that must say what the parent says: only these are asked for copies, foreign numbers and talk about the text."""
    questions: tuple[Kind, ...] = ("qa",)
    """Kinds that need questions and answers."""
    min_questions: Annotated[int, Field(ge=1)] = 1
    """Questions with an answer below or behind them at least."""
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] | None = "en"
    """The language of the answers, as in ISO 639-1; null: any. It is told by py3langid, of the extra `synthesis`."""
    max_other_language: Share = 0.3
    """Share of the characters in passages of another language at most."""
    max_duplicate_lines: Share = 0.3
    """Share of the lines that stood before at most (arXiv 2112.11446, table A1)."""
    max_duplicate_line_characters: Share = 0.2
    """The same, by characters (arXiv 2112.11446, table A1)."""
    max_top_ngram: dict[Annotated[int, Field(ge=2)], Share] = {2: 0.20, 3: 0.18, 4: 0.16}
    """Share of the characters in the most frequent n-gram of n words, by n (arXiv 2112.11446, table A1)."""
    max_duplicate_ngrams: dict[Annotated[int, Field(ge=2)], Share] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    """Share of the characters in n-grams of n words that stood before, by n (arXiv 2112.11446, table A1)."""
    max_loops: Annotated[int, Field(ge=2)] = 3
    """How often the same words may follow each other, with nothing between."""
    min_words: Annotated[int, Field(ge=1)] = 20
    """Words at least."""
    length_ratio: dict[Kind, tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]]] = {
        "rephrased": (0.3, 2.0),
        "qa": (0.2, 3.0),
    }
    """Words of the answer for each word of the parents, at least and at most, by kind; others have no bounds."""
    copy_ngram: Annotated[int, Field(ge=2)] = 8
    """Words of an n-gram that counts as copied when a parent has it."""
    max_copied: Share = 0.6
    """Share of the words in copied n-grams at most."""
    min_covered: dict[Kind, Share] = {"rephrased": 0.12, "qa": 0.1, "textbook": 0.3}
    """Share of the parents' content words that the answer has at least, by kind; the first five letters of a word count."""
    min_grounded: dict[Kind, Share] = {"rephrased": 0.2, "qa": 0.2}
    """Share of the answer's content words that the parents have at least, by kind."""
    small_number: Annotated[float, Field(ge=0)] = 10
    """Whole numbers up to this are not looked for in the parent: they count, enumerate, and stand for `a` and `both`."""
    max_new_numbers: Share = 0.1
    """Share of an answer's other numbers that no parent has at most."""
    choice: ChoiceConfig | None = None
    """Keep some of the answers that passed all else; null: all of them."""

    @model_validator(mode="after")
    def _check(self) -> FiltersConfig:
        for kind, (low, high) in self.length_ratio.items():
            if low >= high:
                raise ValueError(f"length_ratio.{kind}: the least ratio, {low}, must be below the largest, {high}")
        return self


class Filters:
    """Judges answers.

    Raises:
        UserError: a language other than English is wanted and its identification is not installed.
    """

    def __init__(self, config: FiltersConfig):
        self.config = config
        asked = config.language is not None and "wrong_language" not in config.off
        self._language = LanguageCheck(config.language) if asked and config.language is not None else None

    def judge(self, candidate: Candidate) -> Verdict:
        """The verdict on one answer, without regard to others."""
        text, notes = self._stripped(candidate)
        reason = next(iter(self._reasons(candidate, text)), None)
        return Verdict(reason is None, reason, text, notes)

    def reasons(self, candidate: Candidate) -> tuple[str, ...]:
        """All reasons against an answer, in the order of `REASONS`.

        Of an answer without content only that is told; and what cannot be judged in another language is not.
        """
        return tuple(self._reasons(candidate, self._stripped(candidate)[0]))

    def finish(self, verdicts: Iterable[tuple[Key, Verdict]]) -> dict[Key, str]:
        """Reasons that only all answers together show, by key, of those that were kept until now.

        Of answers that are equal but for case and spaces, that of the least key stays, whatever the order: one text is no
        document of several parents. Keys must be different and have an order. Takes about 150 bytes for each answer. With a
        choice, all texts that are kept are held, too, and 16 kB for each in a choice by coverage.

        Raises:
            UserError: more answers were kept than a choice by coverage can compare.
        """
        texts: dict[Key, str] = {}

        def noted() -> Iterator[tuple[Key, Verdict]]:
            for key, verdict in verdicts:
                if verdict.kept and self.config.choice is not None:
                    texts[key] = verdict.text
                yield key, verdict

        rejected = self._equal(noted())
        if self.config.choice is not None and "not_chosen" not in self.config.off:
            left = {key: texts[key] for key in sorted(texts, key=_as_is) if key not in rejected}
            rejected |= dict.fromkeys(_not_chosen(self.config.choice, left), "not_chosen")
        return rejected

    def _equal(self, verdicts: Iterable[tuple[Key, Verdict]]) -> dict[Key, str]:
        asked = "equal_to_another" not in self.config.off
        least: dict[bytes, Any] = {}
        rejected: dict[Key, str] = {}
        for key, verdict in verdicts:
            if not verdict.kept or not asked:
                continue
            plain = " ".join(verdict.text.casefold().split())
            digest = hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            kept = least.setdefault(digest, key)
            if kept != key:
                first, second = sorted((kept, key))
                least[digest] = first
                rejected[second] = "equal_to_another"
        return rejected

    def _stripped(self, candidate: Candidate) -> tuple[str, tuple[str, ...]]:
        assert candidate.kind in KINDS, f"kind {candidate.kind!r}, expected one of {KINDS}"
        text = phrases.without_preamble(candidate.text)
        return text, (PREAMBLE,) if text != candidate.text.strip() else ()

    def _reasons(self, candidate: Candidate, text: str) -> Iterable[str]:
        off = self.config.off
        return (reason for reason in _Judged(self.config, self._language, candidate, text).reasons() if reason not in off)


def _as_is(key: Any) -> Any:
    return key


def _not_chosen(choice: ChoiceConfig, texts: dict[Key, str]) -> list[Key]:
    """Keys of the texts that a choice leaves out."""
    from megatron_synth.synthesis.selection.coverage import choose_at_random, hashed_ngrams, nearest, select

    if not texts:
        return []
    keys = list(texts)
    k = math.ceil(choice.share * len(keys))
    if choice.method == "random":
        chosen = choose_at_random(len(keys), k, choice.seed)
    else:
        if len(keys) > MOST_COMPARED:
            raise UserError(
                f"filters.choice: {len(keys):,} answers were kept, a choice by coverage compares up to {MOST_COMPARED:,}; make "
                f"the corpus in parts, or set method to random"
            )
        chosen = select(nearest(hashed_ngrams(list(texts.values()))), k, choice.coverage).chosen
    wanted = set(chosen)
    return [key for number, key in enumerate(keys) if number not in wanted]


class _Judged:
    """One answer, with what several rules need of it."""

    def __init__(self, config: FiltersConfig, language: LanguageCheck | None, candidate: Candidate, text: str):
        self.config, self.language, self.candidate, self.text = config, language, candidate, text
        self.kind: Any = candidate.kind

    @cached_property
    def parent(self) -> str:
        return "\n\n".join(self.candidate.parents)

    @cached_property
    def words(self) -> list[str]:
        return words_of(self.text)

    @cached_property
    def parent_words(self) -> list[str]:
        return words_of(self.parent)

    def reasons(self) -> Iterable[str]:
        if self.candidate.finish_reason == "length":
            yield "cut_at_limit"
        if not any(character.isalnum() for character in self.text):
            yield "empty"
            return
        if self.candidate.finish_reason == "content_filter" or phrases.is_refusal(self.candidate.text, self.parent):
            yield "refusal"
            return
        other_language = self._is_other_language()
        if other_language:
            yield "wrong_language"
        repetitive = is_repetitive(self.text, self.words, self.config)
        if repetitive:
            yield "repetition"
        length = self._length()
        if length is not None:
            yield length
        questions = phrases.answered_questions(self.text) if self.kind in self.config.questions else None
        if questions is not None and questions < self.config.min_questions:
            yield "no_question"
        faithful = self.kind in self.config.faithful
        if faithful and copied_share(self.words, self.parent_words, self.config.copy_ngram) > self.config.max_copied:
            yield "copy_of_parent"
        if not (other_language or repetitive or length) and self._has_little():  # of which it would only be a consequence
            yield "little_of_parent"
        if faithful and self._has_new_numbers():
            yield "numbers_not_in_parent"
        if faithful and not other_language and phrases.talks_about_text(self.text, self.parent):
            yield "talk_about_text"

    def _is_other_language(self) -> bool:
        return self.language is not None and self.language.share_of_others(self.text) > self.config.max_other_language

    def _length(self) -> str | None:
        low, high = self.config.length_ratio.get(self.kind, (0.0, float("inf")))
        count, of_parent = len(self.words), len(self.parent_words)
        if count < max(min(self.config.min_words, of_parent), low * of_parent) or count < self._least_without_parent():
            return "too_short"
        return "too_long" if count > high * of_parent else None

    def _least_without_parent(self) -> int:
        """Of kinds that may be longer than their parents, words at least; those of a short parent may be short."""
        return 0 if self.kind in self.config.length_ratio else self.config.min_words

    def _has_little(self) -> bool:
        covered, grounded = self.config.min_covered.get(self.kind, 0), self.config.min_grounded.get(self.kind, 0)
        ours, theirs = content_stems(self.words), content_stems(self.parent_words)
        if not ours or not theirs:
            return False
        common = len(ours & theirs)
        return common < covered * len(theirs) or common < grounded * len(ours)

    def _has_new_numbers(self) -> bool:
        known = supported_by(self.parent)
        asked = [readings for readings in numbers_in(self.text) if not all(self._is_small(value) for value in readings)]
        new = sum(not readings & known for readings in asked)
        return new > self.config.max_new_numbers * len(asked)

    def _is_small(self, value: float) -> bool:
        return value <= self.config.small_number and value == int(value)
