"""Where a run stands, read from its directory and the folders of its jobs while others write there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from pydantic import with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import open_regular
from megatron_synth.core.records import OPEN, Reader, read_text
from megatron_synth.train.record import metrics
from megatron_synth.train.record.run_dir import JOBS

_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Job:
    """What a job's folder says of it."""

    folder: Path
    id: str | None
    """None before it is in the queue."""
    run_dir: Path | None
    """None for a job that trains no single run."""


@with_config(OPEN)
class JobInfo(TypedDict):
    """job.json, as far as it is read."""

    run_dir: NotRequired[str | None]


JOB: Reader[JobInfo] = Reader(JobInfo, "restore it from a copy, or remove the job's folder once the job has ended")
_MAX_ID = 128


def read_job(folder: Path) -> Job:
    """The job in `folder`; all that is not known is None. UserError if its records are damaged."""
    info = JOB.read_optional(folder / "job.json") or {}
    file = folder / "job.id"
    number = read_text(file, _MAX_ID).strip() if file.is_file() else ""
    if number and not re.fullmatch(r"[0-9]+", number):
        raise UserError(f"{file}: damaged: expected the number of a job, found {number!a}")
    run_dir = info.get("run_dir")
    if run_dir is not None and not (run_dir.isprintable() and Path(run_dir).is_absolute()):
        raise UserError(f"{folder / 'job.json'}: damaged: run_dir: expected an absolute path, found {run_dir!a:.60}")
    return Job(folder, number or None, Path(run_dir) if run_dir else None)


def job_folders(run_dir: Path) -> list[Path]:
    """Folders of the jobs that were submitted for a run, oldest first."""
    return sorted(path for path in (run_dir / JOBS).glob("*") if (path / "job.id").is_file())


def jobs_of(run_dir: Path) -> list[Job]:
    """The jobs that were submitted for a run, oldest first."""
    return [read_job(folder) for folder in job_folders(run_dir)]


def tail(file: Path, size: int = _TAIL_BYTES) -> list[str]:
    """The last whole lines of a file, of at most `size` bytes in all; empty if there is no file."""
    return _tail(file, size)[0].decode("utf-8", errors="replace").split("\n")[:-1]


def _tail(file: Path, size: int) -> tuple[bytes, int]:
    """The last whole lines of a file, and the place where they begin."""
    try:
        with os.fdopen(open_regular(file), "rb") as stream:
            length = stream.seek(0, 2)
            begin = max(0, length - size)
            stream.seek(begin)
            content = stream.read(size)
    except FileNotFoundError:
        return b"", 0
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    if begin:  # amid a line
        cut = content.find(b"\n") + 1
        begin, content = begin + cut, content[cut:]
    return content[: content.rfind(b"\n") + 1], begin  # what follows the last line break is not whole yet


def last_records(run_dir: Path) -> list[metrics.Record]:
    """The newest step records of a run, as many as are at hand; oldest first. UserError if one is damaged."""
    file = run_dir / "metrics.jsonl"
    content, begin = _tail(file, _TAIL_BYTES)
    try:
        return metrics.decode_lines(file, content)
    except UserError:
        # only now is the number of the line worth a look at the whole file
        return metrics.decode_lines(file, content, _lines_before(file, begin))


def _lines_before(file: Path, place: int) -> int:
    with file.open("rb") as stream:
        return stream.read(place).count(b"\n")


def last_record(run_dir: Path) -> metrics.Record | None:
    """The newest step record of a run; None before the first. UserError if it is damaged."""
    records = last_records(run_dir)
    return records[-1] if records else None
