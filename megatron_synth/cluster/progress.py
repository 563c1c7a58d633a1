"""Where a run stands, read from its directory and the folders of its jobs while others write there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def read_job(folder: Path) -> Job:
    """The job in `folder`; all that is not known is None."""
    info: dict[str, Any] = {}
    if (folder / "job.json").is_file():
        info = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    number = (folder / "job.id").read_text().strip() if (folder / "job.id").is_file() else None
    run_dir = info.get("run_dir")
    return Job(folder, number or None, Path(run_dir) if run_dir else None)


def jobs_of(run_dir: Path) -> list[Job]:
    """The jobs that were submitted for a run, oldest first."""
    folders = [path for path in (run_dir / JOBS).glob("*") if (path / "job.id").is_file()]
    return [read_job(folder) for folder in sorted(folders)]


def tail(file: Path, size: int = _TAIL_BYTES) -> list[str]:
    """The last whole lines of a file, of at most `size` bytes in all; empty if there is no file."""
    try:
        with file.open("rb") as stream:
            length = stream.seek(0, 2)
            stream.seek(max(0, length - size))
            lines = stream.read().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    if length > size:
        lines = lines[1:]
    return lines[:-1]  # what follows the last line break is not whole yet


def last_records(run_dir: Path) -> list[dict[str, Any]]:
    """The newest step records of a run, as many as are at hand; oldest first."""
    records = []
    for line in tail(run_dir / "metrics.jsonl"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def last_record(run_dir: Path) -> dict[str, Any] | None:
    """The newest step record of a run; None before the first."""
    records = last_records(run_dir)
    return records[-1] if records else None
