"""Laws of several arms as one fit, and N*(C), on fabricated runs whose truth is known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.cli.fit import main
from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.arms.pooled import Pooled, fit_arms
from megatron_synth.study.fit.compute.isoflop import isoflop, joint_exponent
from megatron_synth.study.fit.fit import fit
from megatron_synth.study.fit.laws import LAWS, Floats

DATA = {"B": 2085.0, "beta": 0.366, "E": 2.2}
TOKENS = np.geomspace(1e9, 1e11, 7)


def arms(floors: list[float], exponents: list[float], noise: float, seed: int = 0, **how: tuple[str, ...]) -> Pooled:
    random, law = np.random.default_rng(seed), LAWS["data"]
    loss: dict[str, Floats] = {}
    for number, (floor, exponent) in enumerate(zip(floors, exponents, strict=True)):
        theta = law.to_theta({"B": DATA["B"] * 1e9 ** (exponent - DATA["beta"]), "beta": exponent, "E": floor})
        loss[f"arm-{number}"] = law.predict(theta, {"tokens": TOKENS}) * np.exp(noise * random.standard_normal(len(TOKENS)))
    return fit_arms("data", {arm: {"tokens": TOKENS} for arm in loss}, loss, **how)


def test_without_noise_every_arm_keeps_its_own() -> None:
    found = arms([2.1, 2.2, 2.3], [0.3, 0.36, 0.42], 1e-9, pooled=("E", "beta"))
    for arm, floor, exponent in zip(found.arms.values(), [2.1, 2.2, 2.3], [0.3, 0.36, 0.42], strict=True):
        assert arm["E"].value == pytest.approx(floor, rel=1e-4) and arm["beta"].value == pytest.approx(exponent, rel=1e-3)
    assert found.tests["E"].differ and found.tests["beta"].differ
    assert 0.02 < found.tau["E"] < 0.1


def test_pooling_draws_equal_arms_together_and_narrows_them() -> None:
    alone, pooled, shared = (
        arms([2.2] * 4, [0.366] * 4, 0.005, 3, **how) for how in ({}, {"pooled": ("E", "beta")}, {"shared": ("E", "beta")})
    )

    def spread(found: Pooled, name: str) -> float:
        return float(np.std([arm[name].value for arm in found.arms.values()]))

    def width(found: Pooled) -> float:
        return float(np.mean([arm["E"].interval[1] - arm["E"].interval[0] for arm in found.arms.values()]))

    assert spread(pooled, "E") < 0.6 * spread(alone, "E")
    assert width(shared) < width(pooled) < 0.8 * width(alone)
    assert spread(shared, "E") == 0
    assert all(
        one["E"].own == pytest.approx(other["E"].value, rel=1e-6)
        for one, other in zip(pooled.arms.values(), alone.arms.values(), strict=True)
    )
    assert not shared.tests["beta"].differ and shared.tests["beta"].freedom == (3, 16)


def test_the_test_of_sharing_has_its_size() -> None:
    rejected = [arms([2.2] * 3, [0.366] * 3, 0.003, seed, shared=("beta",)).tests["beta"].differ for seed in range(40)]
    assert np.mean(rejected) <= 0.15  # 5 % nominal; 40 draws
    found = [arms([2.2] * 3, [0.366, 0.366, 0.40], 0.001, seed, shared=("beta",)).tests["beta"].differ for seed in range(6)]
    assert np.mean(found) > 0.6


def test_what_cannot_be_pooled_is_refused() -> None:
    columns, loss = {"a": {"tokens": TOKENS}, "b": {"tokens": TOKENS}}, {"a": TOKENS**-0.1, "b": TOKENS**-0.1}
    with pytest.raises(UserError, match="no parameter 'alpha'"):
        fit_arms("data", columns, loss, shared=("alpha",))
    with pytest.raises(UserError, match="share it or pool it"):
        fit_arms("data", columns, loss, shared=("E",), pooled=("E",))
    with pytest.raises(UserError, match="at least two"):
        fit_arms("data", {"a": columns["a"]}, loss)
    with pytest.raises(UserError, match="cannot be fitted to several arms"):
        fit_arms("mixture", columns, loss)


JOINT = {"A": 482.0, "alpha": 0.348, "B": 2085.0, "beta": 0.366, "E": 1.82}
SLOPE = JOINT["beta"] / (JOINT["alpha"] + JOINT["beta"])


def grid(noise: float, seed: int) -> tuple[Floats, Floats, Floats]:
    """Seven sizes at each of six computes, around the best one."""
    law, random = LAWS["joint"], np.random.default_rng(seed)
    g = (JOINT["alpha"] * JOINT["A"] / (JOINT["beta"] * JOINT["B"])) ** (1 / (JOINT["alpha"] + JOINT["beta"]))
    n, d = [], []
    for flops in np.geomspace(1e18, 1e21, 6):
        sizes = g * (flops / 6) ** SLOPE * np.geomspace(0.3, 3, 7)
        n.append(sizes)
        d.append(flops / 6 / sizes)
    sizes, tokens = np.concatenate(n), np.concatenate(d)
    loss = law.predict(law.to_theta(JOINT), {"n_params": sizes, "tokens": tokens})
    return sizes, tokens, loss * np.exp(noise * random.standard_normal(len(loss)))


def test_parabolas_find_the_exponent() -> None:
    found = isoflop(*grid(0, 0), draws=50)
    assert len(found.curves) == 6 and all(curve.used for curve in found.curves) and not found.warnings
    assert found.exponent.n_params == pytest.approx(SLOPE, abs=0.003)
    assert found.exponent.n_params + found.exponent.tokens == pytest.approx(1)
    size, tokens = found.exponent.best(1e20)
    assert 6 * size * tokens == pytest.approx(1e20)
    hits = 0
    for seed in range(60):
        low, high = isoflop(*grid(0.003, seed), draws=200, seed=seed).exponent.n_interval["90"]
        hits += low <= SLOPE <= high
    assert hits >= 50


def test_the_joint_law_has_the_same_exponent() -> None:
    n, d, loss = grid(0.002, 1)
    found = joint_exponent(fit("joint", {"n_params": n, "tokens": d}, loss, bootstraps=100, starts=100, finish=24))
    low, high = found.n_interval["90"]
    assert low <= SLOPE <= high and found.n_params == pytest.approx(SLOPE, abs=0.05)
    by_parabolas = isoflop(n, d, loss, draws=100).exponent
    assert found.best(1e20)[0] == pytest.approx(by_parabolas.best(1e20)[0], rel=0.15)


def test_isoflop_says_what_it_lacks() -> None:
    n, d, loss = grid(0, 0)
    with pytest.raises(UserError, match="2 computes have runs of 4 sizes"):
        isoflop(n[:14], d[:14], loss[:14])
    outside = np.concatenate([np.arange(7 * curve, 7 * curve + 7) for curve in range(5)] + [np.arange(35, 39)])
    found = isoflop(n[outside][: 35 + 4], d[outside], loss[outside], draws=50)
    assert {one.code for one in found.warnings} <= {"best-at-edge"}


def write_csv(path: Path, columns: dict[str, Floats]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def test_isoflop_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    n, d, loss = grid(0.001, 2)
    table = write_csv(tmp_path / "runs.csv", {"params": n, "training_tokens": d, "loss": loss})
    arguments = [str(table), "--law", "isoflop", "--bootstraps", "40", "--starts", "60", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "out" / "law.json").read_text())
    for method in ("parabolas", "joint"):
        assert content[method]["N"]["exponent"] == pytest.approx(SLOPE, abs=0.06)
        assert content[method]["N"]["exponent"] + content[method]["D"]["exponent"] == pytest.approx(1)
    assert len(content["curves"]) == 6 and "N* grows as C^" in capsys.readouterr().out
    with pytest.raises(UserError, match="--holdout is no option of --law isoflop"):
        main([*arguments, "--holdout", "tokens>1e9"])


def test_arms_of_a_table_are_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, law = np.random.default_rng(0), LAWS["data"]
    loss = [law.predict(law.to_theta({**DATA, "E": floor}), {"tokens": TOKENS}) for floor in (2.2, 2.2)]
    noisy = np.concatenate(loss) * np.exp(0.002 * random.standard_normal(14))
    columns = {"arm": np.repeat(["web", "qa"], 7), "tokens": np.tile(TOKENS, 2), "loss": noisy}
    table = write_csv(tmp_path / "runs.csv", columns)
    plain = [str(table), "--law", "data", "--bootstraps", "0", "--out", str(tmp_path / "out")]
    assert main([*plain, "--group", "arm", "--share", "beta", "--pool", "E"]) == 0
    content = json.loads((tmp_path / "out" / "pooled.json").read_text())
    assert content["arms"]["web"]["beta"]["value"] == content["arms"]["qa"]["beta"]["value"]
    assert set(content["tests_of_sharing"]) == {"E", "beta"} and content["prior"]["tau"] == "half-normal, scale 0.1"
    assert "do groups share E? nothing says that they do not" in capsys.readouterr().out
    with pytest.raises(UserError, match="need --group"):
        main([*plain, "--share", "beta"])
