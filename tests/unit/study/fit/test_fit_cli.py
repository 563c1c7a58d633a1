"""The verb `fit`: columns found, rules read, law.json as promised, and one clear error for everything that is wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.cli import main as cli
from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import LAWS
from megatron_synth.study.fit.table.row_filter import matching, number
from megatron_synth.study.fit.table.runs_table import read_table

CHINCHILLA = Path(__file__).parents[3] / "fixtures" / "chinchilla_figure4.csv"
FAST = ["--bootstraps", "50", "--starts", "60"]


def write(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two arms at eight budgets with two domains, and one run that failed."""
    rows: list[list[object]] = []
    law = LAWS["data"]
    for arm, floor in (("natural", 2.2), ("mixed", 2.1)):
        for tokens in np.geomspace(1e9, 2e11, 8):
            loss = law.predict(law.to_theta({"B": 2000, "beta": 0.36, "E": floor}), {"tokens": tokens})[0]
            rows.append([arm, 1_000_000_000, f"{tokens:.6g}", loss, loss + 0.2, "done"])
    rows.append(["mixed", 1_000_000_000, "4e11", "", "", "failed"])
    return write(tmp_path / "runs.csv", ["arm", "N", "Tokens", "loss/web", "loss/code", "status"], rows)


def test_the_published_table_is_read_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--law", "joint", "--drop-highest-loss", "5", "--bootstraps", "100", "--starts", "200", "--out", str(out)]
    assert cli.main(["fit", str(CHINCHILLA), *options]) == 0
    found = json.loads((out / "law.json").read_text())
    assert found["objective"] == pytest.approx(0.0010182740, abs=1e-9)
    assert (found["law"], found["points"], len(found["dropped"]), found["holdout"]) == ("joint", 240, 5, None)
    assert set(found["params"]) == {"A", "B", "E", "alpha", "beta"} == set(found["intervals"]["90"])
    assert found["data"]["columns"] == {"n_params": "Model Size", "tokens": "Training FLOP / (6 x Model Size)", "loss": "loss"}
    assert len(found["data"]["dropped_lines"]) == 5 and found["data"]["dropped_lines"][0] == 2
    assert {"python", "numpy", "scipy", "megatron-synth"} <= set(found["versions"])
    assert (out / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert "objective 0.0010182740 on 240 points (5 dropped)" in capsys.readouterr().out


def test_one_fit_per_arm_and_domain(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "fits"
    choice = ["--where", "status==done", "--group", "arm", "--loss-column", "loss/*", "--holdout", "tokens>100e9"]
    assert cli.main(["fit", str(runs), "--law", "data", *choice, *FAST, "--out", str(out)]) == 0
    found = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/law.json")}
    assert set(found) == {f"{arm}_loss_{domain}" for arm in ("natural", "mixed") for domain in ("web", "code")}
    assert found["mixed_loss_web"]["params"]["E"] == pytest.approx(2.1, rel=1e-3)
    assert found["natural_loss_code"]["params"]["E"] == pytest.approx(2.4, rel=1e-3)
    held = found["mixed_loss_web"]["holdout"]
    assert held["rule"] == "tokens>100e9" and held["points"] == 1 and held["mean_absolute_relative_error"] < 1e-4


def test_an_aggregate_of_domains(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "fits"
    choice = ["--where", "status==done and arm==mixed", "--loss-column", "loss/*", "--aggregate", "macro"]
    assert cli.main(["fit", str(runs), "--law", "data", *choice, *FAST, "--out", str(out)]) == 0
    found = json.loads((out / "macro" / "law.json").read_text())
    assert found["params"]["E"] == pytest.approx(2.2, rel=1e-3)
    assert found["data"]["columns"]["loss"] == "macro of loss/web, loss/code"


@pytest.mark.parametrize("law", ["model", "mixture"])
def test_every_kind_of_figure_is_drawn(law: str, tmp_path: Path) -> None:
    mesh = np.meshgrid([1e8, 3e8, 1e9, 3e9, 6e9], [0.0, 0.5, 1.0])
    columns = {"n_params": mesh[0].ravel(), "ratio": mesh[1].ravel()}
    loss = 2 + 500 / columns["n_params"] ** 0.35 + (0.1 * (columns["ratio"] - 0.4) ** 2 if law == "mixture" else 0)
    path = write(tmp_path / "r.csv", ["params", "share", "loss"], list(zip(*columns.values(), loss, strict=True)))
    assert cli.main(["fit", str(path), "--law", law, *FAST, "--out", str(tmp_path / "o"), "--holdout", "n_params>5B"]) == 0
    assert (tmp_path / "o" / "fit.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--law", "date"], "unknown law 'date'; did you mean 'data'?"),
        (["--law", "data"], "no column of losses found; name it with --loss-column; columns: arm, N, Tokens"),
        (["--law", "data", "--loss-column", "loss/web"], "line 18: column 'loss/web' holds '', expected a number"),
        (["--law", "data", "--loss-column", "loss/wep"], "--loss-column 'loss/wep' matches no column"),
        (["--law", "data", "--tokens-column", "D"], "--tokens-column 'D' is no column; columns: arm, N"),
        (["--law", "mixture"], "no column for ratio, which the law 'mixture' needs; name it with --ratio-column"),
        (["--law", "joint"], "mixed: law 'joint' needs points of different n_params"),
        (["--law", "data", "--holdout", "tokens>1e15"], "holds out 0 of 8 points"),
        (["--law", "data", "--holdout", "__import__('os')"], "expected comparisons such as tokens>100e9"),
        (["--law", "data", "--where", "state==done"], "there is no column 'state'"),
        (["--law", "data", "--where", "arm==web"], "chooses none of the 17 rows"),
        (["--law", "data", "--group", "kind"], "there is no column 'kind'"),
        (["--law", "data", "--aggregate", "macro"], "needs several loss columns, got loss/web"),
        (["--law", "data", "--drop-highest-loss", "8"], "drop_highest_loss: expected 0 to 7 of the 8 points, got 8"),
        (["--law", "data", "--bootstraps", "1"], "--bootstraps 0 or at least 2"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    options: list[str], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = {"--where": "status==done and arm==mixed", "--loss-column": "loss/web"}
    if message.startswith("no column of losses") or "holds ''" in message:
        sound = {}
    extra = [part for name, value in sound.items() if name not in options for part in (name, value)]
    if "mixed: " in message:
        extra += ["--group", "arm"]
    assert cli.main(["fit", str(runs), *options, *extra, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a,b\n", "has a head and no rows"),
        ("a,a\n1,2\n", "column 'a' stands in the head more than once"),
        ("a,b\n1,2\n1\n", "line 3: 1 cells, expected 2"),
        (None, "cannot be read: No such file"),
    ],
)
def test_broken_tables_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_rules() -> None:
    columns = {"tokens": np.array([1e9, 1e11, 2e11]), "arm": ["web", "mixed", "web"], "Model Size": np.array([1.0, 2.0, 3.0])}
    for rule, expected in (
        ("tokens>100e9", [0, 0, 1]),
        ("tokens >= 100B", [0, 1, 1]),
        ("tokens<2e11 and arm==web", [1, 0, 0]),
        ("arm!='web' or tokens<=1B", [1, 1, 0]),
        ("Model Size > 1.5 and Model Size < 2.5", [0, 1, 0]),
        ("tokens==1e11", [0, 1, 0]),
    ):
        assert matching(rule, columns, 3).tolist() == [bool(value) for value in expected], rule
    for rule in ("tokens", "tokens>", ">1", "tokens>big", "arm>web", "tokens>1>2", "1e9<tokens", "tokens>1 & arm==web"):
        with pytest.raises(UserError, match="rule '"):
            matching(rule, columns, 3)
    assert [number(text) for text in ("1e9", "100B", "1/3", "-2.5", "7M", "", "x", "1/0", "nan")] == pytest.approx(
        [1e9, 1e11, 1 / 3, -2.5, 7e6, None, None, None, None]
    )
