"""A study as an array over two nodes of a real SLURM."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.preparing.readers.inputs import reader_of
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.execute.slurm import packed, queued_runs
from megatron_synth.study.plan.runs import expand
from megatron_synth.study.plan.study_file import load_study
from tests.slurm.conftest import call, job_environment
from tests.slurm.lab import Lab
from tests.support import ROOT, write_source
from tests.unit.data.preparing.support import tree
from tests.unit.study.test_study_file import study_of


def write(tmp_path: Path) -> Path:
    """Four runs of 30 steps."""
    for seed, name in enumerate(("web", "qa")):
        write_source(tmp_path / name, seed, 20_000)
    content = study_of(
        tmp_path,
        sizes={"s": study_of(tmp_path)["sizes"]["s"]},
        arms={"natural": {"web": 1}, "synthetic": {"qa": 1}},
        grid=[{"tokens": [30 * 4 * 32]}],
        validation={"web": {"path": str(tmp_path / "web")}},
    )
    content["protocol"]["eval"] = {"batches": 2}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_arrays_over_two_nodes_one_run_failing_and_retried(two: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path)
    study = load_study(file)
    folder, runs = Folder(study.folder), expand(study)
    obstacle = folder.run(runs[0])
    obstacle.mkdir(parents=True)
    (obstacle / "something").write_text("that is no run")
    asked = ("study", "submit", str(file), "--slurm", "--nodes", "2")
    first = call(two, *asked)
    assert first.code == 0, first.err
    assert "4 runs in 2 tasks" in first.out
    for name, value in {**job_environment(), **two.environment}.items():
        monkeypatch.setenv(name, value)
    assert set(queued_runs(folder)) == {run.name for run in runs}
    again = call(two, *asked)
    assert again.code == 0 and "0 of 4 runs to submit" in again.out, "what is queued is not submitted twice"

    two.wait("the failure", lambda: folder.failure(runs[0]) is not None, 240)
    (obstacle / "something").unlink()
    two.wait("all results", lambda: all(folder.state(run) == "done" for run in runs), 240)
    two.wait("the end of the array", lambda: not queued_runs(folder), 60)
    nodes = {line for log in folder.slurm.glob("*/task-*.log") for line in log.read_text().splitlines() if " on node" in line}
    assert any("on node1" in line for line in nodes) and any("on node2" in line for line in nodes), nodes
    assert all(folder.failure(run) is None for run in runs)
    last = call(two, *asked)
    assert last.code == 0 and "0 of 4 runs to submit" in last.out


def test_text_that_arms_share_is_prepared_by_an_array_once(two: Lab, tmp_path: Path) -> None:
    for name in ("web", "qa"):
        lines = (json.dumps({"text": f"{name} {number} " * 40}) for number in range(3000))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    sources = {name: {"kind": "natural", "input": str(tmp_path / f"{name}.jsonl")} for name in ("web", "qa")}
    data = {"output": str(tmp_path / "out"), "tokenizer": {"train": {"vocab_size": 300}}, "sources": sources}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    content = study_of(tmp_path / "out", prepare="data.yaml", output=str(tmp_path / "study"))
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    told = call(two, "study", "prepare", str(file), "--slurm", "--tasks", "3", "--workers", "1")
    assert told.code == 0 and "3 shares" in told.out, told.err
    shown = call(two, "study", "prepare", str(file), "--status")
    assert shown.code == 0 and "_2: " in shown.out, shown
    two.wait("the output", (tmp_path / "out" / "prepare.json").exists)
    logs = "".join(log.read_text() for log in (tmp_path / "out.slurm").glob("*/shares/task-*.log"))
    found = [tuple(map(int, pair)) for pair in re.findall(r"share \d/3: (\d+) splits tokenized, (\d+) were there", logs)]
    assert len(found) == 3 and all(there == 0 for _, there in found), logs
    data["output"] = str(tmp_path / "alone")
    config = PrepareConfig.model_validate(data)
    splits = [len(list(reader_of(name, source).splits())) for name, source in config.sources.items()]
    assert sum(made for made, _ in found) == sum(splits) and min(splits) > 1
    prepare(config)
    ours, alone = tree(tmp_path / "out"), tree(tmp_path / "alone")
    assert ours.pop("prepare.json") != b"" and alone.pop("prepare.json") != b"" and ours == alone


def test_packs_are_even_and_hold_every_run_once() -> None:
    runs = expand(load_study(ROOT / "configs" / "study" / "twin.yaml"))
    for places, nodes in ((1, 2), (4, 3), (8, 200)):
        packs = packed(runs, places, nodes)
        assert sorted(run.id for pack in packs for run in pack) == sorted(run.id for run in runs)
        loads = [sum(run.flops(1) for run in pack) for pack in packs]
        assert max(loads) - min(loads) <= max(run.flops(1) for run in runs)
        assert len(packs) >= min(nodes, len(runs)) and all(len(pack) <= 2 * 16 * places for pack in packs)


def test_dry_run_writes_scripts_that_bash_reads(two: Lab, tmp_path: Path) -> None:
    file = write(tmp_path)
    told = call(two, "study", "submit", str(file), "--slurm", "--dry-run")
    assert told.code == 0 and "nothing was submitted" in told.out, told.err
    script = next((tmp_path / "study" / "slurm").glob("*/array.sbatch"))
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "--only" in (script.parent / "commands.txt").read_text()
