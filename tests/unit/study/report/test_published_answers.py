"""Published answers stand on the page of a study beside the arms that correspond to them, and beside no others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.plan.references import references
from megatron_synth.study.plan.runs import expand
from megatron_synth.study.plan.study_file import load_study
from megatron_synth.study.report.collect import runs_csv
from megatron_synth.study.report.report import write_report
from tests.unit.study.report.test_study_report import Page, simulated
from tests.unit.study.test_study_file import TINY, study_of, write_study

SHARES = {"33": "1/3", "67": "2/3", "100": "1"}


def test_an_arm_that_corresponds_has_its_reference_and_others_have_none(tmp_path: Path) -> None:
    """Tables rephrased as tables (FinePhrase), a kind of the study of the paper, and one that nobody has published of."""
    paths = study_of(tmp_path)["sources"]["qa"]
    sources = {
        "web": paths,
        "tables": {**paths, "reference": "table"},
        "asked": {**paths, "reference": "qa"},
        "poems": dict(paths),
    }
    arms = {"natural": {"web": 1}}
    for kind in ("tables", "asked", "poems"):
        arms |= {f"{kind}-{name}": {"web": f"1-{share}", kind: share} for name, share in SHARES.items()}
    for name, mixture in arms.items():
        arms[name] = {source: _whole(str(ratio)) for source, ratio in mixture.items() if _whole(str(ratio)) != "0"}
    sizes = {"s": {"model": {**TINY, "num_layers": 1}}}
    study = load_study(
        write_study(
            tmp_path, sources=sources, arms=arms, sizes=sizes, grid=[{"tokens": [512, 1024, 2048, 4096]}], seeds=[1, 2]
        ),
        ["report.bootstraps=20"],
    )
    runs = expand(study)
    random = np.random.default_rng(0)
    rows = []
    for row in simulated(study, runs):
        best = {"tables": 2 / 3, "asked": 1 / 3, "poems": 0.0}.get(row.family, 0.0)
        loss = 2 + 0.5 * (row.ratio - best) ** 2 - 0.5 * best**2 + 30 / row.tokens**0.5
        rows.append(replace(row, loss=float(loss * np.exp(0.001 * random.standard_normal()))))
    (tmp_path / "runs.csv").write_text(runs_csv(rows))
    page = write_report(study, runs, Folder(tmp_path / "x"), table=tmp_path / "runs.csv").read_text()
    Page(page)
    section = page.split("Beside published answers</h3>")[1].split("</table>")[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S) for line in section.split("<tr")[2:]]
    found = {re.sub(r"<.*?>", "", row[0]): [re.sub(r"<.*?>", "", cell) for cell in row[1:]] for row in cells}
    assert set(found) == {"tables", "asked"}
    published, here, answer = found["tables"]
    assert here.startswith("0.67 at s, 4.1k tokens") and published == "0.7"
    assert (
        answer.startswith("Best at 70 %, then a plateau. Collapse: none seen.") and "By FinePhrase, arXiv 2604.13977" in answer
    )
    assert "1.7B parameters, 21B tokens; benchmark scores, not loss" in answer
    published, here, answer = found["asked"]
    assert here.startswith("0.33 at s, 4.1k tokens") and published == "0.3" and "arXiv 2510.01631" in answer
    assert "validation loss on The Pile" in answer and "known from: a secondary report of the paper" in answer


def _whole(ratio: str) -> str:
    return {"1-1/3": "2/3", "1-2/3": "1/3", "1-1": "0"}.get(ratio, ratio)


def test_the_published_shares_are_those_of_the_sources() -> None:
    """FinePhrase: best at 70 % for tables, 80 % mathematics, 60 % FAQ and tutorials; the paper's rephrased text near 30 %."""
    best = {kind: [one.share for one in each] for kind, each in references().items()}
    assert best == {
        "hq": [0.3],
        "qa": [0.3],
        "textbook": [0.05],
        "table": [0.7],
        "math": [0.8],
        "faq": [0.6],
        "tutorial": [0.6],
    }
    for each in references().values():
        for one in each:
            assert one.source.startswith("arXiv ") and one.setting and one.origin


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    sources = study_of(tmp_path)["sources"]
    sources["qa"]["reference"] = "sonnet"
    with pytest.raises(UserError, match=r"sources\.qa\.reference"):
        load_study(write_study(tmp_path, sources=sources))
