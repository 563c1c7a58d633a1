"""Arrays of commands, and the rules after a failure, with commands that need no training engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_synth.cluster import slurm
from megatron_synth.cluster.sbatch import JobSpec, changed, submit, submit_array
from megatron_synth.cluster.verdict import read_attempts
from megatron_synth.config.cluster import ClusterConfig
from megatron_synth.config.errors import UserError
from tests.slurm.conftest import job_environment
from tests.slurm.lab import Lab
from tests.support import ROOT

# fails, as a rank does, at the step that it is given
CRASH = (
    f"{sys.executable} -c 'import sys; from megatron_synth.core import exit_record; exit_record.at_step(int(sys.argv[1])); "
    'exit_record.report(1, ValueError("bad sample at " + sys.argv[2])); sys.exit(1)\' '
)


@pytest.fixture(autouse=True)
def inherited(two: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**job_environment(), **two.environment}.items():
        monkeypatch.setenv(name, value)


def finish(two: Lab, job: str, tasks: int) -> dict[str, slurm.JobState]:
    two.wait("the end of the array", lambda: not any(state.active for state in slurm.states([job]).values()))
    states = slurm.states([job])
    assert sorted(states) == sorted(f"{job}_{task}" for task in range(tasks))
    return states


def test_one_task_of_six_fails_and_the_others_are_unharmed(two: Lab, tmp_path: Path) -> None:
    commands = [f"echo $SLURMD_NODENAME > {tmp_path}/{task}.done" for task in range(6)]
    commands[2] = "exit 3"
    # the last task has the number of the whole array: signals and requeues must reach it alone
    commands[5] = f"[ -e {tmp_path}/came-back ] && touch {tmp_path}/5.done && exit 0; touch {tmp_path}/came-back; exit 75"
    spec = JobSpec("six", tmp_path / "job", tmp_path, cluster=ClusterConfig(max_restarts=1, cpus_per_rank=8))
    job = submit_array(spec, commands, limit=3)
    states = finish(two, job, 6)
    assert {name[-1]: (state.state, state.exit_code) for name, state in states.items()} == {
        task: ("FAILED", 3) if task == "2" else ("COMPLETED", 0) for task in "012345"
    }
    assert sorted(path.stem for path in tmp_path.glob("*.done")) == list("01345")
    assert [states[f"{job}_{task}"].restarts for task in range(6)] == [0, 0, 1, 0, 0, 1]
    assert "budget of 1 restarts" in (tmp_path / "job" / "task-2.log").read_text()


def test_a_command_of_several_programs_is_stopped_and_run_again(two: Lab, tmp_path: Path) -> None:
    saves = (
        f"{sys.executable} -c 'import pathlib, signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
        f'pathlib.Path("{tmp_path}/started").touch(); time.sleep(100)\''
    )
    job = submit_array(JobSpec("stop", tmp_path / "job", tmp_path), [f"[ -e {tmp_path}/started ] || {saves}"])
    two.wait("a program that listens", (tmp_path / "started").exists)
    two.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    [state] = finish(two, job, 1).values()
    assert (state.state, state.restarts) == ("COMPLETED", 1)


def test_a_crash_at_the_same_step_stops_the_job(two: Lab, tmp_path: Path) -> None:
    spec = JobSpec("loop", tmp_path / "job", tmp_path)
    job = submit_array(spec, [CRASH + "7 $(date +%N)"])
    [state] = finish(two, job, 1).values()
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 1, 1)
    log = (tmp_path / "job" / "task-0.log").read_text()
    assert "failed twice at step 7 with the same error; rank 0 on node" in log and "bad sample" in log
    ends = [line for line in read_attempts(tmp_path / "job", f"{job}_0") if line["event"] == "end"]
    assert [end["requeue"] for end in ends] == [True, False]


def test_a_refused_job_leaves_nothing(two: Lab, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="invalid partition"):
        submit_array(JobSpec("no", tmp_path / "job", tmp_path, cluster=changed(ClusterConfig(), partition="gold")), ["true"])
    assert list(tmp_path.iterdir()) == []


def test_states_of_unknown_jobs_are_absent(two: Lab) -> None:
    assert slurm.states(["999"]) == {} and slurm.states(["998", "999"]) == {} and slurm.states([]) == {}


def test_a_script_submitted_by_hand_and_a_wrong_configuration(two: Lab, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {steps: 1, stpes: 2}\n")
    script, exported = ROOT / "launch" / "train.sbatch", f"ALL,PYTHON={sys.executable},LAUNCH={ROOT / 'launch'}"
    options = ["--parsable", "--output", str(tmp_path / "log"), "--export", exported]
    job = two.run("sbatch", *options, str(script), "run.yaml", "--run-dir", "run", cwd=tmp_path).strip()
    two.wait("the end", lambda: not slurm.states([job])[job].active)
    state = slurm.states([job])[job]
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 2, 0)
    log = (tmp_path / "log").read_text()
    assert log.count("train.stpes: unknown key") == 2  # the rank's error and the verdict
    assert "only a user can fix this" in log and not (tmp_path / "run").exists()


def test_ranks_and_verdicts_run_inside_the_container(two: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # plays apptainer: takes its own arguments away and marks what runs inside
    programs = tmp_path / "bin"
    programs.mkdir()
    lines = ["#!/bin/bash", f'echo "$@" >> {tmp_path}/calls', 'while [ "$1" != image.sif ]; do shift; done; shift']
    (programs / "apptainer").write_text("\n".join([*lines, 'INSIDE=yes exec "$@"', ""]))
    (programs / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin")
    cluster = ClusterConfig.model_validate({"container": {"image": "image.sif", "runtime": "apptainer"}})
    command = ("bash", "-c", f"echo $INSIDE > {tmp_path}/$SLURMD_NODENAME.seen")
    job = submit(JobSpec("inside", tmp_path / "job", tmp_path, command=command, nodes=2, cluster=cluster))
    two.wait("the end", lambda: not slurm.states([job])[job].active)
    assert slurm.states([job])[job].state == "COMPLETED", (tmp_path / "job" / "job.log").read_text()
    assert {path.stem: path.read_text() for path in tmp_path.glob("*.seen")} == {"node1": "yes\n", "node2": "yes\n"}
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and sum("megatron_synth.cluster.verdict" in call for call in calls) == 2
    assert all(f"--bind {tmp_path}/job:{tmp_path}/job" in call for call in calls)
