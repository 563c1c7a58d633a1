"""The folder of a study, and how far each of its runs is.

    study.yaml            the study as it was submitted last, everything resolved
    runs/<run>/           a run directory, with result.json once the run is finished
    logs/<run>.log        what it printed
    state/<id>.json       its last failure, and how often it was tried
    state/<id>.lock       who trains it (core/lock.py)
    slurm/  report/       what `submit --slurm` and `report` write
    forecasts.jsonl       what `forecast` predicted, and when

A run is finished when result.json is there, which is written last, as a whole. A process that is killed leaves its lock,
which the next one takes over, and its checkpoints: the next submit goes on from there.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.lock import Held, Lock, holder
from megatron_synth.core.records import parse_json, read_bytes
from megatron_synth.study.execute import shapes
from megatron_synth.study.execute.shapes import Failure, Result
from megatron_synth.study.plan.runs import Run
from megatron_synth.train.record import metrics
from megatron_synth.train.record.shapes import LEDGER, RUN

RESULT = "result.json"
NO_FORECAST = "0" * 16
"""The digest before the first forecast."""
FORMAT_VERSION = 1
State = Literal["done", "running", "failed", "stopped", "to do"]
STATES: tuple[State, ...] = ("done", "running", "failed", "stopped", "to do")


@dataclass(frozen=True)
class Folder:
    """The folder of a study; nothing is made before `prepare`."""

    path: Path

    @property
    def study(self) -> Path:
        """The resolved study."""
        return self.path / "study.yaml"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    @property
    def slurm(self) -> Path:
        """Folder of what was submitted to SLURM."""
        return self.path / "slurm"

    @property
    def forecasts(self) -> Path:
        """What was forecast."""
        return self.path / "forecasts.jsonl"

    def last_forecast(self) -> str | None:
        """Digest of the last forecast that was written down, zeros where there is none; None if its line is damaged.

        Results of runs hold it, so that forecasts cannot be made, changed or taken out later without being seen.
        """
        try:
            line = read_bytes(self.forecasts).removesuffix(b"\n").rsplit(b"\n", 1)[-1]
            digest = parse_json(line)["digest"]
        except FileNotFoundError:
            return NO_FORECAST
        except (UserError, ValueError, TypeError, KeyError):
            return None if self.forecasts.exists() else NO_FORECAST
        return digest if isinstance(digest, str) else None

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            UserError: they cannot be made.
        """
        try:
            for name in ("runs", "logs", "state"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: the study's folder cannot be written ({error.strerror or error})") from error

    def run(self, run: Run) -> Path:
        """Directory of a run: the one whose name ends in its id, since arms and sizes may have been renamed."""
        wanted = self.path / "runs" / run.name
        if not wanted.is_dir():
            for found in (self.path / "runs").glob(f"*-{run.id}"):
                return found
        return wanted

    def log(self, run: Run) -> Path:
        """What a run printed."""
        return self.path / "logs" / f"{run.name}.log"

    def failure_file(self, run: Run) -> Path:
        """The last failure of a run."""
        return self.path / "state" / f"{run.id}.json"

    def lock_file(self, run: Run) -> Path:
        """Locked while a run is trained."""
        return self.path / "state" / f"{run.id}.lock"

    # ---- reading

    def result(self, run: Run) -> Result | None:
        """The result of a finished run; None while it is not finished.

        Raises:
            UserError: the file is damaged.
        """
        return shapes.RESULT.read_optional(self.run(run) / RESULT)

    def failure(self, run: Run) -> Failure | None:
        """The last failure; None if there is none. UserError if its record is damaged."""
        return shapes.FAILURE.read_optional(self.failure_file(run))

    def describe_failure(self, run: Run) -> str | None:
        """The last failure in a line, also if its record is damaged; None if there is none."""
        try:
            failure = self.failure(run)
        except UserError as error:
            return str(error).splitlines()[0]
        if failure is None:
            return None
        first_line = next(iter(failure["message"].splitlines()), "no message")
        return f"attempt {failure['attempts']}, {first_line}"

    def is_locked(self, run: Run) -> bool:
        """Whether a process trains the run now."""
        found = holder(self.lock_file(run))
        return found is not None and found.is_fresh(time.time())

    def state(self, run: Run) -> State:
        """How far a run is."""
        if (self.run(run) / RESULT).is_file():
            return "done"
        if self.is_locked(run):
            return "running"
        if self.failure_file(run).is_file():
            return "failed"
        return "stopped" if (self.run(run) / "run.json").is_file() else "to do"

    def steps_done(self, run: Run) -> int:
        """Steps that a run has recorded: the whole of them once it is finished."""
        if (self.run(run) / RESULT).is_file():
            return run.config.train.steps
        return last_step(self.run(run) / "metrics.jsonl")

    # ---- writing

    def record_failure(self, run: Run, exit_code: int, message: str) -> None:
        """Note a failed attempt."""
        try:
            before = self.failure(run)
        except UserError:  # damaged: this one replaces it
            before = None
        attempts = (before["attempts"] if before else 0) + 1
        content = {"attempts": attempts, "exit_code": exit_code, "message": message, "time": _now()}
        write_json(self.failure_file(run), {"run": run.name, **content})

    def clear_failure(self, run: Run) -> None:
        """Forget the failures of a run that is finished."""
        self.failure_file(run).unlink(missing_ok=True)

    @contextmanager
    def lock(self, run: Run) -> Iterator[bool]:
        """Hold the lock of a run; False when another process has it."""
        with ExitStack() as held:
            try:
                held.enter_context(Lock(self.lock_file(run), "study submit"))
            except Held:
                yield False
            else:
                yield True


def write_result(folder: Folder, run: Run, vocab_size: int, data_digest: str) -> None:
    """Write result.json of a run that has trained its last step.

    Raises:
        UserError: its records do not show that it has.
    """
    path = folder.run(run)
    records = metrics.read_metrics(path / "metrics.jsonl")
    last = records[-1] if records else {}
    if last.get(metrics.STEP) != run.config.train.steps or not metrics.has_eval(last):
        raise UserError(f"{path}/metrics.jsonl: no evaluation after step {run.config.train.steps}; the run is not finished")
    info, ledger = RUN.read(path / "run.json"), LEDGER.read(path / "ledger.json")
    seconds = sum(record[metrics.STEP_S] for record in records if record.get(metrics.STEP_S) is not None)
    content = {
        "format_version": FORMAT_VERSION,
        "id": run.id,
        "run": run.name,
        "seed": run.seed,
        "steps": run.config.train.steps,
        "tokens": ledger["tokens"],
        "parameters": run.parameters,
        "vocab_size": vocab_size,
        "flops": run.flops(vocab_size),
        "loss": _finite(metrics.parts(last, metrics.EVAL_DOMAIN_LOSS)),
        "bpb": _finite(metrics.parts(last, metrics.EVAL_DOMAIN_BPB)),
        "tokens_evaluated": metrics.parts(last, metrics.EVAL_DOMAIN_TOKENS),
        **_finite({"train_loss": last[metrics.LOSS]}),
        "skipped": last[metrics.SKIPPED],
        "sources": ledger["sources"],
        "train_seconds": seconds,
        "device": info["device"],
        "layout": info["layout"],
        "world_size": info["world_size"],
        "git": info["git"],
        "versions": info["versions"],
        "data_digest": data_digest,
        "finished": _now(),
        "last_forecast": folder.last_forecast(),
    }
    write_json(path / RESULT, content)
    folder.clear_failure(run)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with None for what is not finite: JSON has no such numbers."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def last_step(path: Path, tail: int = 65536) -> int:
    """Step of the last whole record of a metrics.jsonl, read from its end; 0 if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    for line in reversed(lines[:-1]):
        try:
            return int(metrics.decode(line)[metrics.STEP])
        except ValueError:
            continue
    return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
