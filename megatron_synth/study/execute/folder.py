"""The folder of a study, and how far each of its runs is.

    study.yaml            the study as it was submitted last, everything resolved
    runs/<run>/           a run directory, with result.json once the run is finished
    corpora/<corpus>/     a source that the study makes (making.py), with corpus.json once it is finished
    logs/<run>.log        what it printed
    state/<id>.json       its last failure, and how often it was tried
    state/<id>.lock       who trains it (core/lock.py)
    slurm/  report/       what `submit --slurm` and `report` write
    forecasts.jsonl       what `forecast` predicted, and when

A run is finished when result.json is there, a corpus when corpus.json is, which is written last, as a whole. A process that is
killed leaves its lock, which the next one takes over, and its checkpoints or answers: the next submit goes on from there.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config
from megatron_synth.core.files import open_regular, write_json
from megatron_synth.core.lock import Held, Lock, holder
from megatron_synth.core.records import parse_json, read_bytes
from megatron_synth.study.execute import shapes
from megatron_synth.study.execute.shapes import CorpusResult, Failure, Result
from megatron_synth.study.plan.corpora import Corpus
from megatron_synth.study.plan.runs import Run
from megatron_synth.train.checkpoint import files
from megatron_synth.train.record import metrics
from megatron_synth.train.record.shapes import LEDGER, RUN

RESULT = "result.json"
CORPUS = "corpus.json"
Job = Run | Corpus
"""What is executed: a run is trained, a corpus is made."""
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

    def log(self, job: Job) -> Path:
        """What a job printed."""
        return self.path / "logs" / f"{job.name}.log"

    def failure_file(self, job: Job) -> Path:
        """The last failure of a job."""
        return self.path / "state" / f"{job.id}.json"

    def lock_file(self, job: Job) -> Path:
        """Locked while somebody works at a job."""
        return self.path / "state" / f"{job.id}.lock"

    # ---- reading

    def result(self, run: Run) -> Result | None:
        """The result of a finished run; None while it is not finished.

        Raises:
            UserError: the file is damaged.
        """
        return shapes.RESULT.read_optional(self.run(run) / RESULT)

    def corpus(self, corpus: Corpus) -> CorpusResult | None:
        """What was made of a corpus; None while it is not finished.

        Raises:
            UserError: the file is damaged.
        """
        return shapes.CORPUS.read_optional(corpus.folder / CORPUS)

    def finished_file(self, job: Job) -> Path:
        """The file that is there when a job is done."""
        return job.folder / CORPUS if isinstance(job, Corpus) else self.run(job) / RESULT

    def is_done(self, job: Job) -> bool:
        """Whether a job is finished."""
        return self.finished_file(job).is_file()

    def failure(self, job: Job) -> Failure | None:
        """The last failure; None if there is none. UserError if its record is damaged."""
        return shapes.FAILURE.read_optional(self.failure_file(job))

    def describe_failure(self, job: Job) -> str | None:
        """The last failure in a line, also if its record is damaged; None if there is none."""
        try:
            failure = self.failure(job)
        except UserError as error:
            return str(error).splitlines()[0]
        if failure is None:
            return None
        first_line = next(iter(failure["message"].splitlines()), "no message")
        return f"attempt {failure['attempts']}, {first_line}"

    def is_locked(self, job: Job) -> bool:
        """Whether a process works at the job now."""
        found = holder(self.lock_file(job))
        return found is not None and found.is_fresh(time.time())

    def state(self, job: Job) -> State:
        """How far a job is."""
        if self.is_done(job):
            return "done"
        if self.is_locked(job):
            return "running"
        if self.failure_file(job).is_file():
            return "failed"
        begun = job.folder / "text" if isinstance(job, Corpus) else self.run(job) / "run.json"
        return "stopped" if begun.exists() else "to do"

    def steps_done(self, run: Run) -> int:
        """Steps that a run has recorded, those of its trunk included: the whole of them once it is finished."""
        if (self.run(run) / RESULT).is_file():
            return run.config.train.steps
        return max(last_step(self.run(run) / "metrics.jsonl"), run.branch_step)

    # ---- trunks and branches

    def of_id(self, id: str) -> Path | None:
        """Directory of the run with an id, if it has begun."""
        return next((self.path / "runs").glob(f"*-{id}"), None)

    def begins(self, run: Run) -> Config:
        """The configuration that a run is trained with: of a branch, with the place of its trunk.

        Raises:
            UserError: the trunk has not begun.
        """
        if not run.branch_step:
            return run.config
        trunk = self.of_id(run.trunk)
        if trunk is None:
            raise UserError(f"{run.name}: its trunk, run {run.trunk}, has not begun; submit that first")
        checkpoint = run.config.checkpoint.model_copy(update={"branch_from": f"{trunk}@{run.branch_step}"})
        return run.config.model_copy(update={"checkpoint": checkpoint})

    def may_begin(self, run: Run) -> bool:
        """Whether a run depends on no trunk that has yet to come to the step it branches from."""
        if not run.branch_step or files.all_of(self.run(run) / "checkpoints"):
            return True
        trunk = self.of_id(run.trunk)
        return trunk is not None and (trunk / "checkpoints" / files.name_of(run.branch_step)).is_dir()

    def drop_checkpoints(self, run: Run) -> None:
        """Remove the checkpoints of a finished run; those of a trunk when the last of its branches is finished."""
        if run.id != run.trunk:
            shutil.rmtree(self.run(run) / "checkpoints", ignore_errors=True)
        family = [self.of_id(id) for id in run.family]
        if family and all(path is not None and (path / RESULT).is_file() for path in family):
            assert family[0] is not None
            shutil.rmtree(family[0] / "checkpoints", ignore_errors=True)

    # ---- writing

    def record_failure(self, job: Job, exit_code: int, message: str) -> None:
        """Note a failed attempt."""
        try:
            before = self.failure(job)
        except UserError:  # damaged: this one replaces it
            before = None
        attempts = (before["attempts"] if before else 0) + 1
        content = {"attempts": attempts, "exit_code": exit_code, "message": message, "time": _now()}
        write_json(self.failure_file(job), {"run": job.name, **content})

    def clear_failure(self, job: Job) -> None:
        """Forget the failures of a job that is finished."""
        self.failure_file(job).unlink(missing_ok=True)

    @contextmanager
    def lock(self, job: Job) -> Iterator[bool]:
        """Hold the lock of a job; False when another process has it."""
        with ExitStack() as held:
            try:
                held.enter_context(Lock(self.lock_file(job), "study submit"))
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
        **({"trunk": run.trunk} if run.trunk else {}),
        "finished": _now(),
        "last_forecast": folder.last_forecast(),
    }
    write_json(path / RESULT, content)
    folder.clear_failure(run)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with None for what is not finite: JSON has no such numbers."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def last_step(path: Path, tail: int = 65536) -> int:
    """Step of the last whole record of a metrics.jsonl, read from its end; 0 if there is none, or nobody can read it."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines[:-1]):
        try:
            return int(metrics.decode(line)[metrics.STEP])
        except ValueError:
            continue
    return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
