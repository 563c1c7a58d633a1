"""Results of tasks in a run's records: beside the losses of their step, in the tracker too, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.core.lock import Lock
from megatron_synth.train.record import metrics, tasks
from megatron_synth.train.record.metrics import read_metrics
from megatron_synth.train.record.run_lock import LOCK
from megatron_synth.train.record.wandb import Tracker
from tests.support import run_info, write_config

INFO: tasks.TaskInfo = {"step": 2, "average": False, "tasks": {"arc_easy": {"acc": 0.25}}, "settings": {"limit": 4}}


class Heard(Tracker):
    """Keeps what it is told."""

    logged: list[tuple[int, dict[str, Any]]] = []
    ends: list[int] = []

    def log(self, record: Any, step: int) -> None:
        self.logged.append((step, dict(record)))

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run_info()))
    write_config(folder / "config.yaml", tmp_path / "corpus")
    lines = [{metrics.STEP: step, metrics.LOSS: 3.0 / step, metrics.EVAL_LOSS: None} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(metrics.encode(line) + "\n" for line in lines))
    monkeypatch.setattr(Heard, "logged", [])
    monkeypatch.setattr(Heard, "ends", [])
    monkeypatch.setattr(tasks.Tracker, "start", lambda *args, **options: Heard())
    return folder


def test_results_stand_beside_the_losses_of_their_step(run: Path) -> None:
    before = read_metrics(run / "metrics.jsonl")
    tasks.record(run, INFO)
    after = read_metrics(run / "metrics.jsonl")
    assert after[1] == {**before[1], "tasks/arc_easy/acc": 0.25}
    assert [after[0], after[2]] == [before[0], before[2]]
    assert tasks.of_run(run) == {"tasks/arc_easy/acc": 0.25}
    assert Heard.logged == [(2, {"tasks/arc_easy/acc": 0.25})] and Heard.ends == [0]
    tasks.record(run, {**INFO, "average": True})
    assert read_metrics(run / "metrics.jsonl")[1]["ema/tasks/arc_easy/acc"] == 0.25


def test_a_run_without_the_record_of_the_step_keeps_its_records(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    tasks.record(run, {**INFO, "step": 9})
    assert (run / "metrics.jsonl").read_bytes() == before and tasks.of_run(run) == {"tasks/arc_easy/acc": 0.25}
    assert Heard.logged == []


def test_a_run_in_training_and_damaged_results_are_refused(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    with Lock(run / LOCK, "train"), pytest.raises(UserError, match="train"):
        tasks.record(run, INFO)
    assert (run / "metrics.jsonl").read_bytes() == before and not (run / tasks.FILE).exists()
    (run / tasks.FILE).write_text('{"step": 1, "average": false, "tasks": {"a": {"acc": "high"}}, "settings": {}}')
    with pytest.raises(UserError, match=r"tasks.json: damaged: tasks.a.acc.*writes it again"):
        tasks.of_run(run)
