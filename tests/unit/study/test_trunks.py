"""Studies whose runs are decays of a common trunk: what is planned, what it costs, and what the results say of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_synth.config.errors import ConfigError
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.execute.slurm import ArrayOptions, submit_array
from megatron_synth.study.plan.costs import check_sources, open_sources, use_key
from megatron_synth.study.plan.runs import Run, expand
from megatron_synth.study.plan.study_file import load_study
from megatron_synth.study.report.analysis import _fitted
from megatron_synth.study.report.collect import collect, read_runs_csv, runs_csv
from tests.support import read_ledger, read_metrics, write_source
from tests.unit.study.test_study_file import TINY, expanded, study_of
from tests.unit.study.test_study_run import submit

UNIT = 40 * 4 * 32
"""Tokens of 40 steps."""
BUDGETS = [UNIT * factor for factor in (1, 2, 4, 8, 16)]
WSD = {
    "train": {"sequence_length": 32, "global_batch_size": 4},
    "precision": {"dtype": "fp32"},
    "optim": {"schedule": "wsd"},
}
RATES = {"lr": 1e-2, "warmup_fraction": 0.1, "max_warmup_steps": 4}


def by_budget(runs: Sequence[Run], arm: str = "natural", seed: int = 1) -> list[Run]:
    return sorted((run for run in runs if (run.arm, run.seed) == (arm, seed)), key=lambda run: run.budget)


def test_budgets_of_an_arm_are_decays_of_its_longest_run(tmp_path: Path) -> None:
    grid = [{"sizes": ["s"], "tokens": BUDGETS}]
    _, runs = expanded(tmp_path, grid=grid, protocol=WSD, rates=RATES, design={"trunk": "own"})
    _, alone = expanded(tmp_path, grid=grid, protocol=WSD, rates=RATES)
    mine, scratch = by_budget(runs), by_budget(alone)
    assert [run.branch_step for run in mine] == [36, 72, 144, 288, 0]
    assert mine[-1].config.checkpoint.keep_steps == (36, 72, 144, 288)
    assert {run.trunk for run in mine} == {mine[-1].id} and len({run.trunk for run in runs}) == 6
    assert sum(run.own_tokens for run in mine) / UNIT == 17.5 and sum(run.own_tokens for run in scratch) / UNIT == 31
    # the warm-up is 4 steps in all of them, so a decay of the trunk is the run from scratch
    assert [run.id for run in mine] == [run.id for run in scratch] and not any(run.trunk for run in scratch)


def test_arms_that_are_judged_by_their_decay(tmp_path: Path) -> None:
    grid = [{"sizes": ["s"], "tokens": BUDGETS[:2]}]
    for seed, name in enumerate(("web", "qa")):
        write_source(tmp_path / name, seed, 40_000)
    study, runs = expanded(tmp_path, grid=grid, protocol=WSD, rates=RATES, design={"trunk": "natural"})
    (trunk,) = (run for run in runs if not run.branch_step and run.seed == 1)
    assert (trunk.arm, trunk.budget) == ("natural", BUDGETS[1]) and len(trunk.family) == 6
    branch = by_budget(runs, "mixed")[0]
    assert (branch.branch_step, branch.trunk) == (36, trunk.id)
    first, then = branch.config.data.phases
    assert first.ratios == {"web": 1} and first.until == 36 * 128
    assert then.ratios == {"web": Fraction(2, 3), "qa": Fraction(1, 3)} and then.until is None
    uses = check_sources(study, runs, open_sources(study, runs))[use_key(branch)]
    assert uses["qa"].tokens == pytest.approx(4 * 128 / 3, abs=32) and sum(use.tokens for use in uses.values()) == UNIT


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("set protocol.optim.schedule: wsd", {"protocol": {**WSD, "optim": {}}}),
        ("'natual' is neither 'own' nor an arm; did you mean 'natural'?", {"design": {"trunk": "natual"}}),
        ("within the trunk's warm-up of 64 steps", {"rates": {"lr": 1e-2, "warmup_fraction": 0.1}}),
        ("the trunk's constant rate ends at 36", {"design": {"trunk": "natural"}, "grid": "uneven"}),
        ("'natural' has no run of size s and seed 1", {"design": {"trunk": "natural"}, "grid": "without"}),
    ],
)
def test_what_cannot_be_a_branch_is_refused(tmp_path: Path, message: str, changes: dict[str, object]) -> None:
    grids = {
        "uneven": [{"sizes": ["s"], "tokens": BUDGETS[:1]}, {"sizes": ["s"], "arms": ["mixed"], "tokens": BUDGETS[1:2]}],
        "without": [{"sizes": ["s"], "arms": ["mixed"], "tokens": BUDGETS[:1]}],
        "whole": [{"sizes": ["s"], "tokens": BUDGETS}],
    }
    settings = {"protocol": WSD, "rates": RATES, "design": {"trunk": "own"}, "grid": "whole", **changes}
    with pytest.raises(ConfigError) as caught:
        expanded(tmp_path, **{**settings, "grid": grids[str(settings["grid"])]})
    assert message in str(caught.value)


def test_a_job_of_branches_waits_for_that_of_their_trunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, runs = expanded(
        tmp_path, grid=[{"sizes": ["s"], "tokens": BUDGETS[:2]}], protocol=WSD, rates=RATES, design={"trunk": "own"}
    )
    folder = Folder(tmp_path / "study")
    folder.prepare()
    jobs: list[tuple[list[str], list[str]]] = []

    def queue(spec: object, commands: list[str], limit: int, after: list[str]) -> str:
        packs = [Path(command.split("--only ")[1].split()[0]) for command in commands]
        jobs.append(([name for pack in packs for name in pack.read_text().split()], list(after)))
        return str(70 + len(jobs))

    monkeypatch.setattr("megatron_synth.study.execute.slurm.submit_to_queue", queue)
    assert submit_array(study, runs, folder, ArrayOptions(2, 0, 1, None, dry_run=False)) == 0
    (first, before), (then, after) = jobs
    assert sorted(first) == sorted(run.name for run in runs if not run.branch_step) and before == []
    assert sorted(then) == sorted(run.name for run in runs if run.branch_step) and after == ["71"]
    assert "submitted job 72 after job 71: 6 runs" in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_by_trunk_gives_the_results_of_runs_from_scratch(tmp_path: Path) -> None:
    for seed, name in enumerate(("web", "qa")):
        write_source(tmp_path / name, seed, 40_000)
    folders = {}
    for way, design in (("own", {"trunk": "own"}), ("scratch", {}), ("anneal", {"trunk": "natural"})):
        content = study_of(
            tmp_path,
            output=str(tmp_path / way),
            sizes={"s": {"model": TINY}},
            arms={"natural": {"web": 1}, "synthetic": {"qa": 1}} if way == "anneal" else {"natural": {"web": 1}},
            grid=[{"tokens": BUDGETS[:2] if way == "anneal" else BUDGETS[:3]}],
            seeds=[1],
            protocol=WSD,
            rates=RATES,
            design=design,
        )
        file = tmp_path / f"{way}.yaml"
        file.write_text(yaml.safe_dump(content))
        done = submit(file, "--jobs", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        study = load_study(file)
        folders[way] = study, Folder(study.folder), expand(study)
    results = {way: {run.id: folder.result(run) for run in runs} for way, (_, folder, runs) in folders.items()}
    assert results["own"].keys() == results["scratch"].keys()
    for name, result in results["own"].items():
        other = results["scratch"][name]
        assert result is not None and other is not None
        assert (result["loss"], result["tokens"], result["flops"]) == (other["loss"], other["tokens"], other["flops"])
    study, folder, runs = folders["own"]
    assert sum(len(read_metrics(folder.run(run))) for run in runs) == 160 + 4 + 8
    assert not list(folder.path.glob("runs/*/checkpoints/step_*"))
    evaluated = {"step": 1, "average": False, "tasks": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.01}}, "settings": {}}
    (folder.run(runs[1]) / "tasks.json").write_text(json.dumps(evaluated))
    rows = collect(study, runs, folder).rows
    table = tmp_path / "runs.csv"
    table.write_text(runs_csv(rows))
    assert [row.others.get("tasks/arc_easy/acc") for row in read_runs_csv(table)] == [None, 0.5, None]
    assert [row.trunk for row in read_runs_csv(table)] == [runs[0].trunk] * 3 == [rows[0].id] * 3
    table.write_text(table.read_text().replace(",trunk,", ",note/trunk,").replace(f",{runs[0].trunk},", ",1,"))
    assert {row.trunk for row in read_runs_csv(table)} == {""}  # of an older version, without the column
    # one trunk is one observation, however many rows
    fitted = _fitted(study, ("data", "natural", "s"), "data", rows * 2, {"tokens": np.array([row.tokens for row in rows * 2])})
    assert fitted.fit is not None and fitted.fit.clusters == 1
    _, folder, runs = folders["anneal"]
    for run in runs:
        ledger = read_ledger(folder.run(run))
        own = ledger["branch"]["sources"] if run.branch_step else ledger["sources"]
        assert set(own) == ({"web"} if run.arm == "natural" else {"qa"})
