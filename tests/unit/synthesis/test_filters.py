"""Each reason on the least text that has it and on a near miss; all of them on answers labeled by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks import filters as benchmark
from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.filters import base, language, phrases, repetition
from megatron_synth.synthesis.filters.base import PREAMBLE, REASONS, Candidate, Filters, FiltersConfig, Verdict
from megatron_synth.synthesis.filters.numbers import numbers_in, supported_by
from megatron_synth.synthesis.filters.words import content_stems, copied_share, words_of

PARENT = (
    "The ferry to Ostrand leaves the pier at seven in the morning and carries 40 cars. It was built in 1968 by a yard in the "
    "north, and its engine has been replaced twice since then. Tickets are sold on board by the mate, who also bakes the rolls."
)
GOOD = (
    "Built in 1968 at a northern yard, the Ostrand ferry has room for 40 cars and departs every morning at seven from the pier."
    " Its engine was replaced two times. On board, the mate sells tickets and bakes rolls."
)


@pytest.fixture(scope="module")
def filters() -> Filters:
    return Filters(FiltersConfig())


def candidate(text: str, kind: str = "rephrased", parent: str = PARENT, finish_reason: str = "stop") -> Candidate:
    return Candidate(kind, (parent,), text, finish_reason)


def test_a_faithful_answer_is_kept_as_it_is(filters: Filters) -> None:
    assert filters.judge(candidate(GOOD)) == Verdict(True, None, GOOD)
    assert filters.reasons(candidate(GOOD)) == ()


GERMAN = (
    "Die Fähre nach Ostrand fährt morgens um sieben von der Mole ab. Sie wurde 1968 gebaut und hat Platz für 40 Autos. "
    "Karten verkauft an Bord der Steuermann, der auch die Brötchen backt."
)
BOATS = "Boats are fine. On a sunny day people sit by the water and look at the waves, while children play in the sand."
ONE_QUESTION = "Q: When was the ferry to Ostrand built?\nA: In 1968, at a yard in the north, with room for 40 cars."
UNANSWERED = "When was the ferry built?\nHow many cars does it carry?\nWho sells tickets and bakes the rolls on board?"
IN_LINE = "When was it built? In 1968. How many cars does the ferry to Ostrand carry? It carries 40 of them from the pier."
COUNTING = " And " + " ".join(map(str, range(1, 11))) * 12 + "."

CASES = {  # by reason: an answer that has it, and a near miss
    "cut_at_limit": [(candidate(GOOD, finish_reason="length"), candidate(GOOD.rstrip(".")))],
    "empty": [(candidate("\n ... \n"), candidate(GOOD)), (candidate("Here is the rewritten text:"), candidate(GOOD))],
    "refusal": [
        (candidate("I\u2019m sorry, but I can\u2019t rewrite this text."), candidate("The captain was sorry. " + GOOD)),
        (candidate("As an AI language model, I have never been on a ferry."), candidate(GOOD)),
        (candidate(GOOD, finish_reason="content_filter"), candidate(GOOD)),
    ],
    "wrong_language": [(candidate(GERMAN), candidate(GOOD + " The mate calls them »Brötchen«."))],
    "repetition": [
        (candidate(GOOD + " The ferry carries cars and" * 5), candidate(GOOD + " It rocks very, very, very much.")),
        (candidate(f"{GOOD}\nThe ferry leaves.\nThe ferry leaves.\nThe ferry leaves."), candidate(GOOD + "\nIt sails.")),
    ],
    "too_short": [(candidate("The ferry to Ostrand leaves at seven."), candidate(GOOD))],
    "too_long": [(candidate(GOOD + COUNTING), candidate(GOOD + " " + GOOD[:60]))],
    "no_question": [
        (candidate(GOOD, "qa"), candidate(ONE_QUESTION, "qa")),
        (candidate(UNANSWERED, "qa"), candidate(IN_LINE, "qa")),
    ],
    "copy_of_parent": [(candidate(PARENT[:170]), candidate(GOOD))],
    "little_of_parent": [(candidate(BOATS), candidate(GOOD))],
    "numbers_not_in_parent": [
        (candidate(GOOD.replace("1968", "1986")), candidate(GOOD.replace("two times", "2 times"))),
        (candidate(GOOD.replace("40", "four hundred")), candidate(GOOD.replace("40", "forty"))),
    ],
    "talk_about_text": [
        (candidate("The passage describes the ferry. " + GOOD), candidate("The passage was rough. " + GOOD)),
        (candidate("In this section, we look at a ferry. " + GOOD), candidate("A section of the pier is new. " + GOOD)),
    ],
}


@pytest.mark.parametrize(("reason", "wrong", "near"), [(reason, *pair) for reason, pairs in CASES.items() for pair in pairs])
def test_each_reason_is_found_and_a_near_miss_is_not(filters: Filters, reason: str, wrong: Candidate, near: Candidate) -> None:
    assert reason in filters.reasons(wrong)
    assert reason not in filters.reasons(near)
    silent = Filters(FiltersConfig.model_validate({"off": [reason]}))
    assert reason not in silent.reasons(wrong)


def test_every_reason_has_a_case() -> None:
    assert {*CASES, "equal_to_another", "not_chosen"} == set(REASONS)


def test_the_first_reason_of_several_is_the_verdict(filters: Filters) -> None:
    both = candidate("The passage describes " + GOOD.replace("1968", "1986"), finish_reason="length")
    assert filters.reasons(both) == ("cut_at_limit", "numbers_not_in_parent", "talk_about_text")
    assert filters.judge(both).reason == "cut_at_limit"


@pytest.mark.parametrize(
    "text",
    [
        f"Here is a rephrased version of the text:\n\n{GOOD}",
        f"Sure! Here's the improved paragraph:\n{GOOD}\n\nI hope this helps! Let me know if you need more.",
        f"**Rewritten text:** {GOOD}",
        f"Certainly.  Here you go:\n\n{GOOD}",
        f"{GOOD}\n\nFeel free to ask for changes.",
    ],
)
def test_words_to_the_user_are_stripped_and_noted(filters: Filters, text: str) -> None:
    assert filters.judge(candidate(text)) == Verdict(True, None, GOOD, (PREAMBLE,))


@pytest.mark.parametrize(
    "start", ["Here is where the ferry lands. ", "Sure of her way, the ferry leaves. ", "This is the ferry: "]
)
def test_sentences_that_only_begin_like_a_preamble_stay(start: str) -> None:
    assert phrases.without_preamble(start + GOOD) == start + GOOD


def test_what_a_parent_says_itself_is_no_remark(filters: Filters) -> None:
    parent = "The author says that this passage of the text, as a language model, is sad. " + PARENT
    assert filters.judge(candidate("The author says that this passage is sad. " + GOOD, parent=parent)).kept


def test_kinds_are_asked_what_concerns_them(filters: Filters) -> None:
    keywords = "keywords: ferry, pier, engine"
    lesson = (
        "In 1800 no ferry had an engine. In this section we look at how a pier is built, on which ships of 300 tons can land."
    )
    assert filters.judge(candidate(lesson, "textbook", keywords)).kept
    assert filters.judge(candidate(GOOD, "textbook", "keywords: court, law, jury")).reason == "little_of_parent"
    with pytest.raises(AssertionError, match="hq"):
        filters.judge(candidate(GOOD, "hq"))


def test_equal_answers_keep_the_least_key_in_any_order(filters: Filters) -> None:
    kept, other = Verdict(True, None, "A text."), Verdict(True, None, "Another text.")
    rejected = Verdict(False, "empty", "A text.")
    verdicts = [("b", kept), ("a", Verdict(True, None, "a  TEXT.")), ("c", kept), ("d", other), ("0", rejected)]
    for order in itertools.permutations(verdicts):
        assert filters.finish(order) == {"b": "equal_to_another", "c": "equal_to_another"}
    assert Filters(FiltersConfig(off=("equal_to_another",))).finish(verdicts) == {}


def test_numbers_are_read_as_their_readers_do() -> None:
    assert numbers_in("1,200 and 1.200 and 2.3 million") == [{1200, 1.2}, {1.2, 1200}, {2.3, 2_300_000}]
    assert numbers_in("twenty-five, four hundred and two, two thousand") == [{20, 5, 25}, {4, 400, 2, 402}, {2, 2000}]
    assert numbers_in("1. Mix 250 grams.\n2) Bake.\nStep 3: Eat.\nQ4. Why?") == [{250}]
    assert numbers_in("each day, half of them, a third") == []
    assert {50, 30, 0.5} <= supported_by("half an hour") and 3.5 in supported_by("three and a half minutes")
    assert numbers_in("9" * 400) == [{float("inf")}]


def test_shares_of_words_by_hand() -> None:
    assert words_of("Don\u2019t stop: l'\u00e9t\u00e9 42") == ["don\u2019t", "stop", "l'\u00e9t\u00e9", "42"]
    assert words_of("\u6f6e\u6c50x") == ["\u6f6e", "\u6c50", "x"]  # no spaces between words
    assert content_stems(words_of("The bridges and a bridge were rebuilt in 1990")) == {"bridg", "rebui"}
    # of eight words the last three and the first two are copied bigrams and trigrams
    words, parent = list("abxcdeyz"), list("cdeqab")
    assert copied_share(words, parent, 2) == 5 / 8 and copied_share(words, parent, 3) == 3 / 8
    assert copied_share(list("ab"), list("abc"), 3) == 0


def test_repetition_by_hand() -> None:
    assert repetition.duplicates(["one", "two", "one", "one"]) == (2, 6)
    words = "a bb a bb a bb c".split()
    assert repetition.top_ngram(words, 2) == 9  # three times `a bb`
    assert repetition.top_ngram(list("abc"), 2) == 0
    assert repetition.duplicate_ngrams(words, 2) == 6  # the second and third `a bb`; `bb a` lies across
    assert repetition.longest_loop(words) == 1 and repetition.longest_loop(words[:6] * 2) == 6
    assert repetition.longest_loop(["very"] * 3 + ["much"]) == 1


def test_without_the_library_english_is_told_by_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language, "_identifier", lambda: None)
    language._warn.cache_clear()
    filters = Filters(FiltersConfig())
    assert "py3langid is not installed" in capsys.readouterr().err
    german = CASES["wrong_language"][0][0]
    assert filters.judge(german).reason == "wrong_language" and filters.judge(candidate(GOOD)).kept
    with pytest.raises(UserError, match="pip install"):
        Filters(FiltersConfig(language="de"))
    Filters(FiltersConfig(language=None))


def test_an_unknown_language_and_wrong_bounds_are_refused() -> None:
    with pytest.raises(UserError, match="null takes any"):
        Filters(FiltersConfig(language="xx"))
    with pytest.raises(ValidationError, match="must be below"):
        FiltersConfig(length_ratio={"qa": (2.0, 1.0)})
    with pytest.raises(ValidationError, match="off"):
        FiltersConfig.model_validate({"off": ["copied"]})


HOSTILE = [" \n" * 50_000, "1," * 50_000, "a" * 100_000, "Here is " * 15_000, "\n".join("?" * 50_000), "9" * 100_000]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_judged_in_linear_time(filters: Filters, text: str) -> None:
    assert not filters.judge(candidate(text, "qa")).kept  # at the square of its length this would take minutes


def test_labeled_answers() -> None:
    answers = benchmark.read(benchmark.WRITTEN)
    assert len(answers) == 200 and len({one.name for one in answers}) == 200
    halves = [{one.candidate.parents for one in answers if one.half == half} for half in benchmark.HALVES]
    assert not halves[0] & halves[1]
    scores = benchmark.score(Filters(FiltersConfig()), answers)
    for label in benchmark.LABELS:
        one = scores[label]
        assert one.right + one.missed >= 4, label
        assert one.precision is not None and one.precision >= 0.9, (label, one)
        assert one.recall is not None and one.recall >= 0.9, (label, one)


def test_labeled_answers_of_a_small_model() -> None:
    answers = benchmark.read(benchmark.GENERATED)
    written = {one.candidate.parents: one.half for one in benchmark.read(benchmark.WRITTEN)}
    assert all(written[one.candidate.parents] == one.half and one.faithful is not None for one in answers)
    filters = Filters(FiltersConfig())
    rejected = benchmark.score(filters, answers)["rejected"]
    assert rejected.precision is not None and rejected.precision >= 0.9
    assert rejected.recall is not None and rejected.recall >= 0.9
    kept, untrue = benchmark.unfaithful(filters, answers)
    assert 0 <= untrue <= kept == sum(filters.judge(one.candidate).kept for one in answers)


def test_a_broken_file_of_labels_names_its_line(tmp_path: Path) -> None:
    line = benchmark.WRITTEN.read_text(encoding="utf-8").splitlines()[0]
    for broken, match in [("{", "not a labeled"), (line.replace('"rephrased"', '"hq"'), "unknown half, kind or label")]:
        (tmp_path / "labels.jsonl").write_text(f"{line}\n{broken}\n", encoding="utf-8")
        with pytest.raises(UserError, match=rf"labels.jsonl:2: {match}"):
            benchmark.read(tmp_path / "labels.jsonl")


def test_scores_by_hand() -> None:
    one = benchmark._score([(True, True), (True, False), (False, True), (True, True), (False, False)])
    assert (one.right, one.wrong, one.missed) == (2, 1, 1) and one.precision == one.recall == 2 / 3


TOPICS = [
    f"{topic} and more words about {topic}, number {number}" for topic in ("tides", "bread", "trains") for number in range(4)
]


@pytest.mark.parametrize("method", ["coverage", "random"])
def test_a_choice_leaves_out_what_was_kept(method: str) -> None:
    filters = Filters(FiltersConfig.model_validate({"choice": {"method": method, "share": "1/4", "coverage": 1.0}}))
    verdicts = [(f"{number:02}", Verdict(True, None, text)) for number, text in enumerate(TOPICS)]
    verdicts += [("50", Verdict(True, None, TOPICS[0])), ("60", Verdict(False, "empty", ""))]
    found = filters.finish(verdicts)
    assert found == filters.finish(reversed(verdicts)) and found.pop("50") == "equal_to_another" and "60" not in found
    assert set(found.values()) == {"not_chosen"} and len(found) == 12 - 3  # a quarter of twelve stays
    if method == "coverage":
        assert [int(key) // 4 for key in sorted({key for key, _ in verdicts[:12]} - set(found))] == [0, 1, 2]
    assert filters.finish([]) == {}


def test_a_choice_of_all_and_of_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [(number, Verdict(True, None, text)) for number, text in enumerate(TOPICS)]
    everything = Filters(FiltersConfig.model_validate({"choice": {"method": "coverage", "share": 1}}))
    assert everything.finish(verdicts) == {}
    monkeypatch.setattr(base, "MOST_COMPARED", 3)
    with pytest.raises(UserError, match="12 answers were kept, a choice by coverage compares up to 3"):
        everything.finish(verdicts)
    with pytest.raises(ValidationError, match="share"):
        FiltersConfig.model_validate({"choice": {"method": "random", "share": 0}})
