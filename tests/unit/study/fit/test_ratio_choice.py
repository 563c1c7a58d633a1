"""Which law in the ratio, or none, and whether mixtures keep their order, on fabricated runs whose truth is known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.cli.fit import main
from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.ratio.choice import RatioChoice, choose
from megatron_synth.study.fit.shares.fit import fit_shares
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.fit.shares.transfer import rank_of, transfers
from megatron_synth.study.report.ratio import best_ratio_by
from tests.simulate import grid
from tests.wrong_laws import BUDGETS, CELLS, NOISE, RATIOS, SIZES, Loss, abrupt, hidden_domains, right_law

RANGES = {"n_params": (1e8, 1.7e9), "tokens": (2e9, 7.5e10)}


def chosen(truth: Loss, seed: int = 0) -> RatioChoice:
    columns = grid(ratio=RATIOS, n_params=SIZES, tokens=BUDGETS)
    clean = truth(columns["n_params"], columns["tokens"], columns["ratio"])
    loss = clean * np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(clean)))
    return choose(columns, loss, bootstraps=60, seed=seed)


def best_of(truth: Loss, n: float, d: float) -> float:
    fine = np.linspace(0, 1, 1001)
    return float(fine[truth(np.full(1001, n), np.full(1001, d), fine).argmin()])


def test_the_right_law_is_chosen_and_its_best_ratio_is_in_a_narrow_interval() -> None:
    choice = chosen(right_law)
    assert choice.chosen is not None and choice.chosen.error < 0.4 * min(choice.baselines.values())
    assert not choice.candidates["mixture"].doubts
    for n, d in CELLS:
        found = best_ratio_by(choice, {"n_params": n, "tokens": d}, RANGES, noise=None, level=90)
        assert found is not None and found.inside
        assert found.interval[0] - 0.02 <= best_of(right_law, n, d) <= found.interval[1] + 0.02
        assert found.interval[1] - found.interval[0] < 0.5
    assert f"{choice.chosen.name}, which misses unseen ratios by" in choice.told()


def test_a_law_that_misses_left_out_ratios_has_a_wide_interval() -> None:
    choice = chosen(hidden_domains)
    assert choice.chosen is not None and choice.chosen.beyond > 0.005
    n, d = CELLS[1]
    found = best_ratio_by(choice, {"n_params": n, "tokens": d}, RANGES, noise=None, level=90)
    assert found is not None and found.interval[0] <= best_of(hidden_domains, n, d) <= found.interval[1]
    assert found.interval[1] - found.interval[0] > 0.4


def test_where_the_first_per_cent_act_there_is_no_law() -> None:
    choice = chosen(abrupt)
    assert choice.chosen is None and "without a law" in choice.refused
    assert best_ratio_by(choice, {"n_params": 1e8, "tokens": 2e9}, RANGES, noise=None, level=90) is None
    assert choice.to_json()["chosen"] is None


def test_fit_auto_writes_its_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = grid(ratio=RATIOS, n_params=SIZES[:2], tokens=BUDGETS)
    loss = right_law(columns["n_params"], columns["tokens"], columns["ratio"])
    loss = loss * np.exp(0.001 * np.random.default_rng(0).standard_normal(len(loss)))
    with open(tmp_path / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Model Size", "Training Tokens", "synthetic share", "val_loss"])
        writer.writerows(zip(columns["n_params"], columns["tokens"], columns["ratio"], loss, strict=True))
    arguments = [str(tmp_path / "runs.csv"), "--law", "auto", "--bootstraps", "40", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "out" / "law.json").read_text())
    assert content["chosen"] == "mixture" and len(content["best_ratio"]) == 6 and content["fit"]["params"]["E"] > 0
    assert (tmp_path / "out" / "fit.png").stat().st_size > 1000
    assert "best ratio, by runs" in capsys.readouterr().out
    with pytest.raises(UserError, match="--holdout is no option of --law auto"):
        main([*arguments, "--holdout", "tokens>1e10"])


def test_no_law_over_shares_where_the_nearest_run_is_as_good() -> None:
    random = np.random.default_rng(0)
    points = Mixtures(("a", "b", "c"), random.dirichlet(np.ones(3), 40))
    nothing = fit_shares(points, np.exp(random.normal(1, 0.01, 40)), law=("exponential", "log-linear"))
    assert nothing.no_law and nothing.to_json()["chosen"] is None
    assert {"nearest measured", "mean"} == set(nothing.baselines)
    clear = fit_shares(points, 2 + np.exp(points.shares @ [0.1, -0.5, 0.3]), law="exponential")
    assert not clear.no_law and clear.to_json()["chosen"] == "exponential"


def test_the_order_of_mixtures_between_sizes() -> None:
    random = np.random.default_rng(1)
    shares = random.dirichlet(np.ones(3), 30)
    sizes = np.repeat([1e7, 1e9], 60)
    points = Mixtures(("a", "b", "c"), np.tile(shares, (4, 1)), sizes)
    helped = shares @ np.array([[0.2, 0.1], [0.0, 0.05], [-0.3, -0.1]])
    loss = np.concatenate([3 + helped[:, 0], 3 + helped[:, 0], 2 + helped[:, 1], 2 + helped[:, 1]])
    loss = loss * np.exp(0.005 * random.standard_normal(120))
    found = transfers(points, loss)
    assert len(found) == 1 and found[0].proxy == {"n_params": pytest.approx(1e7)}
    rank = found[0].rank
    assert rank.mixtures == 30 and rank.interval[0] < rank.value < rank.interval[1] <= 1
    assert rank.ceiling is not None and rank.value - 0.1 < rank.ceiling < 1
    assert rank_of(np.arange(4.0), np.arange(4.0)) is None
    exact = rank_of(np.arange(9.0), np.arange(9.0) ** 2)
    assert exact is not None and exact.value == pytest.approx(1) and exact.interval == (pytest.approx(1), pytest.approx(1))
