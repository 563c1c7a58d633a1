"""Learning rates: the sweep in the plan, the fitted rule, and rates that are off."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.errors import ConfigError
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.plan.runs import expand
from megatron_synth.study.plan.study_file import load_study
from megatron_synth.study.rates.mis_set import fixed_rates
from megatron_synth.study.rates.rule import Point, fieller, fit_rule
from megatron_synth.study.report.analysis import analyze
from megatron_synth.study.report.checks import check_study, sentences
from megatron_synth.study.report.collect import read_runs_csv, runs_csv
from megatron_synth.study.report.report import write_report
from tests.simulate_rates import EXPONENTS, bend_rate, best_rate, sweep, sweep_rates
from tests.unit.study.report.test_study_report import simulated
from tests.unit.study.test_study_file import TINY, write_study

SWEEP = {"factors": [0.5, 1, 2], "batches": [4, 8]}


def test_the_sweep_is_part_of_the_plan(tmp_path: Path) -> None:
    plain = expand(load_study(write_study(tmp_path)))
    rates = {"lr": 1e-2, "warmup_fraction": 0.25, "min_lr_fraction": 0.1, "sweep": SWEEP}
    runs = expand(load_study(write_study(tmp_path, rates={**rates, "sweep": None})))
    swept = expand(load_study(write_study(tmp_path, rates=rates)))
    assert {run.id for run in runs} <= {run.id for run in swept} and len(plain) == len(runs)
    extra = [run for run in swept if run.sweep]
    # the baseline, first seed, smallest and largest budget of each size: s at 512 and 1024, m at 1024; 2 batches x 3 rates less
    # the run of the grid
    assert len(extra) == 3 * 5 and len({run.id for run in swept}) == len(swept)
    assert {(run.arm, run.seed) for run in extra} == {("natural", 1)} and {run.tokens for run in extra} == {512, 1024}
    one = next(
        run for run in extra if run.config.train.global_batch_size == 8 and run.budget == 1024 and run.config.optim.lr == 0.02
    )
    assert (
        one.config.train.steps == 4 and one.config.optim.warmup_steps == 1 and one.config.optim.min_lr == pytest.approx(0.002)
    )
    assert "-lr0.02-b8-" in one.name


def test_a_rule_in_budget_and_batch(tmp_path: Path) -> None:
    rates = {"lr": 1e-2, "at_tokens": 1024, "tokens_exponent": -0.3, "at_batch": 128, "batch_exponent": 0.5}
    runs = expand(load_study(write_study(tmp_path, rates=rates)))
    assert {run.budget: run.config.optim.lr for run in runs} == {1024: 0.01, 512: float(f"{0.01 * 0.5**-0.3:.3g}")}
    for wrong, words in (
        ({"lr": 1e-2, "tokens_exponent": -0.3}, "needs rates.at_tokens"),
        ({"lr": 1e-2, "sweep": {"arms": ["naturl"]}}, "naturl"),
        ({"lr": 1e-2, "sweep": {"tokens": [700]}}, "no budget of the grid"),
        ({"lr": 1e-2, "sweep": {"batches": [999]}}, "below one batch"),
        ({"lr": 1e-2, "sweep": {"factors": [1, 1]}}, "twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            expand(load_study(write_study(tmp_path, rates=wrong)))


def test_the_rule_is_found() -> None:
    points, _ = sweep(np.random.default_rng(0), 0.0005, 1)
    rule = fit_rule(points)
    assert rule is not None and not rule.doubtful and not rule.edges
    for axis, truth in EXPONENTS.items():
        assert rule.exponents[axis].low <= truth <= rule.exponents[axis].high, axis
        assert rule.exponents[axis].value == pytest.approx(truth, abs=0.06)
    at = rule.at(3e9, 5e10, 2**20)
    assert at.low <= best_rate(3e9, 5e10, 2**20) <= at.high and at.high / at.low < 2
    assert rule.lr.value == pytest.approx(best_rate(*rule.center), rel=0.05)
    flat = [replace(point, loss=3.0 + 0.001 * (number % 7)) for number, point in enumerate(points)]
    nothing = fit_rule(flat)
    assert nothing is not None and not nothing.lr.bounded and nothing.doubtful


def test_the_edge_of_a_sweep_is_seen() -> None:
    points = []
    for lr in (1e-4, 2e-4, 4e-4):
        points += [
            Point("a", 1e8, 1e9, 1e6, lr, 3 * float(np.exp(0.01 * np.log(lr / 8e-4) ** 2)) + 1e-5 * seed) for seed in (0, 1)
        ]
        points += [
            Point("b", 1e8, 1e10, 1e6, lr, 3 * float(np.exp(0.01 * np.log(lr / 2e-4) ** 2)) + 1e-5 * seed) for seed in (0, 1)
        ]
    rule = fit_rule(points)
    assert rule is not None and [(cell.cell, cell.edge) for cell in rule.edges] == [("a", "high")]
    assert fit_rule(points[:2]) is None


def test_fieller_against_draws() -> None:
    random = np.random.default_rng(0)
    variance = np.array([[0.04, 0.01], [0.01, 0.02]])
    hits = 0
    for _ in range(400):
        top, bottom = random.multivariate_normal([1.0, 2.0], variance)
        _, low, high = fieller(top, bottom, variance, 10_000)
        hits += low <= 0.5 <= high
    assert 0.86 <= hits / 400 <= 0.94
    assert fieller(1.0, 0.1, variance, 10)[1:] == (-np.inf, np.inf)


def test_rates_that_are_off_are_noticed_and_others_are_not() -> None:
    """Three times the best at the longest budget, 0.3 % noise, one seed: a cost of 1.2 %."""
    off = sweep_rates(0.003, 1, 3.0, 8)
    assert off["off"] == 1 and off["wrong"] <= 2 / 8
    assert sweep_rates(0.003, 1, 1.0, 12)["off"] <= 3 / 12
    assert bend_rate(0.003, 2, 3, 6, 0.02, 4) == 1
    assert bend_rate(0.003, 2, 3, 6, 0.0, 6) <= 2 / 6
    assert bend_rate(0.003, 2, 3, 6, 0.05, 4, only_one=True) <= 1 / 4, "what one arm does is no matter of rates"


BUDGETS = [512 * 2**power for power in range(6)]


@pytest.mark.parametrize("how", ["sweep", "bend", "good"])
def test_the_page_marks_a_rate_that_is_off(tmp_path: Path, how: str) -> None:
    """A rate three times too high for the longest budget alone, with a sweep and without one; and a good one."""
    sizes = {"s": {"model": TINY}}
    sweep_of = {"sweep": {"factors": [0.25, 0.5, 1, 2], "tokens": [BUDGETS[0], BUDGETS[-1]]}} if how == "sweep" else {}
    rates = {"lr": 1e-2, "at_tokens": BUDGETS[-1], "tokens_exponent": -0.3, **sweep_of}
    file = write_study(tmp_path, sizes=sizes, grid=[{"tokens": BUDGETS}], rates=rates)
    study = load_study(file, ["report.bootstraps=20"])
    runs = expand(study)
    random, by_name = np.random.default_rng(1), {run.name: run for run in runs}
    rows = []
    for row in simulated(study, runs):
        run = by_name[row.run]
        best = 1e-2 * (row.budget / BUDGETS[-1]) ** -0.3 / (3 if row.budget == BUDGETS[-1] and how != "good" else 1)
        cost = 0.02 * np.log(run.config.optim.lr / best) ** 2
        clean = 2.0 + 0.1 * row.ratio + 40 / row.tokens**0.5
        others = {**row.others, "lr": run.config.optim.lr, **({"sweep": 1.0} if run.sweep else {})}
        rows.append(replace(row, loss=float(clean * np.exp(cost + 0.001 * random.standard_normal())), others=others))
    (tmp_path / "runs.csv").write_text(runs_csv(rows))
    assert read_runs_csv(tmp_path / "runs.csv") == rows
    analysis = analyze(study, [row for row in rows if not row.swept], lambda _: None)
    checks = check_study(study, analysis, [row for row in rows if row.swept], Folder(tmp_path / "x"), from_table=True)
    found, codes = "\n".join(sentences(checks)), {doubt.code for doubt in analysis.data["natural", "s"].doubts}
    if how == "good":
        assert "A learning rate" not in found and "rate-mis-set" not in codes
        return
    assert "rate-mis-set" in codes
    assert "A learning rate may be off: for s at 16.4k tokens the losses of all 3 arms lie" in found
    if how == "bend":
        return
    assert re.search(
        r"A learning rate is off: for .* at 16.4k tokens and 128 per step the rate 0.01 is (2.[7-9]|3(.[0-3])?) ", found
    )
    text = write_report(study, runs, Folder(tmp_path / "x"), table=tmp_path / "runs.csv").read_text()
    assert "rate-mis-set" in text.split('id="law-0"')[1].split("</tr>")[0] and 'id="figure-rates"' in text
    assert text.count(" (sweep)") == sum(row.swept for row in rows)


def test_one_rate_for_all_budgets_is_warned_of() -> None:
    assert fixed_rates({"s": (1e9, 1e11), "m": (1e9, 4e9)}) == {"s": pytest.approx(100**0.15)}
