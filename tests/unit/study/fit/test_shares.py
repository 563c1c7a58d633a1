"""Laws over shares: gradients, fabricated truths, intervals, doubts, and the tables they are read from."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.cli import main as cli
from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares import trees
from megatron_synth.study.fit.shares.fit import fit_shares
from megatron_synth.study.fit.shares.gaussian import GaussianProcess, _features, _negative_likelihood, _prior
from megatron_synth.study.fit.shares.laws import SHARE_LAWS, share_law_named
from megatron_synth.study.fit.shares.parametric import PARAMETRIC, ParametricLaw, _value
from megatron_synth.study.fit.shares.points import Mixtures, normalized
from megatron_synth.study.fit.shares.table import read_mixtures, source_columns
from megatron_synth.study.fit.shares.validation import rank_correlation

SOURCES = ("web", "code", "qa", "books")
QUICK = ("log-linear", "exponential", "additive", "gaussian-process")


def mixtures(runs: int, seed: int = 0, *, sizes: bool = False, concentration: float = 0.7) -> Mixtures:
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(len(SOURCES), concentration), size=runs)
    if not sizes:
        return Mixtures(SOURCES, shares)
    return Mixtures(SOURCES, shares, random.choice([1e8, 4e8, 1e9], runs), random.choice([2e9, 8e9, 3e10], runs))


def truth(points: Mixtures) -> Floats:
    """A domain that code helps most and web a little; sizes and tokens as in a joint law."""
    helped = 0.4 + np.array([0.8, 3.0, 0.5, 0.05]) @ points.shares.T ** np.array([0.4, 0.5, 0.6, 0.5])[:, None]
    loss = 1.8 + 1 / helped
    for column, factor, exponent in ((points.n_params, 300.0, 0.35), (points.tokens, 800.0, 0.34)):
        loss = loss if column is None else loss + factor / column**exponent
    return np.asarray(loss)


def noisy(points: Mixtures, noise: float, seed: int = 1) -> Floats:
    return truth(points) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(points)))


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("law", PARAMETRIC, ids=lambda law: law.name)
def test_slopes_are_those_of_finite_differences(law: ParametricLaw, sizes: bool) -> None:
    points, step = mixtures(9, sizes=sizes), 1e-6
    terms = law.joint(points)
    theta = 0.3 * np.random.default_rng(3).standard_normal(len(law.parameters(points)))
    slopes = _value(terms, law.floor, theta, points)[1]
    for place, shift in enumerate(step * np.eye(len(theta))):
        up, down = (_value(terms, law.floor, theta + sign * shift, points)[0] for sign in (1, -1))
        np.testing.assert_allclose(slopes[:, place], (up - down) / (2 * step), atol=1e-8)


def test_the_gradient_of_the_marginal_likelihood() -> None:
    points, step = mixtures(25), 1e-5
    features = _features(points)
    target = np.log(noisy(points, 0.01))
    target = (target - target.mean()) / target.std()
    prior = _prior(features.shape[1])
    theta = prior + 0.3 * np.random.default_rng(0).standard_normal(len(prior))
    gradient = _negative_likelihood(theta, features, target, prior)[1]
    for place, shift in enumerate(step * np.eye(len(theta))):
        up, down = (_negative_likelihood(theta + sign * shift, features, target, prior)[0] for sign in (1, -1))
        assert gradient[place] == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["exponential", "power", "additive"])
def test_noise_free_runs_of_a_law_give_its_predictions_back(name: str) -> None:
    law = next(law for law in PARAMETRIC if law.name == name)
    points, new = mixtures(80), mixtures(40, seed=9)
    theta = np.concatenate([[np.log(1.9)], 0.4 * np.random.default_rng(5).standard_normal(len(law.parameters(points)) - 1)])
    clean = _value(law.joint(points), law.floor, theta, points)[0]
    found = law.fit(points, clean).log_predict(new)
    np.testing.assert_allclose(found, _value(law.joint(new), law.floor, theta, new)[0], atol=6e-3)


def test_the_law_is_chosen_by_unseen_mixtures_and_its_intervals_hold() -> None:
    points, new = mixtures(64), mixtures(300, seed=9)
    fit = fit_shares(points, noisy(points, 0.003), law=QUICK)
    assert fit.law.name in ("additive", "gaussian-process") and set(fit.compared) == set(QUICK)
    assert fit.chosen.error < 0.01 < fit.compared["log-linear"].error
    assert fit.chosen.rank is not None and fit.chosen.rank > 0.97
    np.testing.assert_allclose(fit.predict(new), truth(new), rtol=0.05)
    runs = noisy(new, 0.003, seed=2)
    low, high = fit.predict_interval(new)
    assert 0.8 < np.mean((runs >= low) & (runs <= high)) <= 0.99  # 64 runs: the rate itself scatters by some per cent
    assert not fit.warnings


def test_shares_sizes_and_tokens_in_one_law() -> None:
    points = mixtures(150, sizes=True)
    fit = fit_shares(points, noisy(points, 0.003), law="additive")
    new = Mixtures(SOURCES, mixtures(50, seed=4).shares, np.full(50, 2e9), np.full(50, 6e10))  # twice as large as any
    assert np.mean(np.abs(fit.predict(new) / truth(new) - 1)) < 0.02
    assert fit.to_json()["joint_in"] == ["n_params", "tokens"]
    exponents = {name: np.exp(pair[0]) for name, pair in fit.fitted.to_json()["parameters"].items() if "lpha" in name}
    assert exponents == {"log alpha": pytest.approx(0.35, abs=0.1)}


def test_folds_keep_the_seeds_of_a_mixture_together() -> None:
    one = mixtures(12)
    points = Mixtures(SOURCES, np.repeat(one.shares, 3, axis=0))
    fit = fit_shares(points, noisy(points, 0.003), law="exponential")
    assert all(len(set(fold)) == 1 for fold in fit.chosen.fold_of.reshape(12, 3))


def test_same_seed_same_fit() -> None:
    points = mixtures(40)
    first, second = (fit_shares(points, noisy(points, 0.01), law=QUICK).to_json() for _ in range(2))
    assert first == second


def codes(points: Mixtures, loss: Floats, **options: object) -> set[str]:
    return {doubt.code for doubt in fit_shares(points, loss, **options).warnings}  # type: ignore[arg-type]


def test_what_speaks_against_a_law_is_said() -> None:
    points = mixtures(40)
    loss = noisy(points, 0.003)
    assert codes(points, loss, law="additive") == set()
    assert codes(points, loss, law="additive", epochs=np.linspace(1, 8, 40)) == {"repetition-ignored"}
    assert codes(points, loss, law="additive", epochs=np.linspace(0.1, 1, 40)) == set()
    assert "explains-nothing" in codes(points, np.exp(np.random.default_rng(0).normal(1, 0.01, 40)), law="exponential")
    few = points.rows(np.arange(8))
    assert "few-points" in codes(few, loss[:8], law="additive")
    rare = Mixtures(SOURCES, np.column_stack([points.shares[:, :3] / points.shares[:, :3].sum(1)[:, None], np.zeros(40)]))
    assert "source-rarely-seen" in codes(rare, noisy(rare, 0.003), law="exponential")
    seeds = Mixtures(SOURCES, np.repeat(mixtures(30).shares, 2, axis=0))
    assert "law-rejected" in codes(seeds, noisy(seeds, 0.0005), law="log-linear")


def test_a_hold_out_of_other_runs_is_noticed() -> None:
    points = mixtures(80)
    loss, out = noisy(points, 0.003), np.arange(80) >= 60
    sound = fit_shares(points, loss, law="additive", holdout=out)
    assert sound.holdout is not None and sound.holdout.points == 20 and sound.holdout.mean_absolute_relative_error < 0.02
    assert sound.holdout.rank is not None and sound.holdout.rank > 0.9
    shifted = fit_shares(points, np.where(out, 1.2 * loss, loss), law="additive", holdout=out)
    assert "holdout-missed" in {doubt.code for doubt in shifted.warnings}


def test_trees_where_they_are_installed_and_a_clear_word_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    points = mixtures(30)
    monkeypatch.setattr(trees.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"law 'boosted-trees' needs lightgbm: pip install 'megatron-synth\[trees\]'"):
        fit_shares(points, noisy(points, 0.01), law="boosted-trees")
    monkeypatch.undo()
    pytest.importorskip("lightgbm")
    points = mixtures(200)
    fitted = share_law_named("boosted-trees").fit(points, np.log(noisy(points, 0.003)))
    rank = rank_correlation(points, fitted.log_predict(points), np.log(truth(points)))
    assert rank is not None and rank > 0.9
    assert max(fitted.to_json()["gain"], key=fitted.to_json()["gain"].get) == "code"


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(UserError, match=r"row 1 sum to 0.7, expected 1: is a source missing"):
        normalized([[0.5, 0.5], [0.5, 0.2]])
    with pytest.raises(UserError, match=r"row 0, source 1: expected a share of 0 or more, got -0.5"):
        normalized([[1.5, -0.5]])
    np.testing.assert_allclose(normalized([[3e9, 1e9], [2e9, 2e9]]), [[0.75, 0.25], [0.5, 0.5]])
    with pytest.raises(UserError, match="unknown law over shares 'adaptive'; did you mean 'additive'"):
        share_law_named("adaptive")
    with pytest.raises(UserError, match="at least 3 different mixtures, got 1"):
        fit_shares(Mixtures(SOURCES, np.full((5, 4), 0.25)), np.full(5, 2.0), law="exponential")
    with pytest.raises(UserError, match="an interval of 99 % needs at least 99 runs, got 40"):
        fit_shares(mixtures(40), noisy(mixtures(40), 0.01), law="exponential").predict_interval(mixtures(2), 99)
    with pytest.raises(UserError, match="say at which n_params mixtures are compared"):
        mixtures(5, sizes=True).at([[1, 0, 0, 0]])
    assert {"exponential", "bimix", "gaussian-process", "boosted-trees"} <= set(SHARE_LAWS)
    assert GaussianProcess().parameters(mixtures(2)) == []


def write(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two tables as RegMix has them, the second in another order."""
    points = mixtures(40)
    loss = noisy(points, 0.003)
    ratios = write(
        tmp_path / "ratios.csv",
        ["index", *(f"train_{name}" for name in SOURCES)],
        [[place, *np.round(shares, 3)] for place, shares in enumerate(points.shares)],
    )
    rows = [[place, value, 1 + value] for place, value in enumerate(loss)][::-1]
    return ratios, write(tmp_path / "metrics.csv", ["index", "metric/a", "metric/b"], rows)


def test_a_pair_of_tables_is_fitted_per_domain(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = ["fit", str(pair[0]), "--law", "shares", "--sources", "train_*", "--losses", str(pair[1]), "--out", str(out)]
    options = ["--loss-column", "metric/*", "--method", "additive", "--holdout", "index>=32"]
    assert cli.main([*base, *options]) == 0
    found = json.loads((out / "metric_a" / "law.json").read_text())
    assert found["sources"] == list(SOURCES) and found["chosen"] == "additive" and found["points"] == 32
    assert found["holdout"]["points"] == 8 and found["cross_validation"]["laws"]["additive"]["error"] < 0.02
    assert len(found["data"]["files"]) == 2
    lowest = found["lowest"]
    assert lowest["shares"]["code"] > 0.5 and sum(lowest["shares"].values()) == pytest.approx(1)
    assert lowest["loss"] <= noisy(mixtures(40), 0.003).min() * 1.01 and lowest["interval"][0] < lowest["interval"][1]
    assert lowest["near"]["code"][0] <= lowest["shares"]["code"] <= lowest["near"]["code"][1]
    assert (out / "metric_b" / "fit.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "* additive" in said and "hold-out index>=32: 8 runs" in said and "mean" in said

    assert (
        cli.main([*base[:-2], "--out", str(out / "x"), "--loss-column", "metric/*", "--aggregate", "macro", *options[2:4]]) == 0
    )
    assert json.loads((out / "x" / "law.json").read_text())["loss"] == "macro"


def test_other_mixtures_are_predicted(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sources in another order; their losses are not known."""
    new = mixtures(30, seed=9)
    order = [1, 0, 3, 2]
    head = ["run", *(f"train_{SOURCES[place]}" for place in order)]
    asked = write(tmp_path / "new.csv", head, [[f"n{row}", *shares[order]] for row, shares in enumerate(new.shares)])
    out = tmp_path / "out"
    base = ["fit", str(pair[0]), "--law", "shares", "--sources", "train_*", "--losses", str(pair[1]), "--out", str(out)]
    options = ["--loss-column", "metric/a", "--method", "additive", "--predict", str(asked)]
    assert cli.main([*base, *options]) == 0
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows[:2]] == ["n0", "n1"]
    np.testing.assert_allclose([float(row["metric/a"]) for row in rows], truth(new), rtol=0.03)
    assert all(float(row["metric/a/low"]) < float(row["metric/a"]) < float(row["metric/a/high"]) for row in rows)
    parts = new.shares[:, order][:, :-1]
    parts = parts / parts.sum(axis=1, keepdims=True)
    write(asked, head[:-1], [[f"n{row}", *shares] for row, shares in enumerate(parts)])
    assert cli.main([*base, *options, "--out", str(tmp_path / "other")]) == 2
    assert "source 'qa' stands in one of the two tables only" in capsys.readouterr().err


def test_our_own_table_is_read_by_its_tokens(tmp_path: Path) -> None:
    points = mixtures(30, sizes=True)
    assert points.tokens is not None and points.n_params is not None
    rows = [
        [n, d, loss, *(d * shares), *(4 * shares)]
        for n, d, loss, shares in zip(points.n_params, points.tokens, noisy(points, 0.003), points.shares, strict=True)
    ]
    head = ["n_params", "tokens", "loss", *(f"tokens/{name}" for name in SOURCES), *(f"epochs/{name}" for name in SOURCES)]
    path = write(tmp_path / "runs.csv", head, rows)
    assert source_columns(read_mixtures(path), ["tokens/*"]) == {name: f"tokens/{name}" for name in SOURCES}
    out = tmp_path / "out"
    options = ["--law", "shares", "--sources", "tokens/*", "--method", "exponential", "--out", str(out)]
    assert cli.main(["fit", str(path), *options]) == 0
    found = json.loads((out / "law.json").read_text())
    assert found["joint_in"] == ["n_params", "tokens"]
    assert "repetition-ignored" in {warning["code"] for warning in found["warnings"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--law shares needs --sources"),
        (["--sources", "share/*"], "--sources 'share/*' matches no column"),
        (["--sources", "train_web"], "finds 1 column; a mixture has at least two"),
        (["--sources", "train_[wc]*"], "the shares of line 2 sum to"),
        (["--sources", "train_*", "--method", "trees"], "unknown law over shares 'trees'"),
        (["--sources", "train_*", "--key", "arm"], "no column 'arm' in both"),
        (["--sources", "train_*", "--bounds", "book=0:1"], "no source is called 'book'"),
        (["--sources", "train_*", "--group", "index"], "--group is no option of --law shares"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    options: list[str], message: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["fit", str(pair[0]), "--law", "shares", "--losses", str(pair[1]), "--loss-column", "metric/a"]
    assert cli.main([*base, *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_that_do_not_belong_together(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows, message in (
        ([[98, 2.0], [99, 2.0]], "no index stands in both"),
        ([[0, 2.0], [0, 2.1]], "index '0' stands there twice"),
    ):
        other = write(tmp_path / "other.csv", ["index", "loss"], rows)
        assert cli.main(["fit", str(pair[0]), "--law", "shares", "--losses", str(other), "--sources", "train_*"]) == 2
        assert message in capsys.readouterr().err


def test_tables_of_olmix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sources and metrics without a prefix, a name beside the key, and a run without metrics."""
    points = mixtures(31)
    ratios = [[f"r{place}", "x", *shares] for place, shares in enumerate(points.shares)]
    metrics = [[f"r{place}", "x", loss] for place, loss in enumerate(noisy(points, 0.003)[:30])]
    first = write(tmp_path / "ratios.csv", ["run_id", "name", *SOURCES], ratios)
    second = write(tmp_path / "metrics.csv", ["run_id", "name", "arc_bpb"], metrics)
    base = ["fit", str(first), "--law", "shares", "--losses", str(second), "--sources", "*", "--loss-column", "*_bpb"]
    assert cli.main([*base, "--method", "exponential", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "law.json").read_text())
    assert found["sources"] == list(SOURCES) and found["points"] == 30
    assert "1 rows stand in" in capsys.readouterr().out
