"""times.jsonl: what the starts of a run spent their time with, as rank 0 has it; and each rank's own sums, for nodes.json.

A line is a phase of a start: `starting`, `staging`, `steps`, `evaluation` or `saving`, with its begin and end in seconds since
the epoch. Steps that follow each other share a line for some seconds, which also says which they are, and how long they waited
for data: so a start that is killed leaves out no more than these seconds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.core.files import append_line
from megatron_synth.core.log import say
from megatron_synth.core.process_time import process_start, take_spans
from megatron_synth.core.records import OPEN, Amount, Count, Positive, Reader

FILE = "times.jsonl"
_LINE_S = 10.0
"""Longest time of the steps in a line."""
_STEP_PHASES = {"reading data", "step", "record"}
_NAMES = {"evaluation": "evaluation", "save": "saving"}
Wait = Literal["data", "saving", "starting"]
WAITS: tuple[Wait, ...] = ("data", "saving", "starting")
"""What a rank waits for that may differ by node."""


@with_config(OPEN)
class Phase(TypedDict):
    """A line."""

    start: Positive
    phase: Literal["starting", "staging", "steps", "evaluation", "saving"]
    begin: Amount
    end: Amount
    first: NotRequired[Count]
    last: NotRequired[Count]
    data_s: NotRequired[Amount]


TIMES: Reader[Phase] = Reader(Phase, "restore the file or delete the line")


def read_times(run: Path) -> list[Phase]:
    """All lines of a run's times.jsonl; empty for a run of a version that wrote none. UserError if it is damaged."""
    return TIMES.read_lines(run / FILE)


class Times:
    """Adds up the phases of a start, and writes them on rank 0."""

    def __init__(self, run: Path, start: int, *, writes: bool = True):
        """Note what came before. start: its number, from 1. writes: whether this rank writes times.jsonl."""
        self._file, self._start, self._failed = run / FILE, start, not writes
        self._phase, self._since = "starting", time.time()
        self._begin = self._since
        self._first = self._last = 0
        self._data_s = 0.0
        place = process_start()
        self.waited: dict[Wait, float] = {"data": 0.0, "saving": 0.0, "starting": self._since - place}
        """Seconds of this process so far; staging is part of the start."""
        for name, begin, end in take_spans():
            self._write("starting", place, begin)
            self._write(name, begin, end)
            place = end
        self._begin = place

    def enter(self, phase: str, step: int = 0) -> None:
        """The loop begins a phase, by the names that it has for the watchdog."""
        now = time.time()
        spent = now - self._since
        if self._phase == "reading data":
            self._data_s += spent
            self.waited["data"] += spent
        elif self._phase not in _STEP_PHASES | {"evaluation"}:
            self.waited["saving" if self._phase == "save" else "starting"] += spent
        in_steps, goes_on = self._phase in _STEP_PHASES, phase in _STEP_PHASES
        whole_step = phase == "reading data" or not goes_on
        if not (in_steps and goes_on) or (whole_step and now - self._begin >= _LINE_S):
            self._close(now)
        if phase == "step":
            self._first, self._last = self._first or step, step
        self._phase, self._since = phase, now

    def _close(self, now: float) -> None:
        """Write the phase that ends now, and begin another."""
        if self._phase in _STEP_PHASES:
            if not self._first:
                return  # no step was begun: what comes next has this time, too
            self._write("steps", self._begin, now, first=self._first, last=self._last, data_s=round(self._data_s, 3))
        else:
            self._write(_NAMES.get(self._phase, "starting"), self._begin, now)
        self._begin, self._first, self._data_s = now, 0, 0.0

    def _write(self, phase: str, begin: float, end: float, **more: Any) -> None:
        if self._failed or end <= begin:
            return
        line = {"start": self._start, "phase": phase, "begin": round(begin, 3), "end": round(end, 3), **more}
        try:
            append_line(self._file, json.dumps(line))
        except OSError as error:  # a full disk must not end the run for this
            self._failed = True
            say(f"warning: {self._file}: {error}; what this start spends its time with is not noted any more")
