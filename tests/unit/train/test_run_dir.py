"""The run directory: created whole, opened again with its history, and never mistaken for something else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import digest, load_file
from megatron_synth.config.schema import Config
from megatron_synth.train.record import run_dir
from megatron_synth.train.record.run_dir import RunDir, git_state, versions


def config(**optim: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4},
            "data": {"sources": {"web": {"path": "web", "ratio": "2/3"}, "qa": {"path": "qa", "ratio": "1/3"}}},
            "train": {"steps": 10, "global_batch_size": 4, "sequence_length": 16},
            "optim": optim,
        }
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's name needs torch, which takes seconds to import."""
    monkeypatch.setattr(run_dir, "device_name", lambda: "Test Chip")


def events(run: RunDir) -> list[str]:
    lines = (run.path / "events.log").read_text().splitlines()
    matches = [re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00) (.*)", line) for line in lines]
    assert all(matches), lines
    return [match[2] for match in matches if match]


def test_a_new_run_has_all_that_is_needed_to_resume_it(tmp_path: Path) -> None:
    run = RunDir.create_or_open(tmp_path / "a/b", config(), layout="TP1 PP1 DP2", world_size=2)
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.yaml", "events.log", "run.json"]
    assert load_file(Config, run.path / "config.yaml") == config()
    info = json.loads((run.path / "run.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{8}", info["id"]) and info["id"] == run.id
    assert info["digest"] == digest(config()) and info["device"] == "Test Chip"
    assert {"python", "torch", "megatron-core", "numpy", "megatron-synth"} <= set(info["versions"])
    assert info["starts"] == [{"time": info["created"], "layout": "TP1 PP1 DP2", "world_size": 2, "resumed_from_step": None}]
    assert events(run) == [f"start 1 of run {run.id}: TP1 PP1 DP2, 2 ranks, Test Chip"]
    assert run.metrics == run.path / "metrics.jsonl" and run.checkpoints.is_dir() and run.name == "b"


def test_opened_again_it_keeps_its_id_and_logs_each_change(tmp_path: Path) -> None:
    first = RunDir.create_or_open(tmp_path / "r", config(lr=3e-4), layout="TP1", world_size=1)
    changed = config(lr=1e-5, schedule="wsd", decay_steps=3)
    second = RunDir.create_or_open(tmp_path / "r", changed, layout="TP2", world_size=2)
    second.record_resume(7)
    assert second.id == first.id
    assert load_file(Config, second.path / "config.yaml") == changed
    info = RunDir.open(tmp_path / "r").info
    assert info["digest"] == digest(changed) != digest(config())
    assert [start["resumed_from_step"] for start in info["starts"]] == [None, 7]
    assert [start["layout"] for start in info["starts"]] == ["TP1", "TP2"] and info["layout"] == "TP2"
    assert events(second)[1:] == [
        f"start 2 of run {first.id}: TP2, 2 ranks, Test Chip",
        "changed: layout: TP1 -> TP2",
        "changed: world_size: 1 -> 2",
        "changed: optim.lr: 0.0003 -> 1e-05",
        "changed: optim.schedule: cosine -> wsd",
        "changed: optim.decay_steps: null -> 3",
        "resumed from step 7",
    ]


def test_opened_again_unchanged_it_logs_no_change(tmp_path: Path) -> None:
    RunDir.create_or_open(tmp_path / "r", config(), layout="TP1", world_size=1)
    before = (tmp_path / "r/config.yaml").stat().st_ino
    run = RunDir.create_or_open(tmp_path / "r", config(), layout="TP1", world_size=1)
    assert [event.split(" of ")[0] for event in events(run)] == ["start 1", "start 2"]
    assert (tmp_path / "r/config.yaml").stat().st_ino == before


def test_a_source_that_was_added_or_removed_is_listed(tmp_path: Path) -> None:
    RunDir.create_or_open(tmp_path / "r", config(), layout="TP1", world_size=1)
    other = config().model_dump(mode="json")
    other["data"]["sources"]["books"] = other["data"]["sources"].pop("qa")
    run = RunDir.create_or_open(tmp_path / "r", Config.model_validate(other), layout="TP1", world_size=1)
    listed = [event for event in events(run) if event.startswith("changed: data.sources.")]
    assert len(listed) == 2
    assert listed[0].startswith("changed: data.sources.books: (absent) -> {") and '"ratio": "1/3"' in listed[0]
    assert listed[1].startswith("changed: data.sources.qa: {") and listed[1].endswith("} -> (absent)")


def test_a_copy_is_the_same_run(tmp_path: Path) -> None:
    run = RunDir.create_or_open(tmp_path / "r", config(), layout="TP1", world_size=1)
    shutil.copytree(run.path, tmp_path / "copy")
    assert RunDir.create_or_open(tmp_path / "copy", config(), layout="TP1", world_size=1).id == run.id


def test_runs_have_different_ids(tmp_path: Path) -> None:
    ids = {RunDir.create_or_open(tmp_path / str(n), config(), layout="TP1", world_size=1).id for n in range(20)}
    assert len(ids) == 20


def test_what_is_not_a_run_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match=f"{name}: exists and is not a run directory"):
            RunDir.create_or_open(tmp_path / name, config(), layout="TP1", world_size=1)
        with pytest.raises(UserError, match="not a run directory"):
            RunDir.open(tmp_path / name)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]
    with pytest.raises(UserError, match="cannot be written"):
        RunDir.create_or_open(tmp_path / "file/run", config(), layout="TP1", world_size=1)


@pytest.mark.parametrize("killed_at", ["run.json", "config.yaml"])
def test_killed_while_it_is_created_it_can_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    real = os.replace

    def killed(source: str, target: Path) -> None:
        if Path(target).name == killed_at:
            shutil.copy(source, f"{source}.left")  # what SIGKILL would leave: a temporary file
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RunDir.create_or_open(tmp_path / "r", config(), layout="TP1", world_size=1)
    monkeypatch.setattr(os, "replace", real)
    run = RunDir.create_or_open(tmp_path / "r", config(), layout="TP1", world_size=1)
    assert load_file(Config, run.path / "config.yaml") == config() and RunDir.open(run.path).id == run.id


def test_a_damaged_run_json_is_named(tmp_path: Path) -> None:
    run = RunDir.create_or_open(tmp_path / "r", config(), layout="TP1", world_size=1)
    for content in ("{", "[]", "{}", '{"id": 5, "starts": []}'):
        (run.path / "run.json").write_text(content)
        with pytest.raises(UserError, match=r"run\.json: damaged"):
            RunDir.create_or_open(run.path, config(), layout="TP1", world_size=1)


def test_an_event_is_one_line(tmp_path: Path) -> None:
    run = RunDir.create_or_open(tmp_path / "r", config(), layout="TP1", world_size=1)
    run.event("two\nlines")
    assert events(run)[-1] == "two | lines"


def test_ledger_round_trip(tmp_path: Path) -> None:
    run = RunDir.create_or_open(tmp_path / "r", config(), layout="TP1", world_size=1)
    assert run.read_ledger() is None
    source = {"ratio": "1", "samples": 4, "tokens": 64, "epochs": 0.5, "share": 1.0}
    for samples in (3, 4):
        ledger = {"samples": samples, "tokens": 16 * samples, "sequence_length": 16, "sources": {"web": source}}
        run.write_ledger(ledger)
        assert run.read_ledger() == ledger
    assert run.read_config()["data"]["sources"]["web"]["ratio"] == Fraction(2, 3)


def test_versions_are_read_without_imports() -> None:
    code = "import sys; from megatron_synth.train.record.run_dir import versions; versions(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert versions()["torch"].startswith("2.")


def test_git_state_is_of_the_checkout_that_tracks_the_folder(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package, installed = tmp_path / "package", tmp_path / "venv"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "a.py").write_text("1")
    assert git_state(package) is None
    git("init", "-q")
    git("add", "package")
    assert git_state(package) is None  # nothing committed yet
    git("commit", "-q", "-m", "one")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert git_state(installed) is None  # below a checkout, but not part of it
    (package / "a.py").write_text("2")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
