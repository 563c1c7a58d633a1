"""The search for mixtures: spaces with caps, designs, optima of known truths, and arms proposed into a study file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_synth.cli import main as cli
from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.fit import fit_shares
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.plan.runs import expand
from megatron_synth.study.plan.study_file import load_study
from megatron_synth.study.report.collect import Row, runs_csv
from megatron_synth.study.search.optimum import minimize, objective_of
from megatron_synth.study.search.proposal import rounded
from megatron_synth.study.search.sequential import d_optimal, expected_improvement
from megatron_synth.study.search.space import Space, make_space, space_filling
from tests.unit.study.test_study_file import TINY

SOURCES = ("web", "qa", "code")
NOISE = 0.003


def space(**caps: float) -> Space:
    return make_space(SOURCES, caps={name: (cap, "its text ends") for name, cap in caps.items()})


def bowl(best: Floats) -> Any:
    return lambda shares: 2 + ((shares - best) ** 2).sum(axis=1)


def test_mixtures_are_drawn_inside_and_reach_the_faces() -> None:
    capped = make_space(SOURCES, bounds={"web": (0.2, 1.0)}, caps={"qa": (0.3, "small")})
    drawn = capped.draw(2000, seed=0)
    assert capped.contains(drawn).all()
    np.testing.assert_allclose(drawn.sum(axis=1), 1, atol=1e-9)
    assert drawn[:, 0].max() > 0.95 and drawn[:, 1].max() > 0.28 and (drawn[:, 1] == 0).mean() > 0.1
    np.testing.assert_array_equal(drawn, capped.draw(2000, seed=0))
    whole = space().draw(4000, seed=1)[2000:]  # the uniform half: the mean share of three sources is a third
    np.testing.assert_allclose(whole.mean(axis=0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(np.mean(whole[:, 0] < 0.5), 0.75, atol=0.03)


def test_spaces_that_hold_no_mixture_are_refused() -> None:
    with pytest.raises(UserError, match=r"the highest shares sum to 0\.6.*web its text ends"):
        space(web=0.2, qa=0.2, code=0.2)
    with pytest.raises(UserError, match=r"the lowest shares sum to 1\.2"):
        make_space(SOURCES, bounds={"web": (0.6, 1), "qa": (0.6, 1)})
    with pytest.raises(UserError, match=r"qa: at least 0\.5 is asked for, and its text allows 0\.3"):
        make_space(SOURCES, bounds={"qa": (0.5, 1)}, caps={"qa": (0.3, "small")})
    with pytest.raises(UserError, match="no source is called 'books'"):
        make_space(SOURCES, bounds={"books": (0, 1)})


def test_first_designs_spread_and_respect_caps() -> None:
    capped = space(qa=0.4)
    design = space_filling(capped, 12, seed=0)
    assert capped.contains(design).all()
    apart = np.sqrt(((np.sqrt(design[:, None]) - np.sqrt(design)) ** 2).sum(axis=2)) + 9 * np.eye(12)
    random = capped.draw(12, seed=0)
    loose = np.sqrt(((np.sqrt(random[:, None]) - np.sqrt(random)) ** 2).sum(axis=2)) + 9 * np.eye(12)
    assert apart.min() > 2 * loose.min() and apart.min() > 0.15
    after = space_filling(capped, 3, taken=design, seed=0)
    assert np.sqrt(((np.sqrt(after[:, None]) - np.sqrt(design)) ** 2).sum(axis=2)).min() > 0.1


@pytest.mark.parametrize("smooth", [True, False])
def test_the_lowest_mixture_is_found_and_its_neighbors(smooth: bool) -> None:
    best = np.array([0.5, 0.3, 0.2])
    found = minimize(space(), bowl(best), noise=0.005, smooth=smooth)
    np.testing.assert_allclose(found.shares, best, atol=2e-3)
    assert found.loss == pytest.approx(2, abs=1e-5) and found.at_bound == {}
    # 2 x 0.005 = the squared distance, so that each share moves by up to sqrt(2 / 3 x 0.01) = 0.082
    for (low, high), share in zip(found.near.values(), best, strict=True):
        assert low == pytest.approx(share - 0.082, abs=0.02) and high == pytest.approx(share + 0.082, abs=0.02)
    capped = minimize(space(web=0.4), bowl(best), noise=0.0, smooth=smooth)
    np.testing.assert_allclose(capped.shares, [0.4, 0.35, 0.25], atol=2e-3)
    assert capped.at_bound == {"web": "its text ends"}


def truth(shares: Floats) -> Floats:
    """Two domains, one that qa helps and one that code helps; the best mean is inside."""
    first = 1.8 + 1 / (0.5 + shares**0.5 @ np.array([0.6, 2.0, 0.3]))
    second = 1.9 + 1 / (0.4 + shares**0.6 @ np.array([0.5, 0.2, 1.8]))
    return np.asarray((first + second) / 2)


def test_targets_of_several_domains() -> None:
    shares = space().draw(40, seed=0)
    points = Mixtures(SOURCES, shares)
    fits = {
        name: fit_shares(points, 2 + (shares @ slopes), law="exponential")
        for name, slopes in (("a", np.array([0.0, 0.5, 1.0])), ("b", np.array([1.0, 0.5, 0.0])))
    }
    mean, worst, weighted = (
        minimize(space(), objective_of(fits, how, weights={"a": 3, "b": 1}), noise=0.0) for how in ("mean", "worst", "weighted")
    )
    assert mean.loss == pytest.approx(2.5, abs=0.04) and worst.loss == pytest.approx(2.5, abs=0.04)
    assert weighted.shares[0] > 0.98  # 3 parts of domain a: web alone
    with pytest.raises(UserError, match="weights of a, b are needed"):
        objective_of(fits, "weighted", weights={"c": 1})


def test_half_the_runs_of_a_grid_find_a_mixture_as_good_as_the_best() -> None:
    """14 runs in three rounds; a grid of steps of a sixth has 28. True losses, within one noise floor of the lowest."""
    whole = space()
    lowest = minimize(whole, truth, noise=0.0).loss
    good = 0
    for seed in range(4):
        random = np.random.default_rng(seed)
        shares = space_filling(whole, 7, seed=seed)
        loss = truth(shares) * np.exp(NOISE * random.standard_normal(7))
        for count in (4, 3):
            new = expected_improvement(whole, Mixtures(SOURCES, shares), loss, count, seed=seed)
            assert whole.contains(new).all()
            shares = np.vstack([shares, new])
            loss = np.append(loss, truth(new) * np.exp(NOISE * random.standard_normal(count)))
        fit = fit_shares(Mixtures(SOURCES, shares), loss, law="gaussian-process")
        found = minimize(whole, objective_of({"mean": fit}), noise=NOISE)
        good += bool(truth(found.shares[None])[0] < lowest * (1 + NOISE))
    assert good >= 3


def test_d_optimal_runs_determine_more_than_random_ones() -> None:
    def information(shares: Floats) -> float:
        first, second = np.triu_indices(3, 1)
        features = np.hstack([shares, shares[:, first] * shares[:, second]])
        return float(np.linalg.slogdet(features.T @ features)[1])

    taken = space_filling(space(), 2, seed=0)
    chosen = d_optimal(space(), 8, taken=taken, seed=0)
    random = max(information(np.vstack([taken, space().draw(8, seed=seed)])) for seed in range(20))
    assert information(np.vstack([taken, chosen])) > random


def test_shares_become_exact_inside_their_bounds() -> None:
    capped = space(qa=0.3337)
    exact = rounded(capped, np.array([1 / 3, 1 / 3, 1 / 3]))
    assert sum(exact) == 1 and exact[1] <= Fraction(333, 1000)
    assert rounded(space(), np.array([0.0004, 0.9996, 0.0])) == (0, 1, 0)


def written(folder: Path, **changes: Any) -> Path:
    """A study of three sources that are not prepared."""
    names = {"web": 100_000, "qa": 400, "code": 100_000}
    content = {
        "name": "three",
        "output": str(folder / "runs"),
        "sources": {name: {"path": str(folder / name), "tokens": size} for name, size in names.items()},
        "arms": {"natural": {"web": 1}, "mixed": {"web": "1/2", "qa": "1/4", "code": "1/4"}},
        "sizes": {"s": {"model": TINY}},
        "grid": [{"tokens": [1024]}],
        "validation": {"a": {"path": str(folder / "web")}, "b": {"path": str(folder / "web")}},
        "rates": {"lr": 1e-2},
        "protocol": {
            "model": {"vocab_size": 64},
            "train": {"sequence_length": 32, "global_batch_size": 4},
            "precision": {"dtype": "fp32"},
        },
        **changes,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def simulated(file: Path, seed: int = 0) -> str:
    """runs.csv of all runs of a study."""
    study, random, rows = load_study(file), np.random.default_rng(seed), []
    for run in expand(study):
        shares = np.array([[float(study.arms[run.arm][name].ratio) if name in study.arms[run.arm] else 0 for name in SOURCES]])
        loss = float(truth(shares)[0] * np.exp(NOISE * random.standard_normal()))
        share = study.share(run.arm)
        identity: dict[str, Any] = {"run": run.name, "id": run.id, "arm": run.arm, "size": run.size, "seed": run.seed}
        mixture: dict[str, Any] = {"family": study.family(run.arm), "share": str(share), "ratio": float(share)}
        numbers: dict[str, Any] = {"n_params": run.parameters, "budget": run.budget, "tokens": run.tokens, "flops": 1e9}
        rest: dict[str, Any] = {"steps": 8, "loss": loss, "train_loss": loss, "train_seconds": 1.0, "device": "none"}
        rows.append(Row(**identity, **mixture, **numbers, **rest, domains={"a": loss, "b": loss + 1}))
    return runs_csv(rows)


def test_arms_are_proposed_run_and_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    assert cli.main(["study", "propose", str(file), "--count", "8"]) == 0
    said = capsys.readouterr().out
    assert "proposed (space-filling)" in said and "has 400 tokens, 1 epochs of which are 37.5% of 1.02k" in said
    first = tmp_path / "study-proposed.yaml"
    study = load_study(first)
    assert list(study.arms) == ["natural", "mixed", *(f"mix-{number:03d}" for number in range(1, 9))]
    assert all(float(arm["qa"].ratio) <= 0.375 for arm in study.arms.values() if "qa" in arm)
    assert cli.main(["study", "propose", str(file), "--count", "8"]) == 2
    assert "is there already; give another name with --out" in capsys.readouterr().err

    table = tmp_path / "runs.csv"
    table.write_text(simulated(first))
    second = tmp_path / "second.yaml"
    options = ["--from", str(table), "--count", "4", "--out", str(second)]
    assert cli.main(["study", "propose", str(first), *options]) == 0
    said = capsys.readouterr().out
    assert "proposed (expected-improvement)" in said and "lowest predicted:" in said and "not told from it" in said
    assert len(load_study(second).arms) == 14
    options[-1] = str(tmp_path / "third.yaml")
    assert cli.main(["study", "propose", str(first), *options, "--design", "d-optimal", "--target", "b"]) == 0
    assert "lowest measured: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bounds", "qa=0.5:1"], "qa: at least 0.5 is asked for, and its text allows 0.375"),
        (["--bounds", "qa"], "--bounds 'qa': expected SOURCE=LOW:HIGH"),
        (["--design", "grid"], "unknown design 'grid'; one of: space-filling"),
        (["--design", "expected-improvement"], "needs 5 measured mixtures at one size and budget, got 0"),
        (["--tokens", "many"], "--tokens 'many': expected a number of tokens"),
        (["name=x"], "overrides would be lost"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", "propose", str(written(tmp_path)), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study-proposed.yaml").exists()
