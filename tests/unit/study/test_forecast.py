"""Forecasts: what they say, that they cannot be changed unseen, and their scores."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.cli.study import main
from megatron_synth.config.errors import UserError
from megatron_synth.core.records import parse_json
from megatron_synth.study.execute.folder import NO_FORECAST, Folder
from megatron_synth.study.forecast.ledger import digest_of, read_ledger, write_down
from megatron_synth.study.forecast.predict import Target, choose_law, predict, smaller
from megatron_synth.study.forecast.score import Finished, lost, score, score_text
from megatron_synth.study.plan.runs import expand
from megatron_synth.study.plan.study_file import load_study
from megatron_synth.study.report.collect import runs_csv
from megatron_synth.study.report.report import write_report
from tests.unit.study.report.test_study_report import simulated
from tests.unit.study.test_study_file import TINY, write_study

NOISE = 0.003
AGGREGATE = "macro of web"


@dataclass(frozen=True)
class Made:
    """A run of a world with a known law."""

    id: str
    arm: str
    n_params: int
    tokens: int
    loss: float
    epochs: float = 1.0


def truth(n_params: float, tokens: float) -> float:
    return float(1.8 + 480 / n_params**0.348 + 2085 / tokens**0.366)


def made(sizes: list[float], budgets: list[float], seeds: int, seed: int = 0) -> list[Made]:
    random = np.random.default_rng(seed)
    cells = [(n, d, s) for n in sizes for d in budgets for s in range(seeds)]
    return [
        Made(f"{n:g}-{d:g}-{s}", "natural", int(n), int(d), float(truth(n, d) * np.exp(NOISE * random.standard_normal())))
        for n, d, s in cells
    ]


BUDGETS = [1e9, 2e9, 5e9, 1e10, 2e10]
TARGET = Target("natural", "1b", int(1e9), int(1e11), 2)


def test_a_prediction_holds_what_comes() -> None:
    """With known laws the interval holds the mean of two runs at 5 times the largest budget about nine times of ten."""
    hits, widths = 0, []
    for draw in range(10):
        rows = made([1e9], BUDGETS, 2, draw)
        found = predict([*rows, *made([1e9], [1e11], 1)], TARGET, bootstraps=80)
        assert len(found.ids) == len(rows) and found.law.law.name == "data"
        outcome = float(np.exp(np.mean(np.log([row.loss for row in made([1e9], [1e11], 2, 100 + draw)]))))
        hits += found.interval[0] <= outcome <= found.interval[1]
        widths.append((found.interval[1] - found.interval[0], found.law_interval[1] - found.law_interval[0]))
        assert abs(found.loss / truth(1e9, 1e11) - 1) < 0.02
    assert hits >= 7
    whole, law = np.mean(widths, axis=0)
    assert whole > law, "the scatter of the runs is part of it"
    assert found.beyond == {"tokens": pytest.approx(5.0)} and found.noise_from == "seeds of these runs"


def test_the_law_is_the_one_that_the_runs_allow() -> None:
    def law(sizes: list[float], budgets: list[float], wanted: str | None = None) -> str:
        return choose_law(smaller(made(sizes, budgets, 1), TARGET), TARGET, wanted)[0]

    assert law([1e9], BUDGETS) == "data"
    assert law([1e8, 4e8, 1e9], BUDGETS[:3]) == "joint"
    assert law([1e9], BUDGETS[:3]) == "data"
    assert law([1e8, 2e8, 4e8], [1e11]) == "model"
    assert law([1e8, 4e8], BUDGETS) == "tied"
    assert law([1e8, 4e8, 1e9], BUDGETS, "joint") == "joint"
    with pytest.raises(UserError, match="too few smaller runs for any law: 2 budgets at"):
        law([1e9], BUDGETS[:2])
    with pytest.raises(UserError, match="for the law 'model'"):
        law([1e9], BUDGETS, "model")
    larger = [Made("x", "natural", int(2e9), int(1e9), 2.0), Made("y", "natural", int(1e9), int(2e11), 2.0)]
    assert smaller(larger, TARGET) == [], "what is larger in size or budget is not looked at"


@pytest.fixture
def ledger(tmp_path: Path) -> tuple[Path, list[Made]]:
    """Two forecasts of one run each."""
    rows = made([1e9], BUDGETS, 2)
    file = tmp_path / "study" / "forecasts.jsonl"
    for tokens in (5e10, 1e11):
        one = predict(rows, replace(TARGET, tokens=int(tokens)), bootstraps=40)
        write_down(file, [one], rows, aggregate=AGGREGATE, hindsight=[False])
    return file, rows


def test_a_forecast_that_was_changed_is_seen(ledger: tuple[Path, list[Made]]) -> None:
    file, rows = ledger
    whole = file.read_text().splitlines()
    first, second = (parse_json(line) for line in whole)
    assert not read_ledger(file).changed and first["previous"] == NO_FORECAST and second["previous"] == first["digest"]
    outcome = [*rows, *made([1e9], [5e10, 1e11], 2, 7)]
    assert all(one.error is not None for one in score(read_ledger(file), outcome, AGGREGATE))

    better = {**first, "loss": outcome[-3].loss}
    file.write_text("\n".join([json.dumps(better), whole[1]]) + "\n")
    scores = score(read_ledger(file), outcome, AGGREGATE)
    assert "changed after it was written" in scores[0].changed and scores[0].error is None and not scores[1].changed
    assert "CHANGED" in score_text(scores) and "1 were changed after they were written" in score_text(scores)

    better["digest"] = digest_of(better)  # with a digest of its own the line after it does not follow it
    file.write_text("\n".join([json.dumps(better), whole[1]]) + "\n")
    assert list(read_ledger(file).changed) == [1]
    with pytest.raises(UserError, match="line 2: it does not follow"):
        write_down(file, [], rows, aggregate=AGGREGATE, hindsight=[])

    file.write_text(whole[1] + "\n")  # taken out
    assert list(read_ledger(file).changed) == [0]

    # the last line cut off: no digest tells, but a run that ended since noted it
    file.write_text(whole[0] + "\n")
    assert not read_ledger(file).changed
    noted = {outcome[-1].id: Finished("2099-01-01T00:00:00+00:00", second["digest"])}
    assert "noted a forecast that the file no longer has" in lost(read_ledger(file), noted)
    assert lost(read_ledger(file), {}) == ""

    for damage in ("{", "[]", json.dumps({**first, "low": "x"})):
        file.write_text(damage + "\n")
        with pytest.raises(UserError, match=r"forecasts\.jsonl, line 1: damaged"):
            read_ledger(file)


def test_a_forecast_counts_only_if_it_came_first(ledger: tuple[Path, list[Made]]) -> None:
    file, rows = ledger
    found = read_ledger(file)
    run = made([1e9], [5e10], 1, 7)
    outcome = [*rows, *run]
    head = found.forecasts[0]["digest"]

    def first(at: str, noted: str | None) -> tuple[bool, str]:
        one = score(found, outcome, AGGREGATE, {run[0].id: Finished(at, noted)})[0]
        return one.before, "; ".join(one.remarks)

    assert first("2099-01-01T00:00:00+00:00", head) == (True, "1 of 2 runs are finished")
    assert first("2099-01-01T00:00:00+00:00", None)[0], "results of earlier versions note nothing"
    before, remarks = first("2001-01-01T00:00:00+00:00", head)
    assert not before and "its date is after the end of run" in remarks
    before, remarks = first("2099-01-01T00:00:00+00:00", NO_FORECAST)
    assert not before and "was not in the file when run" in remarks
    changed = [replace(rows[0], loss=rows[0].loss * 1.01), *rows[1:], *run]
    assert "other losses now" in "; ".join(score(found, changed, AGGREGATE)[0].remarks)
    other = score(found, outcome, "micro of web")[0]
    assert other.error is None and "about another loss" in other.remarks[0]


def test_forecast_then_score_then_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the small budgets of a study to its largest: written down, refused once it is there, scored, and on the page."""
    grid = [{"tokens": [512, 1024, 2048, 4096, 16384]}]
    file = write_study(tmp_path, sizes={"s": {"model": TINY}}, grid=grid, report={"bootstraps": 30})
    study = load_study(file)
    runs, folder = expand(study), Folder(study.folder)
    rows = simulated(study, runs)
    small, whole = tmp_path / "small.csv", tmp_path / "whole.csv"
    small.write_text(runs_csv([row for row in rows if row.tokens < 16384]))
    whole.write_text(runs_csv(rows))
    assert folder.last_forecast() == NO_FORECAST
    assert main(["forecast", str(file), "--from", str(small)]) == 0
    assert "3 forecasts" in capsys.readouterr().out
    assert folder.last_forecast() == read_ledger(folder.forecasts).head != NO_FORECAST
    with pytest.raises(UserError, match="is finished, so a forecast would come too late"):
        main(["forecast", str(file), "--from", str(whole), "--size", "s", "--tokens", "16384"])
    with pytest.raises(UserError, match="every cell of the study has finished runs"):
        main(["forecast", str(file), "--from", str(whole)])
    assert (
        main(["forecast", str(file), "--from", str(whole), "--size", "s", "--tokens", "16384", "--arm", "mixed", "--hindsight"])
        == 0
    )
    assert main(["forecast", str(file), "--from", str(small), "--score"]) == 0
    assert "4 wait for their runs" in capsys.readouterr().out
    assert main(["forecast", str(file), "--from", str(whole), "--score"]) == 0
    told = capsys.readouterr().out
    assert "Of 3 forecasts made before their runs" in told and "of 1 forecasts made in hindsight" in told
    lines = folder.forecasts.read_text().splitlines()
    one = parse_json(lines[1])
    folder.forecasts.write_text("\n".join([lines[0], json.dumps({**one, "high": 99.0}), *lines[2:]]) + "\n")
    assert main(["forecast", str(file), "--from", str(whole), "--score"]) == 1
    page = write_report(study, runs, folder, out=tmp_path / "out", table=whole).read_text()
    section = page.split('<h3 id="forecasts">')[1].split("</table>")[0]
    assert section.count("before its runs") == 2 and section.count("made when a run of it had begun") == 1
    assert section.count("changed: its content is not what its digest says") == 1
    assert 'id="figure-forecasts"' in page and "Forecasts: Of 2 forecasts made before" in page
    for wrong, words in (
        (["--arm", "other"], "no arm of the study"),
        (["--size", "xl", "--tokens", "1B"], "no size of the study"),
        (["--tokens", "1B"], "name a cell together"),
        (["--n-params", "1B"], "needs --tokens"),
        (["--size", "s", "--tokens", "-1"], "expected a number"),
    ):
        with pytest.raises(UserError, match=words):
            main(["forecast", str(file), "--from", str(small), *wrong])
