"""The order of sources: the bound of the chairman assignment, exactly, at every prefix."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_synth.config.errors import UserError
from megatron_synth.data.mixing.apportionment import MAX_DENOMINATOR, Apportionment, apportionment


@st.composite
def common_denominator(draw: st.DrawFn, max_denominator: int = 2000) -> list[Fraction]:
    """2 to 64 positive ratios over one denominator."""
    number = draw(st.integers(2, 64))
    denominator = draw(st.integers(number, max_denominator))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    cuts = np.sort(rng.choice(np.arange(1, denominator), number - 1, replace=False)).tolist()
    return [Fraction(b - a, denominator) for a, b in zip([0, *cuts], [*cuts, denominator], strict=True)]


def prefix_counts(sources: np.ndarray, number: int) -> np.ndarray:
    """[N, K] counts after each sample, from the sequence alone."""
    return np.cumsum(sources[:, None] == np.arange(number), axis=0)


def largest_deviation(ratios: list[Fraction], sources: np.ndarray) -> Fraction:
    """Largest |count - n ratio| over all prefixes and sources, exact."""
    counts = prefix_counts(sources, len(ratios))
    steps = np.arange(1, len(sources) + 1, dtype=object)
    worst = Fraction(0)
    for source, ratio in enumerate(ratios):
        scaled = abs(steps * ratio.numerator - counts[:, source].astype(object) * ratio.denominator)
        worst = max(worst, Fraction(int(scaled.max()), ratio.denominator))
    return worst


@given(common_denominator())
@example([Fraction(67, 100), Fraction(20, 100), Fraction(10, 100), Fraction(3, 100)])
@example([Fraction(1, 2), Fraction(1, 2)])
@example([Fraction(1, 64)] * 64)
@example([Fraction(1, 2000), Fraction(1999, 2000)])
@settings(max_examples=60, deadline=None)
def test_every_prefix_is_within_the_bound(ratios: list[Fraction]) -> None:
    apportioned = Apportionment(ratios)
    length = 2 * apportioned.period
    sources, occurrences = apportioned.locate(np.arange(length))
    bound = 1 - Fraction(1, 2 * len(ratios) - 2)
    assert apportioned.bound == bound
    assert largest_deviation(ratios, sources) <= bound
    counts = prefix_counts(sources, len(ratios))
    # occurrences number the samples of each source; counts are those of the prefix, closed form or not
    np.testing.assert_array_equal(occurrences, counts[np.arange(length), sources] - 1)
    for prefix in {0, 1, apportioned.period - 1, apportioned.period, apportioned.period + 1, length}:
        expected = counts[prefix - 1] if prefix else np.zeros(len(ratios))
        np.testing.assert_array_equal(apportioned.counts(prefix), expected)


@st.composite
def mixed_denominators(draw: st.DrawFn) -> list[Fraction]:
    """Pairs of ratios with their own denominators up to 10^6: the common one is far beyond any table."""
    pairs = draw(st.integers(1, 32))
    ratios = []
    for _ in range(pairs):
        denominator = draw(st.integers(2, 10**6 // pairs)) * pairs
        numerator = draw(st.integers(1, denominator // pairs - 1))
        ratios += [Fraction(numerator, denominator), Fraction(1, pairs) - Fraction(numerator, denominator)]
    return ratios


@given(mixed_denominators(), st.integers(50, 2000))
@settings(max_examples=30, deadline=None)
def test_segments_join_without_a_seam(ratios: list[Fraction], segment_length: int) -> None:
    length = 3000
    whole, cut = Apportionment(ratios, segment_length=length + 1), Apportionment(ratios, segment_length=segment_length)
    sources, occurrences = cut.locate(np.arange(length))
    assert largest_deviation(ratios, sources) <= cut.bound
    order = np.random.default_rng(0).permutation(length)
    again, ranks = whole.locate(order)
    np.testing.assert_array_equal(again, sources[order])
    np.testing.assert_array_equal(ranks, occurrences[order])
    for prefix in (length, 1, segment_length, segment_length + 1):
        np.testing.assert_array_equal(cut.counts(prefix), whole.counts(prefix))
        expected = np.bincount(sources[:prefix], minlength=len(ratios))
        np.testing.assert_array_equal(cut.counts(prefix), expected)


def rule_by_hand(ratios: list[Fraction], length: int) -> list[int]:
    """Tijdeman's rule step by step, in fractions."""
    slack = Fraction(1, 2 * len(ratios) - 2)
    counts = [0] * len(ratios)
    chosen = []
    for step in range(1, length + 1):
        eligible = [j for j, ratio in enumerate(ratios) if step * ratio - counts[j] >= slack]
        source = min(eligible, key=lambda j: (math.floor((counts[j] + 1 - slack) / ratios[j]) + 1, j))
        counts[source] += 1
        chosen.append(source)
    return chosen


@given(common_denominator(max_denominator=150))
@settings(max_examples=20, deadline=None)
def test_tables_follow_the_rule(ratios: list[Fraction]) -> None:
    apportioned = Apportionment(ratios, segment_length=64)
    length = apportioned.period
    assert apportioned.locate(np.arange(length))[0].tolist() == rule_by_hand(ratios, length)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_no_sequence_does_better(number: int) -> None:
    """Exhaustive search: with one rare source, no sequence stays a fraction below the bound."""
    rare = Fraction(1, 40 * (number - 1) + 1)
    ratios = [*[(1 - rare) / (number - 1)] * (number - 1), rare]
    bound = 1 - Fraction(1, 2 * number - 2)

    def feasible(limit: Fraction) -> bool:
        states = {(0,) * number}
        for step in range(1, rare.denominator + 1):
            following = {
                tuple(sorted(state[:-1])) + state[-1:]
                for before in states
                for j in range(number)
                if (state := (*before[:j], before[j] + 1, *before[j + 1 :]))
            }
            states = {s for s in following if all(abs(x - step * r) <= limit for x, r in zip(s, ratios, strict=True))}
        return bool(states)

    assert feasible(bound)
    assert not feasible(bound - 2 * rare * number)


def test_far_samples_and_long_periods_are_exact() -> None:
    ratios = (Fraction(337, 1000), Fraction(663, 1000))
    apportioned = apportionment(ratios)
    assert apportionment(ratios) is apportioned
    far = 10**15
    assert apportioned.counts(far).tolist() == [337 * 10**12, 663 * 10**12]
    sources, occurrences = apportioned.locate(np.arange(far, far + 1000))
    near, first = apportioned.locate(np.arange(1000))
    np.testing.assert_array_equal(sources, near)
    np.testing.assert_array_equal(occurrences, first + np.array([337, 663])[near] * 10**12)


def test_large_numbers_do_not_overflow() -> None:
    tiny = Fraction(1, MAX_DENOMINATOR)
    ratios = [tiny] * 32 + [(1 - 32 * tiny) / 32] * 32
    ratios[-1] = 1 - sum(ratios[:-1], start=Fraction(0))
    apportioned = Apportionment(ratios, segment_length=10_000)
    sources, _ = apportioned.locate(np.arange(25_000))
    assert largest_deviation(ratios, sources) <= apportioned.bound
    assert sources.min() == 32  # a ratio of 1e-9 is not due within 25 000 samples


def test_absent_and_single_sources() -> None:
    apportioned = Apportionment([Fraction(0), Fraction(1, 3), Fraction(0), Fraction(2, 3)])
    sources, _ = apportioned.locate(np.arange(300))
    assert np.bincount(sources, minlength=4).tolist() == [0, 100, 0, 200] == apportioned.counts(300).tolist()
    # sources that are not used do not weaken the bound nor change the order
    assert apportioned.bound == Fraction(1, 2)
    without, _ = Apportionment([Fraction(1, 3), Fraction(2, 3)]).locate(np.arange(300))
    np.testing.assert_array_equal(np.array([1, 3])[without], sources)
    single = Apportionment([Fraction(1)])
    assert single.locate(np.array([7, 3]))[1].tolist() == [7, 3] and single.counts(9).tolist() == [9]


def test_wrong_ratios_are_refused_with_the_exact_difference() -> None:
    with pytest.raises(UserError, match=r"sum to 999/1000 .*the difference is -1/1000"):
        Apportionment([Fraction(333, 1000)] * 3)
    with pytest.raises(UserError, match="denominator above 1000000000"):
        Apportionment([Fraction(1, 10**10), 1 - Fraction(1, 10**10)])
    with pytest.raises(UserError, match="between 0 and 1, found -1/2"):
        Apportionment([Fraction(-1, 2), Fraction(3, 2)])


@given(mixed_denominators(), st.integers(1, 10**5), st.integers(20, 300))
@settings(max_examples=25, deadline=None)
def test_a_sample_far_in_is_found_without_what_comes_before(ratios: list[Fraction], sample: int, segment_length: int) -> None:
    """Asked first for a late sample: the same as from the start, mostly through a step that leaves no choice."""
    expected = Apportionment(ratios, segment_length=2**17).locate(np.arange(sample, sample + 50))
    fresh = Apportionment(ratios, segment_length=segment_length)
    for found, due in zip(fresh.locate(np.arange(sample, sample + 50)), expected, strict=True):
        np.testing.assert_array_equal(found, due)


def test_any_sample_of_few_sources_takes_milliseconds() -> None:
    ratios = [Fraction(670_001, 10**6), Fraction(199_999, 10**6), Fraction(100_003, 10**6), Fraction(29_997, 10**6)]
    fresh = Apportionment(ratios)
    for sample in (999_000, 500_001, 10**14 + 123_456):
        sources, occurrences = fresh.locate(np.arange(sample, sample + 500))
        counts = fresh.counts(sample)
        assert all(abs(int(count) - sample * ratio) <= fresh.bound for count, ratio in zip(counts, ratios, strict=True))
        np.testing.assert_array_equal(occurrences, prefix_counts(sources, 4)[np.arange(500), sources] - 1 + counts[sources])
    assert len(fresh._segments) <= 6  # and not the 488 of the whole period
    # whole periods need no table at all
    untouched = Apportionment(ratios)
    assert untouched.counts(3 * 10**6).tolist() == [2_010_003, 599_997, 300_009, 89_991] and not untouched._segments


@given(common_denominator(10**6), st.integers(0, 10**12), st.integers(50, 3000))
@settings(max_examples=25, deadline=None)
def test_any_sample_of_many_sources_follows_from_the_few_before_it(ratios: list[Fraction], sample: int, length: int) -> None:
    """Up to 64 sources, denominators up to a million: the bound at every prefix, whatever the order is built from."""
    fresh, other = Apportionment(ratios), Apportionment(ratios, segment_length=length)
    counts = fresh.counts(sample)
    sources, occurrences = fresh.locate(np.arange(sample, sample + 300))
    found = counts + prefix_counts(sources, len(ratios))
    np.testing.assert_array_equal(occurrences, found[np.arange(300), sources] - 1)
    for source, ratio in enumerate(ratios):
        assert all(abs(int(count) - (sample + at) * ratio) <= fresh.bound for at, count in enumerate(found[:, source], start=1))
    # tables that begin elsewhere are built from other steps
    for one, same in zip((sources, occurrences), other.locate(np.arange(sample, sample + 300)), strict=True):
        np.testing.assert_array_equal(one, same)
    position, rarest = sample % fresh.period, min(ratios)
    early = fresh._early_enough(position)
    assert position - early <= (1 - 2 * (1 - fresh.bound)) / rarest + 1


@given(common_denominator(3000), st.data())
@settings(max_examples=30, deadline=None)
def test_counts_begun_anywhere_early_enough_are_those_from_the_start(ratios: list[Fraction], data: st.DataObject) -> None:
    apportioned = Apportionment(ratios)
    sources, _ = apportioned.locate(np.arange(apportioned.period))
    for _ in range(5):
        last = data.draw(st.integers(1, apportioned.period))
        early = apportioned._early_enough(last)
        begun = apportioned._rounded(early)
        assert begun.sum() == early
        expected = np.bincount(sources[:last], minlength=len(ratios))
        np.testing.assert_array_equal(apportioned._walk(early, begun, last), expected)
