"""What follows the end of a job's step: done, back into the queue, or stopped for good. Called by launch/job.sh.

    python -m megatron_synth.cluster.verdict begin|end|ended --job ID --restart N --job-dir DIR ...

The facts are what ranks left behind (core/exit_record.py), the step's exit code, and the run's progress; the history is kept in
DIR/attempts/ID.jsonl. `end` prints its decision as the last line, `requeue` or `exit CODE`, and why on standard error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.cluster.progress import last_record, read_job
from megatron_synth.config.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from megatron_synth.core.files import append_line
from megatron_synth.core.log import show
from megatron_synth.core.records import OPEN, Amount, Count, Reader, Whole, read_bytes

SAME_ERROR_LIMIT = 2
"""Failures in a row at one step with one error after which a job stops."""
UNEXPLAINED_LIMIT = 3
"""The same where no rank could say why: killed, or only cut off from another. A lost node looks like this, too."""
NO_PROGRESS_LIMIT = 3
"""Stops on request in a row without a single step, such as under a time limit shorter than the start."""

_LOST_CONTACT = re.compile(r"connection (closed|reset|refused)|broken pipe|socket|NCCL|gloo|timed? ?out|peer", re.IGNORECASE)

Kind = Literal["done", "stopped", "refused", "failed"]


@dataclass(frozen=True)
class Report:
    """What a rank said of its end."""

    time: float
    rank: int
    host: str
    code: int
    step: int | None
    error: str | None
    message: str
    where: str | None

    @property
    def lost_contact(self) -> bool:
        """Whether it only tells that another rank was gone."""
        return self.error is not None and bool(_LOST_CONTACT.search(f"{self.error} {self.message}"))

    @property
    def signature(self) -> str:
        """What stays the same when the same thing happens again: no numbers, ports, addresses."""
        first = self.message.strip().splitlines()[0] if self.message.strip() else ""
        return re.sub(r"0x[0-9a-f]+|\d+", "#", f"{self.error} at {self.where}: {first}")

    def describe(self) -> str:
        """One line for people."""
        words = " | ".join(line.strip() for line in self.message.strip().splitlines()) or "no message"
        where = f" ({self.where})" if self.where else ""
        return f"rank {self.rank} on {self.host}: {self.error}: {words[:500]}{where}"


@dataclass(frozen=True)
class End:
    """How one start of a job ended."""

    kind: Kind
    code: int
    began: int
    """Steps of the run when it began; 0 where nothing is known."""
    step: int
    """Steps of the run at its end."""
    signature: str = ""
    """Of a failure; equal for the same failure."""
    explained: bool = True
    """Whether a rank gave a reason of its own."""
    why: str = ""
    """For people."""


@dataclass(frozen=True)
class Decision:
    """What to do."""

    requeue: bool
    code: int
    why: str


def classify(reports: Sequence[Report], code: int, *, stopping: bool, began: int, step: int) -> End:
    """What happened, from the ranks' reports and the exit code of the step.

    Args:
        reports: of this start; any number, also none.
        code: exit code of srun: of ranks what cluster/agent.py makes of theirs.
        stopping: a stop was asked for.
        began: steps of the run when the job began.
        step: steps in the run's record now.
    """
    failures = sorted((r for r in reports if r.code not in (EXIT_OK, EXIT_STOPPED)), key=lambda r: (r.lost_contact, r.time))
    if failures:
        first = failures[0]
        at = max(step, first.step or 0)
        kind: Kind = "refused" if first.code == EXIT_USER_ERROR else "failed"
        return End(kind, code, began, at, first.signature, not first.lost_contact, first.describe())
    codes = {report.code for report in reports}
    if EXIT_STOPPED in codes or (not codes and (code == EXIT_STOPPED or (stopping and code != EXIT_OK))):
        return End("stopped", code, began, step, why="stopped on request")
    if EXIT_OK in codes or code == EXIT_OK:
        return End("done", EXIT_OK, began, step, why="done")
    if code == EXIT_USER_ERROR:
        return End("refused", code, began, step, why="wrong configuration or input, see the log")
    why = f"exit code {code}, and no rank said why (killed, out of memory, node lost)"
    return End("failed", code, began, step, "no rank said why", False, why)


def decide(end: End, earlier: Sequence[End], max_restarts: int) -> Decision:
    """Whether a job goes back into the queue.

    Args:
        end: how this start ended.
        earlier: how those before it ended, oldest first.
        max_restarts: restarts after failures that are allowed.
    """
    if end.kind == "done":
        return Decision(False, EXIT_OK, "done")
    if end.kind == "refused":
        return Decision(False, EXIT_USER_ERROR, f"not started again, since only a user can fix this: {end.why}")
    row = [end]
    for past in reversed(earlier):
        if past.kind != end.kind or (end.kind == "failed" and (past.signature, past.step) != (end.signature, end.step)):
            break
        row.append(past)
    if end.kind == "stopped":
        idle = next((place for place, past in enumerate(row) if past.step > past.began), len(row))
        if idle >= NO_PROGRESS_LIMIT:
            advice = "the time limit must cover the start, a step and a save: ask for more --time, or a shorter stop_lead_s"
            return Decision(False, EXIT_STOPPED, f"stopped {idle} times in a row without finishing a step; {advice}")
        return Decision(True, EXIT_STOPPED, "stopped on request, to be resumed")
    code = end.code if end.code not in (EXIT_OK, EXIT_STOPPED) else 1
    if len(row) >= (SAME_ERROR_LIMIT if end.explained else UNEXPLAINED_LIMIT):
        times = "twice" if len(row) == 2 else f"{len(row)} times"
        return Decision(False, code, f"failed {times} at step {end.step} with the same error; {end.why}")
    failed = sum(past.kind == "failed" for past in earlier)
    if failed >= max_restarts:
        return Decision(False, code, f"the budget of {max_restarts} restarts after failures is used up; {end.why}")
    return Decision(True, code, f"failed at step {end.step}, restart {failed + 1} of {max_restarts}; {end.why}")


def read_reports(folder: Path) -> list[Report]:
    """What the ranks of one start left; a line that a crash cut short, or that says nothing of this kind, is left out."""
    reports = []
    for file in sorted(folder.glob("node-*.jsonl")):
        for line in read_bytes(file).splitlines():
            try:
                reports.append(_REPORT.validate_json(line, strict=True))
            except ValidationError:
                continue
    return reports


@with_config(OPEN)
class EndInfo(TypedDict):
    """An `End` in a job's history."""

    kind: Kind
    code: Whole
    began: Count
    step: Count
    signature: str
    explained: bool
    why: str


@with_config(OPEN)
class Attempt(TypedDict):
    """A line of a job's history."""

    event: Literal["begin", "end", "ended"]
    time: Amount
    restart: Count
    step: Count
    nodes: NotRequired[str]
    end: NotRequired[EndInfo]
    why: NotRequired[str]


ATTEMPT: Reader[Attempt] = Reader(Attempt, "delete the line, or submit the run again from another folder")
_REPORT = TypeAdapter(Report)


def read_attempts(job_dir: Path, job: str) -> list[Attempt]:
    """The lines of a job's history, oldest first: `begin` and `end` of every start. UserError if one is damaged."""
    file = job_dir / "attempts" / f"{job}.jsonl"
    lines = ATTEMPT.read_lines(file)
    for number, line in enumerate(lines, start=1):
        if line["event"] == "end" and not ("end" in line and "why" in line):
            raise UserError(f"{file}, line {number}: damaged: an end that does not say how; {ATTEMPT.remedy}")
    return lines


def _end(info: EndInfo) -> End:
    return End(
        kind=info["kind"],
        code=info["code"],
        began=info["began"],
        step=info["step"],
        signature=info["signature"],
        explained=info["explained"],
        why=info["why"],
    )


def main(argv: list[str] | None = None) -> int:
    """Record the begin of a start, or record and judge its end."""
    try:
        return _main(argv)
    except (UserError, OSError) as error:  # a record is damaged: no restart without a decision
        show(f"error: {error}", error=True)
        return EXIT_USER_ERROR


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="verdict")
    parser.add_argument("event", choices=("begin", "end", "ended"))
    parser.add_argument("--job", required=True)
    parser.add_argument("--restart", type=int, required=True)
    parser.add_argument("--job-dir", type=Path, required=True)
    parser.add_argument("--nodes", default="")
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--stopping", action="store_true")
    parser.add_argument("--max-restarts", type=int, required=True)
    options = parser.parse_args(argv)
    job_dir: Path = options.job_dir
    run_dir = read_job(job_dir).run_dir
    history = read_attempts(job_dir, options.job)
    record = last_record(run_dir) if run_dir is not None else None
    # a task without a run says itself how far it is, when it ends
    step = max((entry["step"] for entry in history), default=0) if run_dir is None else 0
    if record is not None:
        step = int(record["step"])
    line: dict[str, Any] = {"event": options.event, "time": time.time(), "restart": options.restart, "step": step}
    if options.event == "begin":
        _append(job_dir, options.job, line | {"nodes": options.nodes})
        return EXIT_OK
    if options.event == "ended":
        _append(job_dir, options.job, line)
        _tell(run_dir, f"job {options.job}: ended by Slurm (canceled, preempted or a node lost)")
        return EXIT_OK
    outcomes = job_dir / "outcomes" / f"{options.job}.{options.restart}"
    reports = read_reports(outcomes)
    if run_dir is None:
        line["step"] = step = max([step, *(report.step for report in reports if report.step is not None)])
    began = next((entry["step"] for entry in reversed(history) if entry["event"] == "begin"), 0)
    stopping = options.stopping or any(outcomes.glob("stopped-*"))
    code = options.code or (EXIT_STOPPED if any(outcomes.glob("stopped-*")) else EXIT_OK)
    end = classify(reports, code, stopping=stopping, began=began, step=step)
    earlier = [_end(entry["end"]) for entry in history if "end" in entry]
    decision = decide(end, earlier, options.max_restarts)
    _append(job_dir, options.job, line | {"end": asdict(end), "requeue": decision.requeue, "why": decision.why})
    if end.kind != "done":
        _tell(run_dir, f"job {options.job}: {'requeued' if decision.requeue else 'stopped for good'}: {decision.why}")
    print("requeue" if decision.requeue else f"exit {decision.code}", flush=True)
    return EXIT_OK


def _tell(run_dir: Path | None, text: str) -> None:
    show(text, error=True)
    if run_dir is not None and (run_dir / "run.json").is_file():
        from megatron_synth.train.record.run_dir import RunDir

        RunDir.open(run_dir).event(text)


def _append(job_dir: Path, job: str, line: dict[str, Any]) -> None:
    folder = job_dir / "attempts"
    folder.mkdir(exist_ok=True)
    append_line(folder / f"{job}.jsonl", json.dumps(line))


if __name__ == "__main__":
    sys.exit(main())
