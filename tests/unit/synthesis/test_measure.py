"""Figures of a corpus on texts small enough to count by hand."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import asdict

import pytest

from megatron_synth.synthesis.measure.corpus import Synthetic, measure_corpus
from megatron_synth.synthesis.measure.overlap import Contamination, Overlap, Redundancy
from megatron_synth.synthesis.measure.page import Sample, render
from megatron_synth.synthesis.measure.statistics import (
    CompressionRatio,
    Lengths,
    TypeTokenRatio,
    divergence_by_word,
    kl_divergence,
    novelty,
    tail_share,
)


def test_divergence_by_hand() -> None:
    # counted once more: 4/5 and 1/5 against 1/5 and 4/5
    assert kl_divergence({"a": 3}, {"b": 3}) == pytest.approx(0.6 * math.log(4))
    assert divergence_by_word({"a": 3}, {"b": 3}) == [
        ("a", pytest.approx(0.8 * math.log(4))),
        ("b", pytest.approx(-0.2 * math.log(4))),
    ]
    assert kl_divergence({"a": 2, "b": 1}, {"a": 2, "b": 1}) == 0
    # with half a count: 3/4 and 1/4 against 1/2 and 1/2
    assert kl_divergence({"a": 1}, {"a": 1, "b": 1}, 0.5) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    with pytest.raises(ValueError, match="no words"):
        kl_divergence({}, {})


def test_variety_by_hand() -> None:
    ratio = TypeTokenRatio(3)
    assert ratio.value is None
    ratio.add(["a", "b"])
    assert ratio.value == 1
    ratio.add(["a", "c", "c", "c", "d"])  # windows: a b a, c c c; d is no whole one
    assert ratio.value == 3 / 6
    counts = Counter(["a", "a", "b", "c"])
    assert tail_share(counts, {"a": 5, "b": 3, "c": 1}, head=2) == 1 / 4
    assert tail_share({}, {"a": 1}, head=1) == 0


def test_novelty_by_hand() -> None:
    assert novelty(list("abcd"), list("xbcy"), 2) == pytest.approx(2 / 3)  # ab and cd are new, bc is not
    assert novelty(list("abcd"), [], 4) == 1 and novelty(list("abcd"), list("abcd"), 4) == 0
    assert novelty(list("abc"), list("abc"), 4) is None


def test_compression_and_lengths_by_hand() -> None:
    ratio = CompressionRatio()
    assert ratio.value is None
    for text in ("tide " * 50, "t\u00eate"):
        ratio.add(text)
    data = ("tide " * 50 + "\nt\u00eate\n").encode()
    assert ratio.value == len(data) / len(zlib.compress(data, 9)) == ratio.value  # asking changes nothing
    assert asdict(Lengths.of([4, 1, 3, 2])) == pytest.approx(
        {"texts": 4, "mean": 2.5, "p10": 1.3, "median": 2.5, "p90": 3.7, "longest": 4}
    )
    assert Lengths.of([]).texts == 0


def numbered(name: str, count: int) -> list[str]:
    return [f"{name}{number}" for number in range(count)]


def test_equal_and_nearly_equal_texts() -> None:
    text = numbered("a", 300)
    changed = [*text[:150], "other", *text[151:]]  # 8 of 293 shingles differ: a Jaccard similarity of 285 / 301
    half = [*text[:150], *numbered("b", 150)]  # 143 / 443
    overlap = Overlap({})
    overlap.add([text, numbered("c", 300), text, [], []])
    overlap.add([changed, half, ["short"], ["short"]])
    assert overlap.redundancy() == Redundancy(texts=7, exact=2, near=3)
    assert overlap.contamination() == []


def test_contamination_counts_domains_apart() -> None:
    seen = numbered("a", 13)
    half = [*seen, "x"]  # one of two 13-grams
    third = [*seen, "y", "z"]  # one of three
    overlap = Overlap({"one": [half, third, seen[:12]], "two": [numbered("b", 20)], "three": []})
    overlap.add([["before", *seen, "after"]])
    assert overlap.contamination() == [
        Contamination("one", 2, 2, 1),
        Contamination("two", 1, 0, 0),
        Contamination("three", 0, 0, 0),
    ]
    overlap.add([numbered("b", 30)])
    assert overlap.contamination()[1] == Contamination("two", 1, 1, 1)


CORPUS = [
    Synthetic("rephrased", ("The tide is high.",), "High is the tide."),
    Synthetic("rephrased", ("The tide is high.",), "The tide is low today."),
    Synthetic("qa", (), "Why? Because."),
    Synthetic("qa", (), "Why? Because."),
]


def test_a_corpus_by_hand() -> None:
    figures = measure_corpus(CORPUS, ["The tide is high.", "The moon."], validation={"web": ["too short"]})
    assert figures.kinds == {"qa": 2, "rephrased": 2}
    assert (figures.synthetic.words, figures.synthetic.types, figures.natural.words, figures.natural.types) == (13, 8, 6, 5)
    assert figures.synthetic.lengths.mean == 13 / 4 and figures.synthetic.type_token == 8 / 13
    # unigrams: none new of 4, then `low` and `today` of 5; bigrams: 2 of 3 new, then `is low` and `low today` of 4
    assert figures.novelty == {"rephrased": {1: pytest.approx(0.2), 2: pytest.approx((2 / 3 + 2 / 4) / 2), 4: 1.0}}
    assert figures.synthetic.tail == pytest.approx(6 / 13)  # low, today, and twice `why because`
    assert figures.natural.tail == 0
    words = {"high": (1, 1), "is": (2, 1), "the": (2, 2), "tide": (2, 1), "low": (1, 0), "today": (1, 0), "why": (2, 0)}
    words |= {"because": (2, 0), "moon": (0, 1)}
    ours, theirs = (sum(pair[at] + 1 for pair in words.values()) for at in (0, 1))
    kl = sum((p + 1) / ours * math.log((p + 1) / ours * theirs / (q + 1)) for p, q in words.values())
    reverse = sum((q + 1) / theirs * math.log((q + 1) / theirs * ours / (p + 1)) for p, q in words.values())
    assert figures.kl == pytest.approx(kl) and figures.kl_reverse == pytest.approx(reverse)
    assert {word for word, _ in figures.more[:2]} == {"why", "because"}
    assert {word for word, _ in figures.less[:2]} == {"moon", "the"}
    assert figures.redundancy == Redundancy(texts=4, exact=1, near=1)
    assert figures.contamination == [Contamination("web", 0, 0, 0)]


def test_a_corpus_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="the corpus has no words"):
        measure_corpus([Synthetic("qa", (), "...")], ["a"])
    with pytest.raises(ValueError, match="the natural text has no words"):
        measure_corpus(CORPUS, [])


def test_the_page_shows_samples_beside_parents_and_escapes_them() -> None:
    figures = measure_corpus(CORPUS, ["The tide is high.", "The <i>moon</i>."], validation={"<web>": ["a"]})
    samples = [
        Sample("qa", ("A <script>alert(1)</script> parent", "and another"), "An answer & \x1b[31m", None),
        Sample("rephrased", ("p",), "x" * 5000, "too_long"),
    ]
    page = render("Corpus <b>", figures, samples, account={"kept": 3, "too_long": 1}, made_by="a <commit>")
    assert "<script" not in page and "A &lt;script&gt;alert(1)&lt;/script&gt; parent\n\nand another" in page
    assert "Corpus &lt;b&gt;" in page and "&lt;web&gt;" in page and "a &lt;commit&gt;" in page and "\x1b" not in page
    assert "Content-Security-Policy" in page and "qa, kept" in page and '<span class="warn">too_long</span>' in page
    assert "x" * 4000 + " [...]" in page and "x" * 4001 not in page
    assert "<td>kept</td><td>3</td><td>75.0 %</td>" in page
    assert f"{figures.kl:.4f} nats" in page and "<td>type-token ratio</td>" in page
