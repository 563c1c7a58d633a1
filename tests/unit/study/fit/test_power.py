"""Power before the study runs: what the formulas say is what simulated studies do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_ind

from megatron_synth.study.fit.contrast import contrast
from megatron_synth.study.fit.power import power_text, seeds_needed, smallest_difference, smallest_floor


def test_the_smallest_difference_is_found_nine_times_of_ten() -> None:
    random, found = np.random.default_rng(0), 0
    effect = smallest_difference(4, 0.003)
    assert effect is not None
    for _ in range(400):
        worse, base = effect + 0.003 * random.standard_normal(4), 0.003 * random.standard_normal(4)
        found += ttest_ind(worse, base, alternative="greater").pvalue < 0.05
    assert 0.85 <= found / 400 <= 0.95
    assert smallest_difference(1, 0.003) is None


def test_seeds_needed_is_the_inverse() -> None:
    for noise in (0.001, 0.003, 0.01):
        needed = seeds_needed(0.005, noise)
        assert needed is not None and smallest_difference(needed, noise) <= 0.005  # type: ignore[operator]
        assert needed == 2 or smallest_difference(needed - 1, noise) > 0.005  # type: ignore[operator]
    assert seeds_needed(1e-5, 0.01) is None


def test_the_smallest_floor_is_found_about_nine_times_of_ten() -> None:
    budgets = np.geomspace(1e9, 1e11, 6)
    rise = smallest_floor(list(budgets), 3, 0.003)
    assert rise is not None and 0.001 < rise < 0.05
    tokens, random, found = np.repeat(budgets, 3), np.random.default_rng(0), 0
    base = 1.82 + 2085 / tokens**0.366
    for _ in range(100):
        noisy = [clean * np.exp(0.003 * random.standard_normal(18)) for clean in (base + rise * 1.82, base)]
        floor = contrast(tokens, noisy[0], tokens, noisy[1]).floor
        found += floor is not None and floor.p < 0.05
    assert 80 <= found <= 98, found
    assert smallest_floor([1e9, 2e9], 3, 0.003) is None
    assert smallest_floor([1e9, 2e9, 4e9], 1, 0.003) is None  # nothing is left to estimate the scatter from


def test_the_plan_says_what_it_will_show() -> None:
    text = power_text({"1b": [1e9, 1e10, 1e11, 1e12], "3b": [1e10]}, 3)
    assert text.count("\n") == 3 and "a floor" in text and "at 1b" in text and "at 3b" not in text
    assert "0.5 % takes 2 seeds" in text
    alone = power_text({"1b": [1e9]}, 1)
    assert "no difference of two runs" in alone and "collapse is judged by the gap alone" in alone
    assert seeds_needed(0.005, 0.003) == pytest.approx(7, abs=2)
