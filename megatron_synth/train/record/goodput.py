"""Goodput: how much of a run's time went into steps that it kept, and where the rest went, over all its starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_synth.core.log import duration
from megatron_synth.train.record.run_dir import RunDir
from megatron_synth.train.record.times import Phase, read_times

PRODUCTIVE = "kept steps"
TWICE, DATA, EVALUATION, SAVING = "steps trained twice", "waiting for data", "evaluation", "saving"
STARTING, STAGING, QUEUE, LAUNCH, DOWN = "starting", "staging", "queue", "launch", "not running"
KINDS = (PRODUCTIVE, TWICE, DATA, EVALUATION, SAVING, STAGING, STARTING, LAUNCH, QUEUE, DOWN)
"""In the order in which they are told."""


@dataclass(frozen=True)
class Span:
    """A stretch of time."""

    kind: str
    """Of KINDS."""
    start: int
    """Of which start; of the one that it waits for where none runs."""
    begin: float
    """Seconds since the epoch."""
    end: float


@dataclass(frozen=True)
class Goodput:
    """The time of a run, or of several together."""

    seconds: dict[str, float]
    """By kind, those that there are."""
    spans: tuple[Span, ...] = ()
    """One after the other; none of several runs."""

    @property
    def wall_s(self) -> float:
        """From the first begin to the last end; of several runs the sum."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Of the time that is productive."""
        return self.seconds.get(PRODUCTIVE, 0.0) / self.wall_s if self.wall_s else 0.0

    def text(self) -> str:
        """A line: the share, and where the rest went, the largest part first."""
        rest = sorted(((s, kind) for kind, s in self.seconds.items() if kind != PRODUCTIVE), reverse=True)
        told = ", ".join(f"{kind} {100 * s / self.wall_s:.1f} %" for s, kind in rest if s >= 0.0005 * self.wall_s)
        return f"{100 * self.share:.1f} % of {duration(self.wall_s)} went into steps that count" + (f"; {told}" if told else "")


def goodput(run: Path, attempts: Sequence[float] = ()) -> Goodput | None:
    """The time of a run, from its records alone.

    Args:
        run: its directory.
        attempts: when SLURM began each of its attempts; time before one is the queue's, after it the launch's.

    Returns:
        None: the run's version noted no times, or it has had none.

    Raises:
        UserError: a record is damaged.
    """
    lines = sorted(read_times(run), key=lambda line: line["begin"])
    if not lines:
        return None
    resumed = [start["resumed_from_step"] or 0 for start in RunDir.open(run).info["starts"]]
    spans: list[Span] = []
    for line in lines:
        place = spans[-1].end if spans else line["begin"]
        if not spans or line["start"] != spans[-1].start:
            spans += _between(place, line, attempts)
        begin = max(line["begin"], spans[-1].end) if spans else line["begin"]  # clocks of nodes may differ
        if line["end"] > begin:
            spans += _of(line, begin, min(resumed[line["start"] :], default=None))
    if not spans:
        return None
    seconds = dict.fromkeys(KINDS, 0.0)
    for span in spans:
        seconds[span.kind] += span.end - span.begin
    return Goodput({kind: s for kind, s in seconds.items() if s > 0}, tuple(spans))


def together(parts: Sequence[Goodput]) -> Goodput | None:
    """The time of several runs; None without any."""
    if not parts:
        return None
    seconds = {kind: sum(part.seconds.get(kind, 0.0) for part in parts) for kind in KINDS}
    return Goodput({kind: s for kind, s in seconds.items() if s > 0})


def _between(place: float, line: Phase, attempts: Sequence[float]) -> list[Span]:
    """What was before a start, from the end of the one before it: in the queue, in its launch, or nowhere."""
    start, until = line["start"], line["begin"]
    begun = [when for when in attempts if place <= when <= until]
    if begun:
        queue = Span(QUEUE, start, place, begun[-1])
        return [span for span in (queue, Span(LAUNCH, start, begun[-1], until)) if span.end > span.begin]
    early = [when for when in attempts if when <= until]
    if start == 1 and early:
        return [Span(LAUNCH, start, early[-1], until)]
    return [Span(DOWN, start, place, until)] if until > place else []


def _of(line: Phase, begin: float, kept_to: int | None) -> list[Span]:
    """The spans of a line. kept_to: the last step of it that was not trained again; None: all were kept."""
    end, start = line["end"], line["start"]
    if line["phase"] != "steps":
        kinds = {"starting": STARTING, "staging": STAGING, "evaluation": EVALUATION, "saving": SAVING}
        return [Span(kinds[line["phase"]], start, begin, end)]
    first, last = line.get("first", 1), line.get("last", 1)
    waited = min(line.get("data_s", 0.0), end - begin)
    number = max(last - first + 1, 1)
    kept = number if kept_to is None else min(max(kept_to - first + 1, 0), number)
    steps_s = end - begin - waited
    cut, places = begin + waited, []
    if waited:
        places.append(Span(DATA, start, begin, cut))
    if kept:
        places.append(Span(PRODUCTIVE, start, cut, cut + steps_s * kept / number))
    if kept < number:
        places.append(Span(TWICE, start, cut + steps_s * kept / number, end))
    return places
