"""SLURM's commands, and the states of jobs from whichever of them still knows."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_synth.config.errors import UserError

TIMEOUT_S = 60
_TRIES = 3
ACTIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STAGE_OUT", "SIGNALING"})
"""States of a job that will go on by itself."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job, or of one task of an array."""

    state: str
    """Such as PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL."""
    reason: str = ""
    """Why it waits; empty if it does not."""
    restarts: int | None = None
    """How often it was requeued; None if this is not known."""
    nodes: str = ""
    """Its nodes, such as `node[1-4]`; empty before it runs."""
    exit_code: int | None = None
    """Exit code of the batch script; None before it ends, or if this is not known."""

    @property
    def active(self) -> bool:
        """Whether it runs, or will."""
        return self.state in ACTIVE


def client(command: Sequence[str], *, stdin: str | None = None, unless: str | None = None) -> str:
    """Standard output of a client command of Slurm; empty if it fails with the words `unless`.

    Raises:
        UserError: Slurm is not there, does not answer, or refuses; with its own words.
    """
    result = _run(command, stdin)
    if result.returncode and unless is not None and unless in result.stderr:
        return ""
    if result.returncode:
        raise UserError(f"{command[0]}: {_words(result) or f'exit code {result.returncode}'}")
    return result.stdout


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """States by job: `17`, or `17_0`, `17_1`, ... for the tasks of an array when `17` is one.

    squeue knows jobs until some minutes after their end, sacct later ones too where accounting is on. Jobs that neither
    knows are absent from the result. UserError if SLURM cannot be asked at all.
    """
    wanted = list(dict.fromkeys(jobs))
    if not wanted:
        return {}
    found = _squeue(wanted)
    known = {name.partition("_")[0] for name in found}
    gone = [job for job in wanted if job.partition("_")[0] not in known]
    if gone and shutil.which("sacct") is not None:
        found |= _sacct(gone)
    return found


def available() -> bool:
    """Whether this machine can speak to a SLURM at all."""
    return shutil.which("squeue") is not None


def test(script: str) -> str:
    """Whether SLURM could ever run a batch script, and when it would: its own words. UserError if it could not."""
    result = _run(["sbatch", "--test-only"], script)
    if result.returncode:
        raise UserError(f"sbatch refuses this job: {_words(result)}")
    return _words(result).removeprefix("sbatch: ")


def cancel(job: str) -> None:
    """Cancel a job or an array's task; one that has ended is left as it is."""
    client(["scancel", job])


def _run(command: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: not found; this needs a machine from which SLURM jobs are submitted")
    # a controller under load hangs up on clients, which then die of SIGPIPE; a question may be asked again
    tries = _TRIES if command[0] in ("squeue", "sacct") else 1
    try:
        for _ in range(tries):
            result = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S)
            if result.returncode != -signal.SIGPIPE:
                break
        return result
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]}: no answer from SLURM within {TIMEOUT_S} s; look at `scontrol ping`") from error


def _words(result: subprocess.CompletedProcess[str]) -> str:
    return " | ".join(line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip())


def _squeue(jobs: list[str]) -> dict[str, JobState]:
    # one request for all jobs; squeue fails for a single job that it does not know, and leaves unknown ones of several out
    form = "JobArrayID:.64,State:.32,RestartCnt:.12,exit_code:.12,NodeList:.256,ReasonList:.256"
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", f"--Format={form}"]
    widths = [int(field.partition(":.")[2]) for field in form.split(",")]
    result: dict[str, JobState] = {}
    for line in client(command, unless="Invalid job id").splitlines():
        cells, place = [], 0
        for width in widths:
            cells.append(line[place : place + width].strip())
            place += width
        job, state, restarts, code, nodes, reason = cells
        if not job:
            continue
        running = state in ACTIVE
        result[job] = JobState(
            state=state,
            # squeue shows the nodes themselves as the reason of a job that has some
            reason=reason.strip("()") if state == "PENDING" or reason.startswith("(") else "",
            restarts=int(restarts) if restarts.isdecimal() else None,
            nodes=nodes,
            exit_code=None if running or not code.isdecimal() else _exit_code(int(code)),
        )
    return result


def _exit_code(status: int) -> int:
    return status >> 8 if status >> 8 else (128 + status if status else 0)


def _sacct(jobs: list[str]) -> dict[str, JobState]:
    form = "--format=JobID,State,ExitCode,NodeList"
    lines = client(
        ["sacct", "-n", "-P", "-X", form, "-j", ",".join(jobs)], unless="accounting storage is disabled"
    ).splitlines()
    result = {}
    for cells in (line.split("|") for line in lines):
        if len(cells) == 4 and cells[1]:
            code, _, signal = cells[2].partition(":")
            status = int(code) or (128 + int(signal) if signal.isdecimal() and int(signal) else 0)
            # "CANCELLED by 1000"
            result[cells[0]] = JobState(state=cells[1].split()[0], nodes=cells[3], exit_code=status)
    return result
