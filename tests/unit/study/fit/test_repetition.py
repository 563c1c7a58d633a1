"""Laws that know repetition, the rectified law, tied and fixed parameters; on fabricated runs and published points."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.cli import main as cli
from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.fit import fit
from megatron_synth.study.fit.laws import LAWS, Floats
from megatron_synth.study.fit.repetition import PUBLISHED, RECTIFIED, REPETITION, effective_tokens
from megatron_synth.study.fit.solvers.nonlinear import NonlinearLaw, with_fixed
from megatron_synth.study.fit.worth import worth_of, worth_table

COLUMNS = {
    "n_params": np.array([1e8, 1e9, 3e9, 3e8, 6e9]),
    "tokens": np.array([1e9, 5e10, 2e11, 2e9, 8e10]),
    "unique_tokens": np.array([1e8, 5e10, 4e11, 3e8, 1e8]),
}
BASE = {name: PUBLISHED[name] for name in ("A", "B", "E", "alpha", "beta")}


def written_out(n: Floats, d: Floats, u: Floats, r_d: float, r_n: float) -> Floats:
    """The law of Muennighoff et al. as their paper writes it, with one exponent."""
    a, b, e, power = PUBLISHED["A"], PUBLISHED["B"], PUBLISHED["E"], PUBLISHED["alpha"]
    u = np.minimum(u, d)
    g = (a / b) ** (1 / (2 * power))
    best = np.minimum(n, u * g * g)
    d_prime = u + u * r_d * (1 - np.exp(-(d / u - 1) / r_d))
    n_prime = best + best * r_n * (1 - np.exp(-(n / best - 1) / r_n))
    return np.asarray(e + a / n_prime**power + b / d_prime**power)


def runs(seed: int = 0, noise: float = 0.0) -> tuple[dict[str, Floats], Floats]:
    """Four sizes, three amounts of text, one to 64 epochs."""
    n, u, epochs = (
        axis.ravel() for axis in np.meshgrid([5e7, 1.5e8, 4e8, 1.2e9], [5e8, 2e9, 8e9], [1.0, 2.0, 4.0, 8.0, 16.0, 64.0])
    )
    columns = {"n_params": n, "tokens": u * epochs, "unique_tokens": u}
    loss = written_out(n, u * epochs, u, 15.0, 5.0)
    return columns, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))


def test_the_law_is_its_formula() -> None:
    found = REPETITION.predict(REPETITION.to_theta(PUBLISHED), COLUMNS)
    expected = written_out(*COLUMNS.values(), PUBLISHED["R_D"], PUBLISHED["R_N"])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    theta = RECTIFIED.to_theta({"B": 300, "D_l": 40, "E": 1.7, "beta": 0.3})
    d = COLUMNS["tokens"]
    np.testing.assert_allclose(RECTIFIED.predict(theta, {"tokens": d}), 1.7 + 300 / (40 + d**0.3), rtol=1e-12)


@pytest.mark.parametrize(
    ("law", "params"),
    [
        (REPETITION, {**PUBLISHED, "beta": 0.4}),
        (RECTIFIED, {"B": 300.0, "D_l": 40.0, "E": 1.7, "beta": 0.3}),
        (with_fixed(REPETITION, {"E": 1.9, "alpha": 0.3}), PUBLISHED),
        (with_fixed(LAWS["joint"], {"E": 1.8}), PUBLISHED),
    ],
)
def test_slopes_are_those_of_finite_differences(law: NonlinearLaw, params: dict[str, float]) -> None:
    theta, step = law.to_theta(params), 1e-6
    slopes = law.gradient(theta, COLUMNS)
    for place, shift in enumerate(step * np.eye(len(theta))):
        numeric = (law.log_predict(theta + shift, COLUMNS) - law.log_predict(theta - shift, COLUMNS)) / (2 * step)
        np.testing.assert_allclose(slopes[:, place], numeric, atol=1e-8)


def test_what_repeated_tokens_are_worth() -> None:
    """Four epochs are nearly as good as new text, and no number of epochs is worth more than 1 + R*_D."""
    worth = effective_tokens(np.array([0.5e9, 1e9, 4e9, 40e9, 1e15]), 1e9, 15.387756) / 1e9
    np.testing.assert_allclose(worth[:2], [0.5, 1.0])
    assert worth[2] == pytest.approx(1 + 15.387756 * (1 - np.exp(-3 / 15.387756)))
    assert 0.9 < worth[2] / 4 < 0.95 and worth[3] / 40 < 0.4 and worth[4] == pytest.approx(16.387756)


def test_repetition_is_found_and_the_plain_law_is_marked() -> None:
    columns, loss = runs(noise=0.002)
    found = fit("repetition", columns, loss, bootstraps=25, starts=4, fixed=BASE)
    assert found.params["R_D"] == pytest.approx(15, rel=0.1) and found.params["E"] == BASE["E"]
    low, high = found.intervals["90"]["R_D"]
    assert low < 15 < high and set(found.standard_errors) == {"R_D", "R_N"}
    assert found.mean_absolute_relative_error < 0.003
    epochs = columns["tokens"] / columns["unique_tokens"]
    plain = fit("joint", columns, loss, bootstraps=0, starts=30, epochs=epochs)
    assert plain.mean_absolute_relative_error > 0.01
    assert "repetition-ignored" in {doubt.code for doubt in plain.warnings}
    assert "repetition-ignored" not in {doubt.code for doubt in found.warnings}
    once = fit("joint", columns, loss, bootstraps=0, starts=30, epochs=np.full(len(loss), 4.0))
    assert "repetition-ignored" not in {doubt.code for doubt in once.warnings}


def test_all_seven_parameters_at_once_predict_more_epochs() -> None:
    columns, loss = runs()
    out = columns["tokens"] / columns["unique_tokens"] > 20
    found = fit("repetition", columns, loss, bootstraps=0, starts=6, holdout=out)
    assert found.holdout is not None and found.holdout.mean_absolute_relative_error < 0.002
    assert found.objective < 1e-6


def test_the_rectified_law_is_told_from_the_plain_one() -> None:
    d = np.repeat(np.geomspace(1e7, 3e11, 12), 3)
    truth = 1.6 + 300 / (150 + d**0.3)
    loss = truth * np.exp(0.002 * np.random.default_rng(0).standard_normal(len(d)))
    rectified, plain = (fit(law, {"tokens": d}, loss, bootstraps=0) for law in ("rectified", "data"))
    assert rectified.objective < 0.5 * plain.objective
    assert "law-rejected" in {doubt.code for doubt in plain.warnings}
    assert "law-rejected" not in {doubt.code for doubt in rectified.warnings}
    np.testing.assert_allclose(rectified.predict({"tokens": d}), truth, rtol=3e-3)
    assert "simpler-law-does" not in {doubt.code for doubt in rectified.warnings}
    without = (1.6 + 2000 / d**0.36) * np.exp(0.002 * np.random.default_rng(1).standard_normal(len(d)))
    assert "simpler-law-does" in {doubt.code for doubt in fit("rectified", {"tokens": d}, without, bootstraps=0).warnings}


def test_one_exponent_for_both_determines_what_two_do_not() -> None:
    """Two sizes and many budgets, as studies of over-training have them."""
    n, d = (axis.ravel() for axis in np.meshgrid([1e8, 4e8], np.geomspace(1e9, 1e11, 6)))
    law = LAWS["tied"]
    truth = {"A": 600.0, "B": 900.0, "E": 1.7, "alpha": 0.33}
    loss = law.predict(law.to_theta(truth), {"n_params": n, "tokens": d})
    loss = loss * np.exp(0.001 * np.random.default_rng(0).standard_normal(len(loss)))
    columns = {"n_params": n, "tokens": d}
    tied, free = (fit(name, columns, loss, bootstraps=60, starts=60) for name in ("tied", "joint"))
    assert tied.params == pytest.approx(truth, rel=0.35)
    assert "flat-optimum" in {doubt.code for doubt in free.warnings}
    assert "flat-optimum" not in {doubt.code for doubt in tied.warnings}
    far = {"n_params": [2e9], "tokens": [4e11]}
    assert tied.predict(far)[0] == pytest.approx(law.predict(law.to_theta(truth), far)[0], rel=0.02)


def test_a_fixed_floor_stays_where_it_is() -> None:
    columns = {"tokens": np.geomspace(1e9, 1e11, 8)}
    loss = 1.8 + 2000 / columns["tokens"] ** 0.36
    found = fit("data", columns, loss, fixed={"E": 1.8}, bootstraps=20)
    assert found.params == pytest.approx({"E": 1.8, "B": 2000, "beta": 0.36}, rel=1e-4)
    assert set(found.intervals["90"]) == {"B", "beta"}
    with pytest.raises(UserError, match="law 'data' has no parameter 'A'; it has B, E, beta"):
        fit("data", columns, loss, fixed={"A": 1.0})
    with pytest.raises(UserError, match="parameter E: expected a number above 0"):
        fit("data", columns, loss, fixed={"E": 0.0})
    with pytest.raises(UserError, match="every parameter is fixed"):
        fit("data", columns, loss, fixed={"E": 1.0, "B": 1.0, "beta": 1.0})


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns, loss = runs(noise=0.002)
    epochs = columns["tokens"] / columns["unique_tokens"]
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        rows = zip(columns["n_params"], columns["tokens"], epochs, loss, strict=True)
        csv.writer(file).writerows([["n_params", "tokens", "epochs", "loss"], *rows])
    fixed = [part for name, value in BASE.items() for part in ("--fix", f"{name}={value!r}")]
    options = ["--bootstraps", "20", "--starts", "4", "--out", str(tmp_path / "out")]
    assert cli.main(["fit", str(path), "--law", "repetition", *fixed, *options]) == 0
    found = json.loads((tmp_path / "out" / "law.json").read_text())
    assert found["params"]["R_D"] == pytest.approx(15, rel=0.1)
    assert found["data"]["columns"]["unique_tokens"] == "tokens / epochs"
    assert (tmp_path / "out" / "fit.png").is_file()
    assert cli.main(["fit", str(path), "--law", "joint", *options]) == 0
    assert "warning: repetition-ignored: runs saw their text 1 to 64 times" in capsys.readouterr().out
    assert cli.main(["fit", str(path), "--law", "tied", *options]) == 0
    assert cli.main(["fit", str(path), "--law", "joint", "--fix", "E", *options]) == 2
    assert "--fix 'E': expected a parameter and a number, such as E=1.8" in capsys.readouterr().err


def test_a_plan_says_what_epochs_are_worth() -> None:
    text = worth_table([("mixed", "qa", 4.0), ("mixed", "qa", 40.0), ("mixed", "web", 0.7), ("all", "qa", 4.0)])
    lines = [line.split() for line in text.splitlines() if line.strip().startswith(("mixed", "all"))]
    assert lines == [
        ["mixed", "qa", "40.00", "15.17", "(to", "32.99)", "38%", "(to", "82%)"],
        ["all", "qa", "4.00", "3.73", "(to", "3.95)", "93%", "(to", "99%)"],
    ]
    assert worth_table([("natural", "web", 1.0)]) == ""
    assert worth_of(0.5) == 0.5
