"""Where runs stand, from run directories in every condition and a SLURM that is played by a program."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.cli import main as cli
from megatron_synth.cluster import slurm
from megatron_synth.cluster.slurm import JobState
from megatron_synth.cluster.status import find_runs, rows, status
from megatron_synth.config.errors import UserError
from megatron_synth.core.lock import Lock
from megatron_synth.train.record.run_lock import LOCK
from tests.support import run_info

NOW = 1_800_000_000.0
CONFIG = """model: {{name: custom, num_layers: 2, hidden_size: 32, num_attention_heads: 4}}
data: {{sources: {{web: {{path: web, ratio: '1'}}}}}}
train: {{steps: {steps}, sequence_length: 32, seed: 1}}
precision: {{dtype: fp32}}
"""


def make_run(folder: Path, *, steps: int = 100, done: int = 40, events: tuple[str, ...] = (), age: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run_info(starts=2)))
    (folder / "config.yaml").write_text(CONFIG.format(steps=steps))
    record = {"train/loss": 2.5, "perf/step_s": 0.5, "perf/tokens_per_sec_per_gpu": 12_345.0}
    lines = [json.dumps({"step": step, **record}) for step in range(1, done + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "tr')  # the last line is being written
    (folder / "events.log").write_text("".join(f"2026-01-01T00:00:00+00:00 {event}\n" for event in events))
    for file in ("run.json", "metrics.jsonl"):
        os.utime(folder / file, (NOW - age, NOW - age))
    return folder


def add_job(run: Path, job: str, *attempts: dict[str, Any]) -> Path:
    folder = run / "slurm" / f"job-{job}"
    (folder / "attempts").mkdir(parents=True)
    (folder / "job.id").write_text(f"{job}\n")
    (folder / "config.yaml").write_text(CONFIG.format(steps=100))
    (folder / "attempts" / f"{job}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
    return run


BEGIN = {"event": "begin", "time": NOW - 60, "restart": 0, "step": 0, "nodes": "n1"}
FAILED = {"kind": "failed", "code": 1, "began": 0, "step": 0, "signature": "", "explained": True, "why": ""}
CRASHED = {"event": "end", "time": NOW, "restart": 0, "step": 0, "end": FAILED, "requeue": False, "why": "failed twice"}


def state(run: Path, job: JobState | None = None) -> str:
    return status(run, {"7": job} if job else {}, NOW).state


def test_a_run_outside_slurm(tmp_path: Path) -> None:
    running = status(make_run(tmp_path / "a"), {}, NOW)
    assert (running.state, running.step, running.steps, running.loss) == ("running", 40, 100, 2.5)
    assert (running.eta_s, running.tokens_per_s_per_gpu, running.restarts, running.job) == (30.0, 12_345.0, 1, None)
    assert state(make_run(tmp_path / "b", age=7200)) == "silent for 2:00:00"
    assert state(make_run(tmp_path / "c", events=("stopped on request (SIGTERM) at step 40",))) == "stopped"
    finished = status(make_run(tmp_path / "d", done=100, events=("done at step 100",)), {}, NOW)
    assert (finished.state, finished.eta_s, finished.event) == ("done", None, "done at step 100")


def test_a_run_in_the_queue(tmp_path: Path) -> None:
    waiting = tmp_path / "w"
    waiting.mkdir()
    add_job(waiting, "7")
    found = status(waiting, {"7": JobState("PENDING", "Resources")}, NOW)
    assert (found.state, found.step, found.steps, found.restarts, found.job) == ("pending (Resources)", 0, 100, 0, "7")
    run = add_job(make_run(tmp_path / "r"), "7", BEGIN)
    assert state(run, JobState("RUNNING")) == "running" and status(run, {"7": JobState("RUNNING")}, NOW).eta_s == 30.0
    later = {**BEGIN, "time": NOW}
    assert state(add_job(make_run(tmp_path / "s"), "7", BEGIN, later), JobState("RUNNING")) == "starting"


def test_a_run_whose_job_has_ended(tmp_path: Path) -> None:
    done = make_run(tmp_path / "d", done=100, events=("done at step 100",))
    assert state(add_job(done, "7", BEGIN), JobState("COMPLETED")) == "done"
    assert state(add_job(make_run(tmp_path / "f"), "7", BEGIN, CRASHED), JobState("FAILED")) == "failed"
    assert state(add_job(make_run(tmp_path / "c"), "7", BEGIN), JobState("CANCELLED")) == "cancelled"
    assert state(add_job(make_run(tmp_path / "n"), "7", BEGIN), JobState("NODE_FAIL")) == "node fail"
    assert state(add_job(make_run(tmp_path / "x"), "7", BEGIN, CRASHED)) == "failed"  # SLURM has forgotten it
    assert state(add_job(make_run(tmp_path / "l"), "7", BEGIN)) == "lost"
    assert state(add_job(make_run(tmp_path / "e"), "7", BEGIN, {**BEGIN, "event": "ended"})) == "ended by SLURM"


def test_a_job_that_died_before_its_script_is_shown_with_slurms_reason(tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    add_job(run, "7")
    assert status(run, {"7": JobState("FAILED", "JobLaunchFailure")}, NOW).state == "failed (JobLaunchFailure)"
    assert status(run, {"7": JobState("FAILED")}, NOW).state == "failed before its script began"


def test_tables_fit_the_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", events=("x" * 300,))
    table = rows([status(run, {}, NOW)], 120)
    assert len("  ".join(table[1])) <= 120 and table[1][-1].endswith("...")
    assert table[1][:5] == ("a", "-", "running", "40/100  40%", "2.5000")


def test_folders_of_runs_are_looked_into(tmp_path: Path) -> None:
    made = [make_run(tmp_path / "runs" / name) for name in ("a", "b")]
    (tmp_path / "runs" / "notes").mkdir()
    assert find_runs([tmp_path / "runs"]) == made and find_runs([made[1]]) == [made[1]]
    with pytest.raises(UserError, match="neither a run directory nor a folder of some"):
        find_runs([tmp_path / "runs" / "notes"])


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH for programs that play SLURM's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def play(folder: Path, name: str, text: str, code: int = 0, error: str = "") -> None:
    (folder / name).write_text(f"#!/bin/sh\ncat <<'X'\n{text}\nX\nprintf '%s' '{error}' >&2\nexit {code}\n")
    (folder / name).chmod(0o755)


def test_jobs_that_squeue_has_forgotten_are_looked_up_in_sacct(played: Path) -> None:
    play(played, "squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")
    lines = ["7|COMPLETED|0:0|n[1-2]", "8|CANCELLED by 1000|0:15|n3", "9_0|FAILED|3:0|n4", "9_1|TIMEOUT|0:0|n4"]
    play(played, "sacct", "\n".join(lines))
    found = slurm.states(["7", "8", "9"])
    assert {job: (one.state, one.exit_code) for job, one in found.items()} == {
        "7": ("COMPLETED", 0),
        "8": ("CANCELLED", 143),
        "9_0": ("FAILED", 3),
        "9_1": ("TIMEOUT", 0),
    }


def test_slurm_without_accounting_knows_no_more(played: Path) -> None:
    play(played, "squeue", "", 1, "Invalid job id specified")
    play(played, "sacct", "", 1, "Slurm accounting storage is disabled")
    assert slurm.states(["7"]) == {}


def test_a_slurm_that_does_not_answer_is_an_error(played: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(played, "squeue", "", 1, "Unable to contact slurm controller")
    run = add_job(make_run(tmp_path / "a"), "7")
    assert cli.main(["status", str(run)]) == 2
    assert "Unable to contact slurm controller" in capsys.readouterr().err


def test_logs_by_rank_and_the_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = add_job(make_run(tmp_path / "a"), "7")
    log = run / "slurm" / "job-7" / "job.log"
    assert cli.main(["logs", str(run)]) == 2 and "has not begun" in capsys.readouterr().err
    log.write_text("job 7\n[rank 1] one\n[rank 10] ten\n[rank 1] two\n[rank 1] not whole")
    assert cli.main(["logs", str(run), "--rank", "1"]) == 0
    assert capsys.readouterr().out == "[rank 1] one\n[rank 1] two\n"
    assert cli.main(["logs", str(run), "-n", "1"]) == 0
    assert capsys.readouterr().out == "[rank 1] two\n"
    assert cli.main(["logs", str(make_run(tmp_path / "b"))]) == 2


def die_in(run: Path, machine: str | None = None) -> Path:
    """A lock whose holder has died on this machine, or works on another."""
    file = run / LOCK
    with Lock(file, "train"):
        info = json.loads(file.read_text())
    file.touch()
    changes = {"started": "1"} if machine is None else {"machine": machine}
    file.write_text(json.dumps(info | changes | {"inode": file.stat().st_ino}))
    return file


START = "start 2 of run 12345678: TP1, 1 ranks, CPU"


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("failed at step 40: ValueError: x", "failed"),
        ("failed at step 40: rank 1 of 2 is lost", "failed"),
        ("interrupted at step 40, without a save", "interrupted"),
        ("stopped on request at step 0, before the first step of this start", "stopped"),
    ],
)
def test_how_a_run_ended_is_known_at_once(event: str, expected: str, tmp_path: Path) -> None:
    found = status(make_run(tmp_path / "a", events=(START, event, "a line that comes later")), {}, NOW)
    assert (found.state, found.eta_s) == (expected, None)
    # what an earlier start said of itself says nothing of this one
    assert state(make_run(tmp_path / "b", events=(event, START))) == "running"


def test_a_run_that_was_killed_and_one_that_is_held(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", events=(START,))
    with Lock(run / LOCK, "train"):
        found = status(run, {}, NOW + 1e6)  # however long it has written nothing
        assert found.state == "running" and found.eta_s == 30.0
    die_in(run)
    assert state(run) == "killed"
    file = die_in(make_run(tmp_path / "b", events=(START,)), "another")
    os.utime(file, (NOW - 5, NOW - 5))
    assert state(tmp_path / "b") == "running"
    os.utime(file, (NOW - 3600, NOW - 3600))
    assert state(tmp_path / "b") == "lost, no sign of life for 1:00:00"


def test_a_time_in_the_future_is_no_sign_of_life(tmp_path: Path) -> None:
    assert state(make_run(tmp_path / "a", age=-7200)) == "silent, with a clock that is ahead"
