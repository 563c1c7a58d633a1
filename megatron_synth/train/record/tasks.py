"""Results of downstream tasks in the records of a run: tasks.json, metrics.jsonl and the tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.config.errors import EXIT_OK
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.core.files import write_atomic, write_json
from megatron_synth.core.records import OPEN, Count, Number, Reader
from megatron_synth.train.record import metrics
from megatron_synth.train.record.run_dir import RunDir
from megatron_synth.train.record.run_lock import RunLock
from megatron_synth.train.record.wandb import Tracker

FILE = "tasks.json"
_Name = Annotated[str, Field(strict=True, pattern=r"^[^\x00-\x1f]{1,200}$")]


@with_config(OPEN)
class TaskInfo(TypedDict):
    """tasks.json: the results of the last evaluation, by task and metric, and what was asked for."""

    step: Count
    average: bool
    tasks: dict[_Name, dict[_Name, Number]]
    settings: dict[str, Any]


TASKS: Reader[TaskInfo] = Reader(TaskInfo, "remove it; `megatron-synth eval RUN --tasks ...` writes it again")


def named(info: TaskInfo) -> dict[str, float]:
    """The results by the names of metrics.jsonl: `tasks/TASK/METRIC`, and `ema/tasks/...` for the average of the weights."""
    prefix = metrics.EMA + metrics.TASKS if info["average"] else metrics.TASKS
    return {f"{prefix}{task}/{name}": value for task, values in info["tasks"].items() for name, value in values.items()}


def record(run_path: Path, info: TaskInfo) -> None:
    """Write tasks.json, add the results to the record of their step in metrics.jsonl, and to the tracker's.

    Raises:
        UserError: the run is being trained, or a record is damaged.
    """
    run = RunDir.open(run_path)
    with RunLock(run_path) as lock:
        lock.take()  # a run that is training would write metrics.jsonl, too
        records = metrics.read_metrics(run.metrics)
        found = named(info)
        write_json(run.path / FILE, info)
        place = next((one for one in records if one[metrics.STEP] == info["step"]), None)
        if place is not None:  # a run that was copied without its metrics has no place for them
            place.update(found)
            write_atomic(run.metrics, "".join(metrics.encode(one) + "\n" for one in records))
            _track(run, records, found, info["step"])


def _track(run: RunDir, records: list[metrics.Record], found: Mapping[str, float], step: int) -> None:
    config = load_file(Config, run.path / "config.yaml")
    last = int(records[-1][metrics.STEP])
    tracker = Tracker.start(config.log.wandb, run.path, run.id, config.model_dump(mode="json"), run.name, step=last)
    tracker.replay(records)
    tracker.log(found, step)
    tracker.finish(EXIT_OK)


def of_run(run_path: Path) -> dict[str, float]:
    """The results that a run directory has, by the names of metrics.jsonl; empty if there are none.

    Raises:
        UserError: tasks.json is damaged.
    """
    info = TASKS.read_optional(run_path / FILE)
    return {} if info is None else named(info)
