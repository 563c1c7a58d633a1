"""What a report says of laws with doubts, of one seed and of collapse, on fabricated studies whose truth is known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.fit.noise import MeasuredBest
from megatron_synth.study.plan.runs import Run, expand
from megatron_synth.study.plan.study_file import Study, load_study
from megatron_synth.study.report.analysis import Analysis, analyze, refusal
from megatron_synth.study.report.answers import BestRatio, SpeedUp
from megatron_synth.study.report.collect import Row, runs_csv
from megatron_synth.study.report.findings import findings
from megatron_synth.study.report.ratio import bracket
from megatron_synth.study.report.report import write_report
from tests.unit.study.report.test_study_report import simulated
from tests.unit.study.test_study_file import TINY, write_study

BUDGETS = [512 * 2**power for power in range(7)]


def one_seed(folder: Path, seeds: tuple[int, ...] = (1,)) -> tuple[Study, list[Run], list[Row]]:
    """Three shares of one kind; the floor of the highest is 5 % above the baseline's, and that of the others the same."""
    sizes = {f"s{layers}": {"model": {**TINY, "num_layers": layers}} for layers in (1, 2)}
    arms = {"natural": {"web": 1}, "half": {"web": "1/2", "qa": "1/2"}, "all": {"qa": 1}}
    study = load_study(
        write_study(folder, sizes=sizes, arms=arms, grid=[{"tokens": BUDGETS}], seeds=list(seeds)), ["report.bootstraps=40"]
    )
    runs = expand(study)
    random = np.random.default_rng(5)
    rows = []
    for row in simulated(study, runs):
        loss = 2.0 * (1.05 if row.arm == "all" else 1.0) + 40 / row.tokens**0.5 * (0.9 if row.arm == "half" else 1.0)
        rows.append(replace(row, loss=float(loss * np.exp(0.001 * random.standard_normal()))))
    return study, runs, rows


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Analysis, list[str], str]:
    folder = tmp_path_factory.mktemp("single")
    study, runs, rows = one_seed(folder)
    (folder / "runs.csv").write_text(runs_csv(rows))
    page = write_report(study, runs, Folder(folder / "x"), table=folder / "runs.csv")
    found = (page.parent / "findings.txt").read_text().splitlines()
    return analyze(study, rows, lambda _: None), found, page.read_text()


def test_one_seed_answers_what_it_can(single: tuple[Analysis, list[str], str]) -> None:
    analysis, found, page = single
    assert analysis.noise is None
    assert "no difference between single runs can be called real" in found[0] and "as far as these hold" in found[0]
    assert {(one.arm, one.contrast.noise): one.collapses for one in analysis.behind if one.size == "s1"} == {
        ("half", "residuals"): False,
        ("all", "residuals"): True,
    }
    assert any(line.startswith("all falls behind the baseline at s1") for line in found)
    # the lowest run is known without seeds, and is named in every row
    assert all(best.lowest[0] in (0.0, 0.5) for best in analysis.best)
    table = page.split("Best ratio by size and budget")[1].split("</table>")[0]
    assert re.findall(r"<td>(1/2|0)</td><td>\d\.\d{4}</td>", table) and "<td>n/a</td><td>n/a</td>" not in table
    # nothing is called distinct without its condition
    assert "distinct, as far as the laws hold" in page and "<td>distinct</td>" not in page


def test_every_number_of_a_doubted_law_is_marked(single: tuple[Analysis, list[str], str]) -> None:
    analysis, found, page = single
    doubted = [number for number, fitted in enumerate(analysis.fits) if fitted.doubts]
    assert doubted
    for number in doubted:
        assert f'id="law-{number}"' in page
    equal = page.split("<h3>At equal cost</h3>")[1].split("</table>")[0]
    for arm in ("half", "all"):
        fitted = analysis.data[arm, "s1"]
        if fitted.doubts:
            assert f'href="#law-{analysis.fits.index(fitted)}"' in equal
            assert any(arm in line and "doubts: " in line for line in found if line.startswith("Against the baseline at s1"))
    assert set(re.findall(r'href="#(law-\d+)"', page)) <= set(re.findall(r'id="(law-\d+)"', page))


def test_figures_are_told_and_tables_have_scope(single: tuple[Analysis, list[str], str]) -> None:
    _, _, page = single
    told = re.findall(r'role="img" aria-label="([^"]+)"', page)
    assert len(told) == page.count("<figure") and all(len(text) > 40 and re.search(r"\d", text) for text in told)
    assert page.count("<th>") == 0 and page.count('scope="col"') > 20 and page.count('scope="row"') > 20


def test_a_holdout_that_is_missed_is_a_doubt_of_the_law(tmp_path: Path) -> None:
    """The loss rises again at the largest budget, which the second fit has not seen."""
    study, _, rows = one_seed(tmp_path, (1, 2, 3))
    study = study.model_copy(update={"report": study.report.model_copy(update={"holdout_tokens": float(BUDGETS[-2])})})
    worse = [replace(row, loss=row.loss * (1.1 if row.tokens == BUDGETS[-1] else 1.0)) for row in rows]
    analysis = analyze(study, worse, lambda _: None)
    fitted = analysis.data["natural", "s1"]
    assert fitted.fit is not None and "holdout-missed" not in {warning.code for warning in fitted.fit.warnings}
    assert "holdout-missed" in {doubt.code for doubt in fitted.doubts} and "holdout-missed" in fitted.rejected
    assert fitted.to_json()["holdout_warnings"][0]["code"] == "holdout-missed"


def test_three_ratios_give_no_law_and_say_where_the_best_is(tmp_path: Path) -> None:
    study, _, rows = one_seed(tmp_path, (1, 2, 3))
    analysis = analyze(study, rows, lambda _: None)
    choice = analysis.ratio["qa"]
    assert choice.chosen is None and "none can be left out" in choice.refused
    for best in analysis.best:
        assert best.fitted is None and best.refused == choice.refused
        assert best.lowest[0] == 0.5 and best.between == (0.0, 1.0)
    told = "\n".join(findings(analysis))
    assert "qa: no law in the ratio: of 3 ratios none can be left out" in told
    assert "the best share there is between 0 and 1" in told


def test_a_best_ratio_beside_a_worse_run_is_refused() -> None:
    ratios = np.linspace(0, 1, 5)
    off = BestRatio(0.57, 2.0, (0.5, 0.6), None, True, ratios, 2 + (ratios - 0.57) ** 2, 90)
    tested = [0.0, 1 / 3, 2 / 3, 1.0]
    only = MeasuredBest(1 / 3, 2.0, (1 / 3,), {}, 90)
    assert "next to 0.67, which the runs show to be worse" in refusal(off, tested, 1 / 3, only)
    assert refusal(replace(off, ratio=0.45), tested, 1 / 3, only) == ""
    assert refusal(off, tested, 1 / 3, None) == ""  # without seeds the neighbors are not known to be worse
    assert bracket(tuple(tested), (1 / 3,)) == (0.0, 2 / 3)
    assert bracket(tuple(tested), (0.0, 1 / 3)) == (0.0, 2 / 3)
    assert bracket(tuple(tested), (1.0,)) == (2 / 3, 1.0)


def test_a_speed_up_does_not_contradict_itself(tmp_path: Path) -> None:
    study, _, rows = one_seed(tmp_path)
    losses, known = np.array([3.0, 2.5]), np.array([True, True])
    curve = SpeedUp(
        losses, np.array([1.5, 1 / 1.19]), np.array([1.4, 0.24]), np.array([1.2, 0.11]), np.array([1.6, 0.52]), known, 90
    )
    text = " ".join(findings(Analysis(study, rows, None, speed={("all", "s1"): curve})))
    assert "with 1.19 times more tokens (measured; the laws, which say 4.17 times more" in text and "are wrong there" in text
    assert "0.24x" not in text
    agrees = replace(curve, low=np.array([1.2, 0.2]), high=np.array([1.6, 0.9]))
    text = " ".join(findings(Analysis(study, rows, None, speed={("all", "s1"): agrees})))
    assert "(measured; by the laws 4.17 times more, 90 % interval 5.00 times more to 1.11 times more)" in text
