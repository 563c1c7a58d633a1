"""The report on simulated runs: what is known to be true of them must be what the page says."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.core.html import TOOLS
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.plan.runs import Run, expand
from megatron_synth.study.plan.study_file import Study, load_study
from megatron_synth.study.report.analysis import Analysis
from megatron_synth.study.report.collect import Row, read_runs_csv, runs_csv
from megatron_synth.study.report.figures.drawing import csv_of, looks
from megatron_synth.study.report.report import write_report
from tests.support import ROOT
from tests.unit.study.test_study_file import TINY, write_study

NOISE = 0.003
BEST = 1 / 3
FIGURES = (
    *("loss-data", "loss-model", "best-ratio", "speed-up", "domains", "map", "best-ratio-map", "residuals"),
    "decisions",
)


def simulated(study: Study, runs: list[Run], seed: int = 0) -> list[Row]:
    """Runs of a world in which a third is the best share, everywhere, and more than that ever worse."""
    random = np.random.default_rng(seed)
    rows = []
    for run in runs:
        share, size, tokens = float(study.share(run.arm)), run.parameters, run.tokens
        floor = 1.8 + 0.9 * (share - BEST) ** 2 + 40 / size**0.3 + 60 / tokens**0.3
        losses = {name: floor * (1 + 0.05 * place) for place, name in enumerate(study.validation)}
        domains = {name: float(loss * np.exp(random.normal(0, NOISE))) for name, loss in losses.items()}
        others = {f"bpb/{name}": loss / 2 for name, loss in domains.items()}
        for name, part in study.arms[run.arm].items():
            others[f"tokens/{name}"], others[f"epochs/{name}"] = float(part.ratio) * tokens, float(part.ratio) * tokens / 1e6
        identity: dict[str, Any] = {"run": run.name, "id": run.id, "arm": run.arm, "size": run.size, "seed": run.seed}
        mixture: dict[str, Any] = {"family": study.family(run.arm), "share": str(study.share(run.arm)), "ratio": share}
        numbers: dict[str, Any] = {"n_params": size, "budget": run.budget, "tokens": tokens, "flops": 6.0 * size * tokens}
        loss = float(np.mean(list(domains.values())))
        rest: dict[str, Any] = {"steps": run.config.train.steps, "loss": loss, "train_loss": loss, "train_seconds": 1.5}
        rows.append(Row(**identity, **mixture, **numbers, **rest, device="none", domains=domains, others=others))
    return rows


class Page(HTMLParser):
    """What a browser would find in a page."""

    VOID = frozenset({"meta", "br", "use", "path", "rect"})

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "a":
            self.links.append(str(values["href"]))
        self.loaded += [str(values[key]) for key in ("src", "srcset", "data", "poster") if values.get(key)]
        if tag in ("link", "iframe"):
            self.loaded.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Row], Path]:
    """The twin's design with simulated losses, and its report."""
    folder = tmp_path_factory.mktemp("report")
    study = load_study(ROOT / "configs" / "study" / "twin.yaml", ["report.bootstraps=60"])
    runs = expand(study)
    rows = simulated(study, runs)
    (folder / "runs.csv").write_text(runs_csv(rows))
    page = write_report(study, runs, Folder(folder), table=folder / "runs.csv")
    assert page == folder / "report" / "index.html"
    return study, rows, page.parent


def test_the_page_is_whole_and_alone(reported: tuple[Study, list[Row], Path]) -> None:
    _, rows, out = reported
    text = (out / "index.html").read_text()
    page = Page(text)
    assert not page.open, "every element is closed"
    assert not page.loaded, "nothing is fetched"
    assert_one_script(text, page)
    assert not re.search(r"""(?:url\(|@import|href=)["']?(?:https?:)?//""", text)
    assert len(set(page.ids)) == len(page.ids), "ids are unique"
    targets = set(page.ids)
    assert all(link.startswith("#") and link[1:] in targets for link in page.links)
    assert {f"run-{row.id}" for row in rows} <= targets
    # every figure in the figure's order, drawn, and in the colors of the page
    places = [text.index(f'id="figure-{name}"') for name in FIGURES]
    assert places == sorted(places) and page.count["svg"] == len(FIGURES)
    assert "var(--ink)" in text and "prefers-color-scheme: dark" in text
    for reference in re.findall(r'(?:url\(#|href="#)([^)"]+)', text):
        assert reference in targets, reference
    assert all((out / "figures" / f"{name}.png").stat().st_size > 5_000 for name in FIGURES)
    assert len(text) < 1_000_000, "small enough to mail"


def assert_one_script(text: str, page: Page) -> None:
    """The page's own script is the only one, and the only one that its policy allows: no word of it comes from outside."""
    assert page.count["script"] == 1
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy and script == [TOOLS]
    assert unescape(policy[1]).split("; ")[-1] == f"script-src 'sha256-{digest}'" and "unsafe-inline" not in digest


def test_figures_answer_and_can_be_taken_along(reported: tuple[Study, list[Row], Path]) -> None:
    """A figure has a question, its answer as the title, its numbers, and files of both."""
    _, rows, out = reported
    text = (out / "index.html").read_text()
    for name in FIGURES:
        figure = text.split(f'<figure id="figure-{name}">')[1].split("</figure>")[0]
        assert re.search(r'<p class="question">[^<]+\?</p><h3>[^<]*\d[^<]*</h3>', figure), name
        drawn = (out / "figures" / f"{name}.svg").read_text()
        assert drawn.startswith("<?xml") and "var(--" not in drawn and "<metadata" not in drawn
        content = (out / "figures" / f"{name}.csv").read_text()
        table = list(csv.DictReader(content.splitlines()))
        assert len(table) > 3 and unescape(figure.split("<pre>")[1].split("</pre>")[0]) == content
    data = list(csv.DictReader((out / "figures" / "loss-data.csv").read_text().splitlines()))
    assert sum(line["what"] == "run" for line in data) == sum(row.size == "50k" for row in rows)
    assert {line["what"] for line in data} == {"run", "law", "law, extrapolated"}


def test_arms_are_told_apart_without_color(tmp_path: Path) -> None:
    arms = {
        "natural": {"web": 1},
        **{f"qa-{share}": {"web": f"{10 - share}/10", "qa": f"{share}/10"} for share in range(1, 10)},
    }
    study = load_study(write_study(tmp_path, arms=arms))
    style = looks(Analysis(study, [], None))
    assert len({look.marker for look in style.values()}) == len({look.sign for look in style.values()}) == len(arms)
    assert style["natural"].sign == "●"


def test_a_spreadsheet_runs_nothing_of_a_figures_data() -> None:
    assert csv_of([("=1+1", "+a", "-x", -1.5, math.nan, "a,b")]) == "'=1+1,'+a,'-x,-1.5,,\"a,b\"\n"


def test_every_law_names_its_runs(reported: tuple[Study, list[Row], Path]) -> None:
    _, rows, out = reported
    known = {row.run: row for row in rows}
    laws = {file.stem: json.loads(file.read_text()) for file in (out / "laws").glob("*.json")}
    assert {"data-natural-50k", "model-qa-33-98304", "joint-natural", "mixture-qa", "data-qa-100-50k-unseen"} <= set(laws)
    for name, law in laws.items():
        assert law["runs"] and set(law["runs"]) <= set(known), name
        if law["law"] == "ratio":  # which law in the ratio was chosen
            assert {"chosen", "errors", "without_a_law", "refused"} <= set(law)
            continue
        assert "problem" in law or {"params", "objective", "intervals", "points", "dropped", "holdout"} <= set(law), name
    used = [known[run] for run in laws["data-natural-50k"]["runs"]]
    assert {(row.arm, row.size) for row in used} == {("natural", "50k")} and len(used) == 12
    assert laws["data-natural-50k"]["holdout"]["points"] == 3  # three seeds at the budget beyond the limit
    assert laws["data-natural-50k"]["holdout"]["mean_absolute_relative_error"] < 0.05


def test_the_findings_are_what_was_put_in(reported: tuple[Study, list[Row], Path]) -> None:
    _, _, out = reported
    text = (out / "findings.txt").read_text()
    assert "lowest loss is at a share of 1/3" in text
    assert "the same share is best in all 6 cells" in text
    assert "No loss rises with the budget" in text
    assert "Towards the highest share the loss rises in 6 of 6 cells (between shares of 2/3 and 1)" in text
    scatter = re.search(r"scatters by ([\d.]+) %", text)
    assert scatter and float(scatter[1]) == pytest.approx(100 * NOISE / np.sqrt(3), rel=0.35)  # the mean over three domains
    # in that world D_natural / D_mixed at the largest loss both have measured is above 1 for a third, below for all
    speed = next(line for line in text.splitlines() if line.startswith("Against the baseline at 50k"))
    assert re.search(r"qa-33 reaches [^;]* times fewer tokens", speed) and re.search(
        r"qa-100 reaches [^;]* times more tokens", speed
    )
    # the penalty on more than a third is the same at every budget, so the gap's part in the loss grows: the floor is higher
    assert re.search(r"^qa-100 falls behind the baseline at 50k", text, re.M)
    assert text.index("falls behind") < text.index("lowest loss is at a share") < text.index("Against the baseline")


def test_tables_for_olmix(reported: tuple[Study, list[Row], Path]) -> None:
    study, rows, out = reported
    ratios, metrics = (list(csv.DictReader((out / name).read_text().splitlines())) for name in ("ratios.csv", "metrics.csv"))
    assert list(ratios[0]) == ["run", *study.sources] and list(metrics[0]) == ["run", "natural_bpb", "qa_bpb", "unseen_bpb"]
    assert [row["run"] for row in ratios] == [row["run"] for row in metrics] == [row.run for row in rows]
    assert all(float(row["natural"]) + float(row["qa"]) == pytest.approx(1) for row in ratios)
    assert read_runs_csv(out / "runs.csv") == rows


def test_a_browser_draws_it(reported: tuple[Study, list[Row], Path], tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    # the page tells its own measures: a figure that was not laid out has no height
    heights_of = "[...document.querySelectorAll('figure svg')].map(e=>Math.round(e.getBoundingClientRect().height))"
    copy = tmp_path / "page.html"
    text = (reported[2] / "index.html").read_text()
    # the page allows no script but its own: the copy does
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    copy.write_text(text.replace("</body>", f"<script>document.title={heights_of}.join(',')</script></body>"))
    command = [browser, *options, "--window-size=1200,1000", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    heights = re.search(r"<title>([\d,]+)</title>", dom)
    assert heights and len(heights[1].split(",")) == len(FIGURES) and min(map(int, heights[1].split(","))) > 100


def test_links_of_the_page_fit_a_phone(reported: tuple[Study, list[Row], Path], tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here")
    text = (reported[2] / "index.html").read_text()
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    copy, frame = tmp_path / "page.html", tmp_path / "frame.html"
    rights = "[...document.querySelectorAll('nav a')].map(e=>Math.round(e.getBoundingClientRect().right))"
    copy.write_text(text.replace("</body>", f"<script>parent.postMessage({rights}.join(','), '*')</script></body>"))
    # a window cannot be as narrow as a phone, a frame can
    frame.write_text(
        "<script>onmessage=e=>document.title=e.data</script><iframe src='page.html' width=390 height=800></iframe>"
    )
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *options, "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"<title>([\d,]+)</title>", dom)
    assert found and max(map(int, found[1].split(","))) <= 390


HOSTILE = "x\"><img src=x onerror=alert(1)><script>alert(2)</script>$\\frac$ &amp; '` {0} {{7*7}}"


# names as long as these leave no room for the axes
@pytest.mark.filterwarnings("ignore:constrained_layout not applied:UserWarning")
def test_names_from_a_table_are_text(tmp_path: Path) -> None:
    """A table made by a stranger: whatever stands in its cells is shown and never read as HTML, a formula or a template."""
    study = load_study(write_study(tmp_path), ["report.bootstraps=20"])
    runs = expand(study)
    rows = [
        replace(row, id=f"{number}{HOSTILE}", run=f"{row.run}{HOSTILE}", size=f"{row.size}{HOSTILE}", device=HOSTILE)
        for number, row in enumerate(simulated(study, runs))
    ]
    (tmp_path / "runs.csv").write_text(runs_csv(rows))
    text = write_report(study, runs, Folder(tmp_path / "x"), table=tmp_path / "runs.csv").read_text()
    page = Page(text)
    assert not page.open and not page.loaded and "img" not in page.count
    assert_one_script(text, page)
    assert "default-src 'none'" in text.split("</head>")[0] or "default-src &#39;none&#39;" in text.split("</head>")[0]
    assert "&lt;img src=x onerror=alert(1)&gt;" in text and "{{7*7}}" in text


def test_missing_runs_are_named(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    runs = expand(study)
    rows = simulated(study, runs)[:-3]
    (tmp_path / "runs.csv").write_text(runs_csv(rows))
    text = write_report(study, runs, Folder(tmp_path / "x"), table=tmp_path / "runs.csv").read_text()
    assert "3 runs of the study are missing" in text and f"{len(rows)} of {len(runs)}" in text
    for run in runs[-3:]:
        assert f"<code>{run.name}</code>" in text


def test_a_study_too_small_for_laws_says_so(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, seeds=[1], arms={"natural": {"web": 1}, "synthetic": {"qa": 1}}))
    runs = expand(study)
    (tmp_path / "runs.csv").write_text(runs_csv(simulated(study, runs)))
    page = write_report(study, runs, Folder(tmp_path / "x"), table=tmp_path / "runs.csv")
    found = (page.parent / "findings.txt").read_text()
    assert "no difference between single runs can be called real" in found and "No law was tried" in found
    assert not Page(page.read_text()).open


def test_a_loss_that_rises_with_the_size_is_no_error(tmp_path: Path) -> None:
    sizes = {f"s{layers}": {"model": {**TINY, "num_layers": layers}} for layers in (1, 2, 4)}
    arms = {"natural": {"web": 1}, "synthetic": {"qa": 1}}
    grid = [{"tokens": [512, 1024, 4096]}]
    study = load_study(write_study(tmp_path, sizes=sizes, arms=arms, grid=grid), ["report.bootstraps=20"])
    runs = expand(study)
    rows = [replace(row, loss=row.loss * (row.n_params / 1e4) ** 0.3) for row in simulated(study, runs)]
    (tmp_path / "runs.csv").write_text(runs_csv(rows))
    page = write_report(study, runs, Folder(tmp_path / "x"), table=tmp_path / "runs.csv")
    text = page.read_text()
    assert "There is no comparison at equal compute" in text and "wrong-sign" in text


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    runs = expand(study)
    rows = simulated(study, runs)
    file = tmp_path / "runs.csv"
    for content, words in (
        ("run,loss\na,1\n", "no column"),
        (runs_csv(rows).replace(str(rows[3].loss), "high"), "line 5"),
        (runs_csv([replace(rows[0], arm="other")]), "other are not in the study"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=words):
            write_report(study, runs, Folder(tmp_path / "x"), table=file)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="no run is finished"):
        write_report(study, runs, Folder(tmp_path / "x"))
