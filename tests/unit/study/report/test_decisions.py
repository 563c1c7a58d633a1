"""Decision accuracy: counts of pairs, intervals that cover, and the warning on small models."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_synth.study.forecast.decisions import decisions, interval_of, kept_pairs, too_small
from tests.unit.study.test_forecast import Made

SIZES = {10**8: "100m", 10**9: "1b"}


def runs(order: list[int], *, budgets: tuple[int, ...] = (10**9, 10**10)) -> list[Made]:
    """Arms a, b, ...; at the smallest cell in the given order, elsewhere in that of their names."""
    rows = []
    for n_params in SIZES:
        for tokens in budgets:
            ranks = order if (n_params, tokens) == (10**8, budgets[0]) else range(len(order))
            for arm, rank in enumerate(ranks):
                loss = 3 - 0.1 * np.log10(n_params * tokens / 1e17) + 0.02 * rank
                rows += [
                    Made(f"{n_params}{tokens}{arm}{seed}", "abcdef"[arm], n_params, tokens, loss + 1e-4 * seed)
                    for seed in (0, 1)
                ]
    return rows


def test_pairs_in_the_same_order() -> None:
    assert kept_pairs(np.array([1.0, 2, 3]), np.array([5.0, 6, 7])) == (3, 3)
    assert kept_pairs(np.array([3.0, 2, 1]), np.array([5.0, 6, 7])) == (0, 3)
    assert kept_pairs(np.array([1.0, 1, 3]), np.array([5.0, 6, 7])) == (2.5, 3)
    assert kept_pairs(np.array([2.0, 1, 3]), np.array([5.0, 5.01, 7]), np.full(3, 0.1)) == (2, 2)


def test_each_cell_against_the_largest() -> None:
    found = decisions(runs([0, 2, 1, 3]), SIZES, 0.001)
    assert [(one.size, one.tokens) for one in found] == [("100m", 10**9), ("100m", 10**10), ("1b", 10**9)]
    assert {(one.target_size, one.target_tokens) for one in found} == {("1b", 10**10)}
    first, *others = found
    assert (first.pairs, first.kept, first.accuracy) == (6, 5, pytest.approx(5 / 6)) and first.interval[
        0
    ] < 5 / 6 < first.interval[1]
    assert all(one.kept == 6 and one.interval[1] == 1.0 for one in others)
    assert first.told == 6 and first.told_kept == 5 and first.by_law is None
    assert decisions(runs([0, 1]), SIZES, None) == [], "two arms are one pair"


def test_laws_rank_beside() -> None:
    """Arms whose order turns with the budget: laws from four smaller budgets know it, ranking at these does not."""
    rows = []
    for tokens in (1e9, 2e9, 4e9, 8e9, 1e11):
        for arm, (floor, factor) in enumerate(((2.0, 2000), (1.95, 2300), (1.9, 2600))):
            rows.append(Made(f"{tokens}{arm}", "abc"[arm], 10**9, int(tokens), floor + factor / tokens**0.366))
    found = decisions(rows, SIZES, None)
    assert [one.by_law for one in found] == [None, None, 1.0, 1.0] and found[-1].law == "data"
    assert found[0].accuracy < 0.5 and found[0].told is None


@pytest.mark.parametrize("arms", [4, 8])
def test_intervals_cover(arms: int) -> None:
    """Of arms whose losses at the two scales correlate by 0.8: the order of two is kept with 1/2 + arcsin(0.8) / pi = 80 %."""
    random, truth, hits = np.random.default_rng(3), 0.5 + np.arcsin(0.8) / np.pi, 0
    for _ in range(200):
        small = random.standard_normal(arms)
        large = 0.8 * small + 0.6 * random.standard_normal(arms)
        low, high = interval_of(kept_pairs(small, large)[0], arms)
        hits += low <= truth <= high
    assert 0.85 <= hits / 200 <= 1
    assert interval_of(arms * (arms - 1) / 2, arms)[1] == 1.0 and interval_of(0, arms)[0] == 0.0


def test_small_models_are_warned_of() -> None:
    rows = [Made(str(n), arm, n, 10**9, 3.0) for n in (10**6, 10**8) for arm in "ab"]
    text = too_small(rows, {10**6: "1m", 10**8: "100m"})
    assert "1m here" in text and "2602.12237" in text and "0.73" in text
    assert too_small([row for row in rows if row.n_params > 10**7], {10**8: "100m"}) == ""
    assert too_small([row for row in rows if row.arm == "a"], {10**6: "1m", 10**8: "100m"}) == "", "nothing is compared"
