"""Loops of generating and training in numbers: contrasts over seeds, components of variance, what unigrams lose."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.rounds import rounds_contrast, spread_of
from megatron_synth.synthesis.measure.unigrams import HEAD_SHARE, compare_unigrams, in_tail
from tests.simulate_rounds import any_false, rates


def test_contrasts_are_means_over_seeds_with_students_intervals() -> None:
    real = np.array([4.0, 4.2, 4.1])
    slopes = np.array([0.02, 0.03, 0.04])
    rounds = real[:, None] * np.exp(0.05 + slopes[:, None] * np.arange(3))
    found = rounds_contrast(real, rounds)
    assert found.rise is not None and found.rise.value == pytest.approx(0.03) and found.seeds == 3
    # Student's t at 95 % with two degrees of freedom, from a table
    half = 2.9200 * 0.01 / np.sqrt(3)
    assert found.rise.interval == pytest.approx((0.03 - half, 0.03 + half), rel=1e-4)
    assert found.rise.p == pytest.approx(0.01755, abs=1e-4)
    assert [one.value for one in found.by_round] == pytest.approx([0.05, 0.08, 0.11])
    assert rounds_contrast(real, rounds[:, :1]).rise is None


def test_a_step_is_no_rise() -> None:
    random = np.random.default_rng(0)
    real = 4 * np.exp(0.01 * random.standard_normal(5))
    found = rounds_contrast(real, real[:, None] * np.exp(0.1 + 0.005 * random.standard_normal((5, 3))))
    assert found.rise is not None and found.rise.p > 0.05 and found.last.p < 1e-4


@pytest.mark.parametrize("rounds", [np.ones((2, 3)), np.ones(3), np.ones((3, 0))])
def test_shapes_that_do_not_fit(rounds: np.ndarray) -> None:
    with pytest.raises(UserError):
        rounds_contrast([4.0, 4.1, 4.2], rounds)


def test_one_seed_has_no_contrast() -> None:
    with pytest.raises(UserError, match="at least two"):
        rounds_contrast([4.0], [[4.1, 4.2]])


def test_rises_are_found_and_few_are_found_that_are_not_there() -> None:
    # 300 draws: standard errors of 1.3 % at a rate of 5 %, and of 2 % at 90 %
    for drift in (0.0, 0.012):
        assert any_false(3, 3, 0.012, drift, 300) < 0.09
    power, held = rates(3, 3, 0.04, 0.012, 0.0, 300)
    assert power > 0.8 and 0.84 < held < 0.96


def test_spread_between_corpora_and_between_seeds() -> None:
    random = np.random.default_rng(1)
    estimates = []
    for _ in range(200):
        logs = (
            0.02 * random.standard_normal((4, 1))
            + 0.01 * random.standard_normal((1, 5))
            + 0.003 * random.standard_normal((4, 5))
        )
        one = spread_of(np.exp(1.5 + logs))
        estimates.append((one.between_corpora**2, one.between_seeds**2, one.rest**2))
    assert np.sqrt(np.mean(estimates, axis=0)) == pytest.approx([0.02, 0.01, 0.003], rel=0.12)
    equal = spread_of(np.exp(1 + 0.01 * random.standard_normal((3, 4))))
    assert equal.p > 0.01 and spread_of(np.exp([[1.0, 1.001], [2.0, 2.002]])).p < 0.01
    with pytest.raises(UserError):
        spread_of([[4.0, 4.1]])


def test_the_tail_is_what_the_most_frequent_leave() -> None:
    natural = np.array([60, 30, 5, 3, 1, 1, 0], np.int64)
    assert in_tail(natural).tolist() == [False, False, True, True, True, True, False]
    assert natural[in_tail(natural)].sum() <= (1 - HEAD_SHARE) * natural.sum() + 1e-9


def test_lost_tokens_beside_those_that_chance_loses() -> None:
    random = np.random.default_rng(3)
    p = 1 / np.arange(1, 501) ** 1.3
    natural = random.multinomial(200_000, p / p.sum())
    several = [compare_unigrams(random.multinomial(5_000, natural / natural.sum()), natural) for _ in range(30)]
    # 30 means of 408 types: a standard error of 0.5 %
    assert (
        np.mean([one.lost for one in several]) == pytest.approx(several[0].lost_by_chance, abs=0.02) and several[0].lost > 0.05
    )
    assert np.mean([one.kl for one in several]) == pytest.approx(several[0].kl_by_chance, rel=0.2)
    # a text without the rarest half of the types
    cut = random.multinomial(50_000, natural / natural.sum())
    cut[250:] = 0
    worse = compare_unigrams(cut, natural)
    assert worse.lost > worse.lost_by_chance + 0.2 and worse.kl_reverse > 1.5 * worse.kl_reverse_by_chance
    assert compare_unigrams(natural, natural).kl == 0
    with pytest.raises(ValueError, match="no tokens"):
        compare_unigrams(np.zeros(500, np.int64), natural)
