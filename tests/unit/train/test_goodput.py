"""Where the time of a run went: from the phases of its starts, over kills, the queue and several runs."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.core import process_time
from megatron_synth.train.record import goodput as kinds
from megatron_synth.train.record import times
from megatron_synth.train.record.figures.times import write_times
from megatron_synth.train.record.goodput import goodput, together
from megatron_synth.train.record.times import Times, read_times
from tests.support import run_info


def make(run: Path, resumed: Sequence[int | None], *lines: tuple[Any, ...]) -> Path:
    """A run directory with starts that resumed from these steps, and lines (start, phase, begin, end[, first, last, data])."""
    run.mkdir(parents=True)
    info = run_info(len(resumed))
    info["starts"] = [{**start, "resumed_from_step": step} for start, step in zip(info["starts"], resumed, strict=True)]
    (run / "run.json").write_text(json.dumps(info))
    names = ("start", "phase", "begin", "end", "first", "last", "data_s")
    (run / "times.jsonl").write_text("".join(json.dumps(dict(zip(names, line, strict=False))) + "\n" for line in lines))
    return run


KILLED = (
    (1, "starting", 0.0, 10.0),
    (1, "staging", 10.0, 14.0),
    (1, "steps", 14.0, 34.0, 1, 20, 2.0),
    (1, "saving", 34.0, 35.0),
    (1, "steps", 35.0, 45.0, 21, 30, 0.0),  # killed later; the next start goes on from step 24
    (2, "starting", 60.0, 70.0),
    (2, "steps", 70.0, 86.0, 25, 40, 0.0),
    (2, "evaluation", 86.0, 90.0),
)


def test_where_the_time_of_a_killed_run_went(tmp_path: Path) -> None:
    run = make(tmp_path / "run", [None, 24], *KILLED)
    found = goodput(run)
    assert found is not None and found.wall_s == pytest.approx(90.0)
    assert found.seconds == pytest.approx(
        {
            kinds.PRODUCTIVE: 18.0 + 4.0 + 16.0,
            kinds.TWICE: 6.0,
            kinds.DATA: 2.0,
            kinds.EVALUATION: 4.0,
            kinds.SAVING: 1.0,
            kinds.STAGING: 4.0,
            kinds.STARTING: 20.0,
            kinds.DOWN: 15.0,
        }
    )
    assert found.share == pytest.approx(38 / 90)
    assert found.text().startswith("42.2 % of 0:01:30 went into steps that count; starting 22.2 %, not running 16.7 %, ")
    ends = [(span.begin, span.end) for span in found.spans]
    assert all(end == begin for (_, end), (begin, _) in pairwise(ends))
    # attempts begin before their programs, by 3 and by 8 seconds
    found = goodput(run, [-3.0, 52.0])
    assert found is not None
    assert (found.seconds[kinds.QUEUE], found.seconds[kinds.LAUNCH]) == pytest.approx((7.0, 3.0 + 8.0))


def test_a_start_that_goes_further_back_loses_more(tmp_path: Path) -> None:
    again = (*KILLED, (3, "steps", 90.0, 120.0, 11, 40, 0.0))
    found = goodput(make(tmp_path / "run", [None, 24, 10], *again))
    assert found is not None
    assert found.seconds[kinds.PRODUCTIVE] == pytest.approx(9.0 + 30.0)  # 10 of the first 20 steps, and all of the last start's
    both = together([found, found])
    assert both is not None and both.wall_s == pytest.approx(2 * found.wall_s) and both.share == pytest.approx(found.share)
    assert together([]) is None


def test_runs_without_times_and_damaged_ones(tmp_path: Path) -> None:
    run = make(tmp_path / "run", [None])
    assert goodput(run) is None
    (run / "times.jsonl").write_text('{"start": 1, "phase": "starting", "begin": 1.0, "end": 2.0}\n{"start": 1, "pha')
    found = goodput(run)
    assert found is not None and found.share == 0.0  # a line that a crash cut short is left out
    (run / "times.jsonl").write_text('{"start": 1, "phase": "sleeping", "begin": 1.0, "end": 2.0}\n')
    with pytest.raises(UserError, match=r"times.jsonl, line 1: damaged: phase"):
        goodput(run)


def test_phases_are_written_as_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(times.time, "time", lambda: now[0])
    monkeypatch.setattr(times, "process_start", lambda: 990.0)
    monkeypatch.setattr(process_time, "_spans", [("staging", 992.0, 995.0)])
    clock = Times(tmp_path, 2)

    def phase(name: str, step: int, seconds: float) -> None:
        clock.enter(name, step)
        now[0] += seconds

    for step in range(1, 6):
        phase("reading data", step, 1.0)
        phase("step", step, 2.5)
        phase("record", step, 0.5)
    phase("save", 5, 3.0)
    phase("end", 0, 1.0)
    found = [(line["phase"], line["begin"], line["end"], line.get("first"), line.get("last")) for line in read_times(tmp_path)]
    assert found == [
        ("starting", 990.0, 992.0, None, None),
        ("staging", 992.0, 995.0, None, None),
        ("starting", 995.0, 1000.0, None, None),
        ("steps", 1000.0, 1012.0, 1, 3),  # a line for some ten seconds
        ("steps", 1012.0, 1020.0, 4, 5),
        ("saving", 1020.0, 1023.0, None, None),
    ]
    assert [line["data_s"] for line in read_times(tmp_path) if "data_s" in line] == [3.0, 2.0]
    assert {line["start"] for line in read_times(tmp_path)} == {2}


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Times(tmp_path / "absent", 1)
    for _ in range(3):
        clock.enter("save")
        clock.enter("evaluation")
    assert capsys.readouterr().out.count("is not noted any more") <= 1


def test_process_start_is_before_now() -> None:
    import time

    assert time.time() - 86_400 < process_time.process_start() < time.time()


def test_it_is_drawn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run = make(tmp_path / "run", [None, 24], *KILLED)
    found = goodput(run)
    assert found is not None
    data = write_times(run, "a run with $dollars$", found).read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1600 and height > 300
    assert [str(warning.message) for warning in recwarn] == []
