"""Where runs stand: their directories and SLURM, put together."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_synth.cluster.progress import Job, job_folders, jobs_of, last_records, tail
from megatron_synth.cluster.slurm import JobState
from megatron_synth.cluster.verdict import Attempt, read_attempts
from megatron_synth.config.errors import UserError
from megatron_synth.core.log import duration, human
from megatron_synth.train.checkpoint import branch
from megatron_synth.train.record import metrics, nodes
from megatron_synth.train.record.goodput import Goodput, goodput
from megatron_synth.train.record.run_dir import JOBS, RunDir, read_config
from megatron_synth.train.record.run_lock import user_of

_RECENT = 20
"""Steps over whose median rates are taken."""
_SILENT_STEPS, _SILENT_S = 10, 120.0
"""A run outside SLURM that wrote nothing for so long, in steps and in seconds, is not called running."""
_END = re.compile(r"^\S+ (done|stopped on request.*|failed|interrupted) at step ")
_START = re.compile(r"^\S+ start [0-9]+ of run ")


@dataclass(frozen=True)
class RunStatus:
    """A run at a moment."""

    run: Path
    job: str | None
    """The newest job, or None for a run that was not submitted."""
    state: str
    """pending, starting, running, done, stopped, failed, interrupted, killed, cancelled, ended by SLURM, lost, silent or
    damaged; and why."""
    step: int
    steps: int
    loss: float | None
    tokens_per_s_per_gpu: float | None
    eta_s: float | None
    """Seconds of training that are left; None if the run does not go on, or its speed is not known."""
    restarts: int
    event: str
    """The newest line of events.log, or of the job's history if that is newer."""
    productive: float | None = None
    """Part of its time so far that went into steps that it kept; None: it is not known."""
    trunk: str | None = None
    """Of a branch: `RUN@STEP` that it began from."""
    slow_node: str | None = None
    """Which node is slower than the others, in words; None: there is one alone, or none is."""


def is_run(path: Path) -> bool:
    """Whether `path` holds a run, or one that has been submitted."""
    return (path / "run.json").is_file() or bool(job_folders(path))


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories: those named, and those directly inside folders that are named.

    UserError for a path that is neither.
    """
    found: list[Path] = []
    for path in paths:
        inside = [] if is_run(path) or not path.is_dir() else sorted(entry for entry in path.iterdir() if is_run(entry))
        if not is_run(path) and not inside:
            raise UserError(f"{path}: neither a run directory nor a folder of some")
        found += inside or [path]
    return found


def status(run: Path, states: Mapping[str, JobState], now: float | None = None) -> RunStatus:
    """The state of a run; one whose records are damaged is in the state `damaged`, with the fault as its event.

    Args:
        run: its directory.
        states: of its jobs, as far as SLURM knows them.
        now: the time, for tests.
    """
    now = time.time() if now is None else now
    try:
        return _status(run, states, now)
    except UserError as error:
        return _damaged(run, str(error))
    except OSError as error:
        return _damaged(run, f"{error.filename or run}: cannot be read ({error.strerror or error})")


def _damaged(run: Path, fault: str) -> RunStatus:
    lines = " | ".join(line.strip() for line in fault.splitlines())
    return RunStatus(run, None, "damaged", 0, 0, None, None, None, 0, lines.removeprefix(f"{run}/"))


def _status(run: Path, states: Mapping[str, JobState], now: float) -> RunStatus:
    jobs = jobs_of(run)
    job = jobs[-1] if jobs else None
    records = last_records(run)[-_RECENT:]
    steps = _steps(run, job)
    step = int(records[-1][metrics.STEP]) if records else 0
    step_s = _median(records, metrics.STEP_S)
    attempts = read_attempts(job.folder, job.id) if job is not None and job.id is not None else []
    slurm = states.get(job.id or "") if job is not None else None
    state, goes_on = _state(run, slurm, attempts, step, steps, step_s, now)
    starts = len(RunDir.open(run).info["starts"]) if (run / "run.json").is_file() else 0
    begun = sum(line["event"] == "begin" for line in attempts)
    return RunStatus(
        run=run,
        job=None if job is None else job.id,
        state=state,
        step=step,
        steps=steps,
        loss=records[-1].get(metrics.LOSS) if records else None,
        tokens_per_s_per_gpu=_median(records, metrics.TOKENS_PER_SEC),
        eta_s=max(steps - step, 0) * step_s if goes_on and step_s is not None else None,
        restarts=max(starts, begun, 1) - 1,
        event=_last_event(run, attempts),
        productive=None if (found := goodput_of(run)) is None else found.share,
        trunk=None if (trunk := branch.kept(run)) is None else trunk.name.rpartition("/")[2],
        slow_node=nodes.slowest(nodes.read_nodes(run)),
    )


def goodput_of(run: Path) -> Goodput | None:
    """Where the time of a run went, the queue's included where it has jobs; None: its version noted no times.

    Raises:
        UserError: a record is damaged.
    """
    if not (run / "run.json").is_file():
        return None
    jobs = [job for job in jobs_of(run) if job.id is not None]
    lines = [line for job in jobs for line in read_attempts(job.folder, job.id or "") if line["event"] == "begin"]
    return goodput(run, sorted(line["time"] for line in lines))


def _median(records: Sequence[metrics.Record], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return statistics.median(values) if values else None


def _state(
    run: Path,
    slurm: JobState | None,
    attempts: Sequence[Attempt],
    step: int,
    steps: int,
    step_s: float | None,
    now: float,
) -> tuple[str, bool]:
    """The state in words, and whether the run goes on by itself."""
    if slurm is not None and slurm.active:
        if slurm.state != "RUNNING":
            return slurm.state.lower() + (f" ({slurm.reason})" if slurm.reason not in ("", "None") else ""), True
        began = next((line["time"] for line in reversed(attempts) if line["event"] == "begin"), now)
        return ("running" if _written(run) > began else "starting"), True
    user = user_of(run)
    if user is not None and user.is_fresh(now):
        return "running", True
    ended = _own_end(run)
    if step >= steps > 0 and " done at step " in ended:
        return "done", False
    end = next((line for line in reversed(attempts) if line["event"] == "end"), None)
    if slurm is not None or attempts:
        if slurm is not None and slurm.state not in ("FAILED", "COMPLETED"):
            return slurm.state.lower().replace("_", " "), False
        if end is not None:
            return ("stopped" if end["end"]["kind"] == "stopped" else "failed"), False
        if attempts and attempts[-1]["event"] == "ended":
            return "ended by SLURM", False
        if slurm is not None:  # it died before its script began: a prolog, a log that could not be opened
            known = slurm.reason not in ("", "None")
            return slurm.state.lower() + (f" ({slurm.reason})" if known else " before its script began"), False
        return "lost", False  # SLURM has forgotten the job, and it never said how it ended
    if ended:
        word = ended.split()[1]
        return ("stopped" if word == "done" else word), False  # done, and then asked for more steps
    if user is not None:
        return ("killed" if user.lives is False else f"lost, no sign of life for {duration(now - user.touched)}"), False
    # written by a version that kept no lock
    silence = now - _written(run)
    if -_SILENT_S < silence < max(_SILENT_S, _SILENT_STEPS * (step_s or 0)):
        return "running", True
    return (f"silent for {duration(silence)}" if silence > 0 else "silent, with a clock that is ahead"), False


def _own_end(run: Path) -> str:
    """The line of events.log in which the newest start told how it ended; empty if it has not."""
    for line in reversed(tail(run / "events.log")):
        if _END.search(line):
            return line
        if _START.search(line):
            break
    return ""


def _written(run: Path) -> float:
    files = [file for file in (run / "metrics.jsonl", run / "run.json") if file.is_file()]
    return max((file.stat().st_mtime for file in files), default=0.0)


def _steps(run: Path, job: Job | None) -> int:
    for file in (run / "config.yaml", *([job.folder / "config.yaml"] if job is not None else [])):
        if file.is_file():
            return read_config(file)["train"]["steps"]
    return 0


def _last_event(run: Path, attempts: Sequence[Attempt]) -> str:
    lines = tail(run / "events.log")
    if lines:
        return lines[-1].partition(" ")[2]
    why = [line["why"] for line in attempts if line["event"] == "end"]
    return why[-1] if why else ""


def rows(found: Sequence[RunStatus], width: int) -> list[tuple[str, ...]]:
    """Cells of a table, its head first; the last column is cut so that a line has `width` characters at most."""
    table = [("run", "job", "state", "step", "loss", "tokens/s/rank", "ETA", "productive", "restarts", "last event")]
    for one in found:
        share = f" {100 * one.step // one.steps:3d}%" if one.steps else ""
        table.append(
            (
                one.run.name if one.trunk is None else f"{one.run.name} (branch of {one.trunk})",
                one.job or "-",
                one.state,
                f"{one.step:,}/{one.steps:,}{share}",
                "-" if one.loss is None else f"{one.loss:.4f}",
                "-" if one.tokens_per_s_per_gpu is None else human(one.tokens_per_s_per_gpu),
                "-" if one.eta_s is None else duration(one.eta_s),
                "-" if one.productive is None else f"{100 * one.productive:.0f}%",
                str(one.restarts),
                one.event,
            )
        )
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]) - 1)]
    left = max(12, width - sum(widths) - 2 * len(table[0]))
    return [(*row[:-1], row[-1] if len(row[-1]) <= left else row[-1][: left - 3] + "...") for row in table]


def newest_job(run: Path) -> Job:
    """The newest job of a run. UserError if it has none, or its records are damaged."""
    jobs = jobs_of(run)
    if not jobs:
        raise UserError(f"{run}: no job was submitted for this run (no {JOBS}/ in it); its log is where it was started")
    return jobs[-1]
