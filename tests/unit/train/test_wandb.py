"""The tracker in its offline mode for real, and its faults."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.config.errors import EXIT_STOPPED, UserError
from megatron_synth.config.schema import WandbConfig
from megatron_synth.train.record.wandb import Tracker

OFFLINE = WandbConfig(mode="offline", project="test", tags=("a",))


def stored(file: Path) -> list[Any]:
    """The records of a small .wandb file: a 7-byte header, then records of checksum (4), length (2), type (1), data."""
    from wandb.proto import wandb_internal_pb2

    data, at, records = file.read_bytes(), 7, []
    assert data[:4] == b":W&B" and len(data) < 32768  # one block: no record is split
    while at < len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        records.append(record)
        at += 7 + length
    return records


def is_closed(file: Path) -> bool:
    """Whether wandb's own process has written the last record; that it does after `finish` has returned, now and then."""
    try:
        return file.stat().st_size > 7 and stored(file)[-1].WhichOneof("record_type") == "exit"
    except (IndexError, struct.error):  # it is being written
        return False


def history(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that was closed, or of one that never will be."""
    deadline = time.monotonic() + 30
    while not is_closed(file) and not file.parent.name.startswith("unfinished-"):
        assert time.monotonic() < deadline, f"{file} was not closed"
        time.sleep(0.05)
    rows = []
    for record in stored(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows


def test_two_starts_offline_are_one_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "fine-run"
    run_dir.mkdir()
    parts = ([1, 2, 3], [2, 3, 4])  # step 3 was lost in a crash, and is logged again
    for steps in parts:
        tracker = Tracker.start(OFFLINE, run_dir, "0a1b2c3d", {"optim": {"lr": 0.1}})
        for step in steps:
            tracker.log({"step": step, "train/loss": 1.0 / step, "perf/mfu": None}, step)
        tracker.finish(0)
        tracker.finish(0)
        assert not tracker.active
        time.sleep(1.1)  # wandb names its folders by the second
    files = sorted(run_dir.glob("wandb/offline-run-*/run-0a1b2c3d.wandb"))
    assert len(files) == 2
    for file, steps in zip(files, parts, strict=True):
        assert history(file) == [{"step": step, "train/loss": 1.0 / step} for step in steps]
        runs = [record.run for record in stored(file) if record.WhichOneof("record_type") == "run"]
        assert runs[0].run_id == "0a1b2c3d" and runs[0].display_name == "fine-run" and list(runs[0].tags) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["fine-run"]
    assert capfd.readouterr() == ("", "")


def test_disabled_does_not_import_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_synth.config.schema import WandbConfig\n"
        "from megatron_synth.train.record.wandb import Tracker\n"
        f"tracker = Tracker.start(WandbConfig(mode='disabled'), Path({str(tmp_path)!r}), 'id', {{}}, None)\n"
        "tracker.log({'step': 1}, 1); tracker.finish(0)\n"
        "assert not tracker.active and 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not list(tmp_path.iterdir())


def test_wandb_that_cannot_start_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"mode is online.*no API key configured.*offline or disabled"):
        Tracker.start(WandbConfig(mode="online"), tmp_path, "id", {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"mode is offline, but wandb cannot be imported.*set log\.wandb\.mode to disabled"):
        Tracker.start(OFFLINE, tmp_path, "id", {})


class Broken:
    """A run whose every call fails."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            self.calls.append(name)
            raise OSError("disk full")

        return fail


def test_a_failure_while_logging_warns_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    run = Broken()
    tracker = Tracker(run)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            tracker.log({"step": step}, step)
        tracker.finish(1)
    assert run.calls == ["log"] and not tracker.active
    assert len(caplog.records) == 1 and "step 0" in caplog.text and "disk full" in caplog.text


def test_a_failure_while_closing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Tracker(Broken()).finish(0)
    assert len(caplog.records) == 1 and "closing the run" in caplog.text


def test_an_online_run_has_each_step_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server says what it has had: steps that are trained again after a kill are not sent again."""
    import wandb

    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}

    class Run:
        def __init__(self) -> None:
            self.summary = dict(summary)
            self.dir = str(tmp_path)

        def define_metric(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log(self, values: dict[str, Any]) -> None:
            rows.append(values)
            summary.update(values)

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    for first, last in ((1, 7), (5, 9)):  # killed after step 7, goes on from the checkpoint of step 4
        tracker = Tracker.start(WandbConfig(mode="online"), tmp_path, "id", {}, step=first - 1)
        for step in range(first, last + 1):
            tracker.log({"step": step, "train/loss": 1.0 / step}, step)
            if step % 3 == 0:
                tracker.log({"eval/loss": 2.0 / step}, step, evaluation=True)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 10))
    assert [row["step"] for row in rows if "eval/loss" in row] == [3, 6, 9]


def test_a_stop_on_request_is_a_preemption() -> None:
    calls: list[tuple[str, Any]] = []

    class Run:
        def mark_preempting(self) -> None:
            calls.append(("mark_preempting", None))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    Tracker(Run()).finish(EXIT_STOPPED)
    Tracker(Run()).finish(0)
    assert calls == [("mark_preempting", None), ("finish", 75), ("finish", 0)]


def _killed_after(run_dir: Path, resumed_at: int, steps: list[int]) -> None:
    """A start in a process of its own that logs `steps`, then is killed before it has closed its file."""
    code = (
        "import os, signal; from pathlib import Path; from megatron_synth.config.schema import WandbConfig\n"
        "from megatron_synth.train.record.wandb import Tracker\n"
        f"tracker = Tracker.start(WandbConfig(mode='offline'), Path({str(run_dir)!r}), '0a1b2c3d', {{}}, step={resumed_at})\n"
        f"[tracker.log({{'step': step, 'train/loss': 1.0 / step}}, step) for step in {steps}]\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    # wandb's own process is one per process tree: this start has one of its own, as after a kill
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9


@pytest.mark.parametrize("kills", [1, 3])
def test_steps_before_a_kill_are_there_once(kills: int, tmp_path: Path) -> None:
    """Killed at step 5 with a checkpoint at 3, then perhaps twice more: all steps are in the files, none of them twice."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    records = [{"step": step, "train/loss": 1.0 / step} for step in range(1, 8)]
    _killed_after(run_dir, 0, [1, 2, 3, 4, 5])
    for _ in range(kills - 1):
        time.sleep(1.1)  # wandb names its folders by the second
        _killed_after(run_dir, 3, [4])
    time.sleep(1.1)
    tracker = Tracker.start(OFFLINE, run_dir, "0a1b2c3d", {}, step=3)
    tracker.replay(records[:3])
    for record in records[3:5]:
        tracker.log(record, record["step"])
    tracker.finish(0)
    time.sleep(1.1)
    tracker = Tracker.start(OFFLINE, run_dir, "0a1b2c3d", {}, step=5)
    tracker.replay(records[:5])
    for record in records[5:]:
        tracker.log(record, record["step"])
    tracker.finish(0)
    rows = [row for file in sorted(run_dir.glob("wandb/offline-run-*/run-0a1b2c3d.wandb")) for row in history(file)]
    assert rows == records
    assert len(list(run_dir.glob("wandb/unfinished-offline-run-*"))) == kills


@pytest.mark.parametrize("content", ["", "[]", '{"folder": "../..", "after_step": 1, "whole": false}', '{"folder": 3}'])
def test_a_damaged_note_moves_nothing(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "wandb"
    folder.mkdir(parents=True)
    (folder / "start.json").write_text(content)
    tracker = Tracker.start(OFFLINE, tmp_path / "run", "0a1b2c3d", {}, step=2)
    tracker.finish(0)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not list(folder.glob("unfinished-*"))
