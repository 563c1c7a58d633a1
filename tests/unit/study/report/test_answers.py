"""Answers: speed-up, best ratios, equal cost, trends and the noise floor, on studies whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.fit import Fit, fit
from megatron_synth.study.fit.laws import LAWS, Floats
from megatron_synth.study.fit.noise import Noise, holm, noise_floor, trend
from megatron_synth.study.fit.table.domains import aggregate, bits_per_byte
from megatron_synth.study.report.answers import (
    best_ratio,
    compare_at_compute,
    compare_at_tokens,
    compute_optimal,
    speed_up,
    tokens_needed,
    tokens_needed_measured,
)
from tests.simulate import BUDGETS, JOINT, SIZES, STUDIES, Study, best_measured_rate, best_ratio_rate, grid, true_best_ratio

NATURAL = {"B": 2085.0, "beta": 0.366, "E": 2.2}
MIXED = {"B": 1500.0, "beta": 0.37, "E": 2.15}
TOKENS = {"tokens": np.repeat(BUDGETS, 2)}


def arm(truth: dict[str, float], seed: int = 0, noise: float = 0.0, bootstraps: int = 0) -> Fit:
    return Study("data", TOKENS, truth, noise).fit(np.random.default_rng(seed), bootstraps)


def needed(truth: dict[str, float], loss: Floats) -> Floats:
    return (truth["B"] / (loss - truth["E"])) ** (1 / truth["beta"])


def test_speed_up_without_noise_is_the_formula() -> None:
    result = speed_up(arm(NATURAL), arm(MIXED))
    reached = result.loss > NATURAL["E"]
    exact = needed(NATURAL, result.loss[reached]) / needed(MIXED, result.loss[reached])
    np.testing.assert_allclose(result.fitted[reached], exact, rtol=2e-3)
    both = result.inside & np.isfinite(result.measured)
    assert both.sum() > 10
    np.testing.assert_allclose(result.measured[both], result.fitted[both], rtol=0.05)  # linear between budgets
    assert np.isnan(result.measured[~result.inside]).all()
    assert not result.inside[result.loss < 1e-9 + arm(NATURAL).loss.min()].any()
    assert (np.diff(result.loss) < 0).all()


def test_speed_up_below_a_floor() -> None:
    """Only the mixture reaches 2.18; only the natural arm would, were they exchanged; neither reaches 2.1."""
    losses = [2.18, 2.1]
    assert speed_up(arm(NATURAL), arm(MIXED), losses=losses).fitted[0] == math.inf
    assert speed_up(arm(MIXED), arm(NATURAL), losses=losses).fitted[0] == 0
    assert np.isnan(speed_up(arm(NATURAL), arm(MIXED), losses=losses).fitted[1])


def test_speed_up_bands_cover() -> None:
    hits, random = np.zeros(2), np.random.default_rng(0)
    losses = np.array([2.6, 2.4])
    truth = needed(NATURAL, losses) / needed(MIXED, losses)
    for seed in range(120):
        fits = [arm(params, int(random.integers(2**31)), 0.003, 150) for params in (NATURAL, MIXED)]
        result = speed_up(*fits, losses=losses)
        hits += (result.low <= truth) & (truth <= result.high)
        assert (result.low <= result.fitted).all() and (result.fitted <= result.high).all(), seed
    assert (hits >= 0.86 * 120).all(), hits  # above 90 % on average, as the band holds that of the laws and that of the runs


def test_a_measured_curve_is_read_where_it_first_reaches_a_loss() -> None:
    tokens, loss = np.array([1e9, 1e10, 1e11, 1e12]), np.array([3.0, 2.5, 2.7, 2.0])
    found = tokens_needed_measured(tokens, loss, np.array([3.1, 3.0, 2.75, 2.6, 2.0, 1.9]))
    np.testing.assert_allclose(found[1:5], [1e9, 10**9.5, 10**9.8, 1e12])
    assert np.isnan(found[0]) and np.isnan(found[5])


def test_tokens_needed_is_the_laws_inverse() -> None:
    natural = arm(NATURAL)
    budgets = np.array([1e9, 3e11])
    np.testing.assert_allclose(tokens_needed(natural.theta[None], natural, natural.predict({"tokens": budgets}))[0], budgets)
    rising = natural.law.to_theta({"B": 1.0, "beta": -0.1, "E": 1.0})
    assert tokens_needed(rising[None], natural, np.array([2.0]))[0, 0] == math.inf


@pytest.mark.parametrize(("n_params", "tokens"), [(0.1e9, 2e9), (1.7e9, 75e9)])
def test_the_best_ratio_is_in_its_interval_at_the_nominal_rate(n_params: float, tokens: float) -> None:
    study = STUDIES["mixture, 4 ratios x 3 sizes x 3 budgets x 2 seeds"]
    assert 0.84 <= best_ratio_rate(study, 100, n_params, tokens) <= 0.97


def test_the_flat_band_is_the_ratios_within_the_noise() -> None:
    study = STUDIES["mixture, 4 ratios x 3 sizes x 3 budgets x 2 seeds"]
    fitted = study.fit(np.random.default_rng(0), bootstraps=50)
    point = {"n_params": 1e9, "tokens": 20e9}
    result = best_ratio(fitted, **point, noise=Noise(0.002, 20, (0.001, 0.003)))
    assert result.flat is not None and result.inside
    low, high = result.flat
    assert 0 < low < result.ratio < high < 1
    edge = fitted.predict({**point, "ratio": [low, high]})
    np.testing.assert_allclose(edge / result.loss, np.exp(0.002), rtol=2e-4)
    assert result.ratio == pytest.approx(true_best_ratio(study, point), abs=0.15)
    assert not best_ratio(fitted, n_params=1e9, tokens=1e13).inside
    with pytest.raises(UserError, match="depends on tokens; say at which"):
        best_ratio(fitted, n_params=1e9)
    with pytest.raises(UserError, match="'data' has no ratio"):
        best_ratio(arm(NATURAL), tokens=1e9)


@pytest.mark.parametrize("losses", [[2.5, 2.48, 2.49, 2.6], [2.5, 2.5, 2.5, 2.5], [2.4, 2.5, 2.6, 2.7]])
def test_the_measured_band_holds_the_best_ratio(losses: list[float]) -> None:
    rate, size = best_measured_rate(0.004, losses, seeds=3, draws=400)
    assert rate >= 0.9
    assert size >= 3 if len(set(losses)) == 1 else size < 3.2


def test_the_noise_floor_is_the_scatter_of_seeds() -> None:
    random, inside, values = np.random.default_rng(0), 0, []
    settings = list(itertools.chain.from_iterable([[name] * 3 for name in "abcdefgh"]))
    levels = np.repeat(np.linspace(2, 3, 8), 3)
    for _ in range(300):
        floor = noise_floor(settings, levels * np.exp(0.003 * random.standard_normal(24)))
        assert floor is not None and floor.freedom == 16
        inside += floor.interval[0] <= 0.003 <= floor.interval[1]
        values.append(floor.relative)
    assert 0.86 <= inside / 300 <= 0.94
    assert np.mean(values) == pytest.approx(0.003, rel=0.05)
    assert noise_floor(["a", "b"], [2.0, 3.0]) is None


def test_trends_are_found_at_their_rate() -> None:
    random = np.random.default_rng(0)
    x = np.repeat(np.log2(BUDGETS), 3)
    verdicts: dict[float, list[str]] = {slope: [] for slope in (-0.006, 0.0, 0.006)}
    covered = 0
    for slope in verdicts:
        for _ in range(500):
            result = trend(x, np.exp(slope * x + 0.003 * random.standard_normal(len(x))))
            verdicts[slope].append(result.verdict)
            covered += result.interval[0] <= slope <= result.interval[1]
    assert len(result.values) == 3 and result.runs == 9
    assert 0.87 <= covered / 1500 <= 0.93
    assert 0.86 <= verdicts[0.0].count("undecided") / 500 <= 0.94
    assert verdicts[-0.006].count("rises") <= 5 and verdicts[0.006].count("falls") <= 5
    assert verdicts[-0.006].count("falls") == pytest.approx(verdicts[0.006].count("rises"), abs=50)


def test_a_trend_needs_something_to_be_held_against() -> None:
    with pytest.raises(UserError, match="two runs leave nothing"):
        trend([1.0, 2.0], [3.0, 2.9])
    assert trend([1.0, 2.0], [3.0, 2.9], noise=Noise(0.003, 16, (0.002, 0.004))).verdict == "falls"
    assert trend([1.0, 2.0, 2.0], [3.0, 3.1, 3.1], noise=Noise(0.003, 16, (0.002, 0.004))).verdict == "rises"
    with pytest.raises(UserError, match="at least two different x"):
        trend([1.0, 1.0], [3.0, 2.9])


def test_holms_correction() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])


def joint_fit(truth: dict[str, float], seed: int, noise: float = 0.002, bootstraps: int = 100) -> Fit:
    columns = grid(n_params=SIZES[::2], tokens=BUDGETS[::2])
    return Study("joint", columns, truth, noise).fit(np.random.default_rng(seed), bootstraps)


def test_equal_compute_is_the_best_of_all_sizes() -> None:
    fitted, flops = joint_fit(JOINT, 0, noise=0.0), 1e21
    best = compute_optimal(fitted, fitted.theta[None], flops)
    sizes = np.geomspace(1e7, 1e12, 20_001)
    losses = fitted.predict({"n_params": sizes, "tokens": flops / (6 * sizes)})
    assert best["n_params"][0] == pytest.approx(sizes[losses.argmin()], rel=1e-3)
    assert fitted.predict(best)[0] == pytest.approx(losses.min(), rel=1e-9)
    np.testing.assert_allclose(6 * best["n_params"] * best["tokens"], flops)


def test_arms_at_equal_cost() -> None:
    better = {**JOINT, "E": JOINT["E"] * 0.97}
    arms = {"natural": joint_fit(JOINT, 0), "same": joint_fit(JOINT, 1), "better": joint_fit(better, 2)}
    for compared in (
        compare_at_tokens(arms, "natural", n_params=1e9, tokens=2e10),
        compare_at_compute(arms, "natural", 1.2e20),
    ):
        natural, same, best = compared
        assert natural.difference == 0 and not natural.distinct
        assert not same.distinct and same.difference_interval[0] < 0 < same.difference_interval[1]
        assert best.distinct and best.difference == pytest.approx(-0.025, abs=0.01)
        for entry in compared:
            assert entry.interval[0] <= entry.loss <= entry.interval[1] and entry.inside
    far = compare_at_compute(arms, "natural", 1e26)
    assert not any(entry.inside for entry in far)
    with pytest.raises(UserError, match="there is no arm 'web'; one of: natural, same, better"):
        compare_at_tokens(arms, "web", n_params=1e9, tokens=2e10)
    with pytest.raises(UserError, match="depends on n_params"):
        compare_at_tokens(arms, "natural", tokens=2e10)


def test_aggregates_of_domains() -> None:
    losses = {"web": [2.0, 3.0], "code": [1.0, 1.0], "books": [3.0, 2.0]}
    tokens, size = {"web": 100, "code": 300, "books": 100}, {"web": 400, "code": 900, "books": 450}
    np.testing.assert_allclose(aggregate(losses, "macro"), [2, 2])
    np.testing.assert_allclose(aggregate(losses, "micro", tokens=tokens), [1.6, 1.6])
    np.testing.assert_allclose(aggregate(losses, "worst"), [3, 3])
    np.testing.assert_allclose(aggregate(losses, "macro", domains=["web", "code"]), [1.5, 2])
    np.testing.assert_allclose(bits_per_byte(losses, tokens, size), np.array([800, 800]) / (math.log(2) * 1750))
    single = bits_per_byte({"web": [2.0]}, {"web": 100}, {"web": 400})
    assert single[0] == pytest.approx(2 / math.log(2) / 4)
    with pytest.raises(UserError, match="number of tokens of code"):
        aggregate(losses, "micro", tokens={"web": 1, "books": 1})
    with pytest.raises(UserError, match="no losses of poems; there are: web, code, books"):
        aggregate(losses, "macro", domains=["poems"])
    with pytest.raises(UserError, match="unknown aggregate 'mean'"):
        aggregate(losses, "mean")


def test_a_fit_of_one_ratio_scan_answers_too() -> None:
    """One N and one D: the mixture law is its floor alone."""
    ratios = np.repeat([0.0, 0.25, 0.5, 0.75, 1.0], 3)
    law = LAWS["mixture"].reduced({"ratio": ratios})
    clean = law.predict(law.to_theta({"E": 2.5, "e1": -0.1, "e2": 0.12}), {"ratio": ratios})
    loss = clean * np.exp(0.002 * np.random.default_rng(0).standard_normal(15))
    result = best_ratio(fit("mixture", {"ratio": ratios}, loss, bootstraps=200))
    assert result.ratio == pytest.approx(0.1 / 0.24, abs=0.05)
    assert result.interval[0] <= result.ratio <= result.interval[1]
