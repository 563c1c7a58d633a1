"""Hung and lost ranks, reported by name within a time that the user sets, instead of a collective that never returns.

Each rank has a thread that beats: every second it rewrites RUN/hang/beat-N with a count, and where the rank is. It looks at its
own rank (is this step taking too long?), at the beat of the next rank in a ring (does it still count?), and for the mark that
another rank has seen trouble. In trouble every rank writes its Python stacks to RUN/hang/rank-N.txt, the one that made the mark
writes the summary and prints it, and all leave with exit code 70. The main thread may sit in a collective: it is not asked.

A rank that ends with an error of its user's, such as a damaged shard that it alone has read, says so in its last beat. It is
not lost: the others end with the same exit code, 2, and leave the message to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_synth.config.errors import EXIT_RANK_LOST, EXIT_USER_ERROR, PeerError, UserError
from megatron_synth.core import exit_record
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import show

_BEAT_BYTES = 1024
"""Every beat overwrites the same bytes, so that a full disk does not stop it."""
_SLOW = 6.0
"""How much longer than a step start-up, the first step, an evaluation or a save that is waited for may last."""
_SHOWN = 16
_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    attempt: str
    count: int
    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since_s: float
    """How long it has been in this phase."""
    where: str = ""
    """The innermost lines of its main thread, written when there is trouble."""
    error: str = ""
    """The error of its user's that it has ended with."""

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase


class Watch:
    """The watching thread of this rank. A context: it watches within.

    Args:
        folder: RUN/hang, shared by all ranks.
        attempt: a word that no other start of the run has used, equal on all ranks.
        rank: this rank.
        world_size: number of ranks.
        hang_timeout_s: how long a step may last; never less than three times the longest so far. None: any time.
        lost_after_s: without a beat for so long, a rank is lost. On the same host a process that has ended or is stopped is
            known by its state, at the second look.
        event: writes a line to events.log.
    """

    def __init__(
        self,
        folder: Path,
        attempt: str,
        rank: int,
        world_size: int,
        *,
        hang_timeout_s: float | None,
        lost_after_s: float,
        event: Callable[[str], None],
    ):
        self._folder, self._attempt, self._rank, self._world_size = folder, attempt, rank, world_size
        self._limit_s, self._lost_after_s, self._event = hang_timeout_s, lost_after_s, event
        self._beat_s = min(1.0, lost_after_s / 10, (hang_timeout_s or 10.0) / 10)
        self._patience_s = 4 * self._beat_s + min(10.0, lost_after_s)
        """How long the others may take to see a mark and write where they are."""
        self._host = socket.gethostname()
        self._main = threading.main_thread().ident
        self._phase: tuple[str, int, float, float] = ("start", 0, time.monotonic(), _SLOW)
        self._longest_step_s = 0.0
        self._count = 0
        self._descriptor: int | None = None
        self._broken = False
        self._error = ""
        self._seen: tuple[int, float] | None = None
        self._suspicions = 0
        self._leaving = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    # ---- what the training loop says

    def enter(self, phase: str, step: int = 0, *, slow: bool = False) -> None:
        """This rank begins `phase` (of `step`); `slow`: it may last longer than a step."""
        name, _, since, _ = self._phase
        now = time.monotonic()
        if name == "step":
            self._longest_step_s = max(self._longest_step_s, now - since)
        first = phase == "step" and not self._longest_step_s
        self._phase = (phase, step, now, _SLOW if slow or first else 1.0)

    def __enter__(self) -> Watch:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove the beats and marks of starts that died. Reports and stacks stay. Rank 0, before any rank watches."""
        for path in [*folder.glob("beat-*"), *folder.glob("trouble-*")]:
            path.unlink()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self._leaving.acquire(blocking=False):
            time.sleep(3600)  # the thread has seen trouble and is about to end the process
        self._stop.set()
        self._thread.join()
        met_by_all = isinstance(error, UserError) and (self._world_size == 1 or isinstance(error, PeerError))
        alone = error is not None and not met_by_all
        if alone:  # the others may wait for this rank: its last beat tells them why in vain
            self._phase = (f"{type(error).__name__} after {self._phase[0]}", *self._phase[1:])
            if isinstance(error, UserError):
                first = next(iter(str(error).splitlines()), "")
                self._error = first.encode("ascii", "backslashreplace").decode()[:_ERROR_CHARACTERS]
            self._beat()
        if self._descriptor is not None:
            os.close(self._descriptor)
        if not alone:
            self._path(self._rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it goes with the last rank, unless it holds a report
            self._folder.rmdir()

    def explain(self, error: Exception) -> None:
        """A collective has failed on this rank. Does not return if another rank is lost; else the error is this rank's own.

        Raises:
            PeerError: another rank has ended with an error of its user's.
        """
        before = self._read_all()
        deadline = time.monotonic() + self._patience_s
        if any(not self._same_host(beat) for beat in before.values()):
            deadline += self._lost_after_s
        while time.monotonic() < deadline:
            if (peer := self._told()) is not None:
                raise peer from error
            time.sleep(self._beat_s / 5)
            late = time.monotonic() > deadline - self._lost_after_s / 2
            for rank, beat in self._read_all().items():
                silent = rank in before and before[rank].count == beat.count
                if rank != self._rank and (self._state(beat) or (late and silent and not self._same_host(beat))):
                    self._trouble(f"a collective failed ({str(error).splitlines()[0][:200]})")

    # ---- the thread

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._beat_s):
            now = time.monotonic()
            if now - last > 3 * self._beat_s + 1.0:  # this process was stopped: what it saw before says nothing
                name, step, since, patience = self._phase
                self._phase = (name, step, since + now - last, patience)
                self._seen = None
            last = now
            self._beat()
            reason = self._reason(now)
            if reason is not None:
                self._trouble(reason)

    def _reason(self, now: float) -> str | None:
        """Why this rank sees trouble; None: all is well."""
        if self._mark.exists():
            return "another rank has seen trouble"
        _name, _step, since, patience = self._phase
        if self._limit_s is not None and now - since > patience * max(self._limit_s, 3 * self._longest_step_s):
            return f"no progress for {now - since:.0f} s in {self._own().place}"
        if self._world_size == 1 or self._broken:
            return None
        beat = self._read((self._rank + 1) % self._world_size)
        if beat is None:  # not there yet, or done
            self._seen = None
            return None
        if self._seen is None or self._seen[0] != beat.count:
            self._seen, self._suspicions = (beat.count, now), 0
            return None
        self._suspicions += 1
        gone = self._suspicions > 1 and self._state(beat) is not None
        if gone or now - self._seen[1] > self._lost_after_s:
            return f"no sign of life of rank {beat.rank} for {now - self._seen[1]:.0f} s"
        return None

    def _trouble(self, reason: str) -> NoReturn:
        """Write what is known, and end this process."""
        self._leaving.acquire()  # kept: a main thread that leaves now waits for the report
        if (peer := self._told()) is not None:
            exit_record.report(EXIT_USER_ERROR, peer)
            os._exit(EXIT_USER_ERROR)
        try:
            try:
                os.close(os.open(self._mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            except FileExistsError:
                self._dump()
                exit_record.report(EXIT_RANK_LOST, RuntimeError("peer gone: another rank has seen trouble"))
                time.sleep(self._patience_s + 2.0)  # the rank that made it tells; a launcher ends it with the first that leaves
                os._exit(EXIT_RANK_LOST)
            self._dump()
            report = self._summary(reason, *self._gather())
            write_atomic(self._folder / f"report-{self._attempt}.txt", report)
            show(f"error: {report}", error=True)
            # a hang is this rank's to tell; that another is gone is known best by whoever ended it
            head = report.splitlines()[0]
            exit_record.report(EXIT_RANK_LOST, RuntimeError(f"peer gone: {head}" if " lost: " in head else head))
            with contextlib.suppress(OSError):
                self._event(report)
        except OSError as error:
            show(f"error: rank {self._rank}: {reason}; no report could be written: {error}", error=True)
        os._exit(EXIT_RANK_LOST)

    def _told(self) -> PeerError | None:
        """The error that another rank has ended with, and tells; None: there is none."""
        told = [beat for beat in self._read_all().values() if beat.error and beat.rank != self._rank]
        return PeerError(f"rank {told[0].rank}: {told[0].error}") if told else None

    def _gather(self) -> tuple[dict[int, Beat], set[int]]:
        """The beats when all ranks have written where they are, and the ranks that have not in time."""
        deadline = time.monotonic() + self._patience_s
        while True:
            beats = self._read_all()
            silent = {rank for rank, beat in beats.items() if not beat.where}
            if all(self._state(beats[rank]) for rank in silent) or time.monotonic() > deadline:
                return beats, silent
            time.sleep(self._beat_s / 5)

    # ---- beats

    @property
    def _mark(self) -> Path:
        return self._folder / f"trouble-{self._attempt}"

    def _path(self, rank: int) -> Path:
        return self._folder / f"beat-{rank}"

    def _own(self, *, stacks: bool = False) -> Beat:
        name, step, since, _ = self._phase
        where = " < ".join(self._frames()) if stacks else ""
        age = time.monotonic() - since
        place = (step, name, round(age, 1), where)
        return Beat(self._attempt, self._count, self._rank, self._host, os.getpid(), *place, self._error)

    def _frames(self) -> Iterator[str]:
        """The innermost three lines of the main thread, torch's and megatron-core's left out unless there are no others."""
        frame, lines = sys._current_frames().get(self._main or 0), []
        while frame is not None:
            file = frame.f_code.co_filename
            lines.append(("/torch/" in file, f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"))
            frame = frame.f_back
        if lines and lines[0][0]:
            yield lines[0][1]
        yield from [text for in_torch, text in lines if not in_torch][: 3 - bool(lines and lines[0][0])]

    def _beat(self, *, stacks: bool = False) -> None:
        self._count += 1
        content = json.dumps(asdict(self._own(stacks=stacks))).encode()[:_BEAT_BYTES].ljust(_BEAT_BYTES)
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path(self._rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(self._descriptor, content, 0)
            self._broken = False
        except OSError:
            self._broken = True  # the disk is in trouble, and the others' silence may have the same cause

    def _read(self, rank: int) -> Beat | None:
        try:
            beat = Beat(**json.loads(self._path(rank).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return beat if beat.attempt == self._attempt else None

    def _read_all(self) -> dict[int, Beat]:
        found = {rank: self._read(rank) for rank in range(self._world_size)}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def _dump(self) -> None:
        self._beat(stacks=True)
        beat = self._own()
        with (self._folder / f"rank-{self._rank}.txt").open("w") as file:
            file.write(f"rank {beat.rank} on {beat.host}, pid {beat.pid}: {beat.place} for {beat.since_s:.0f} s\n\n")
            frames = sys._current_frames()
            threads = sorted(threading.enumerate(), key=lambda thread: thread.ident != self._main)  # the main one first
            for thread in threads:
                if thread.ident in frames and thread is not self._thread:
                    file.write(f"{thread.name}, the innermost line first\n")
                    file.writelines(f"  {line}\n" for line in _lines(_without_own(frames[thread.ident])))
                    file.write("\n")

    # ---- what the beats say

    def _same_host(self, beat: Beat) -> bool:
        return beat.host == self._host

    def _state(self, beat: Beat) -> str | None:
        """What is wrong with the process of a beat, as far as this host knows; None: nothing."""
        if not self._same_host(beat):
            return None
        try:
            state = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "its process has ended" if Path("/proc/self").exists() else None
        except OSError:
            return None
        return {"T": "its process is stopped (SIGSTOP)", "Z": "its process has ended"}.get(state)

    def _summary(self, reason: str, now: dict[int, Beat], silent: set[int]) -> str:
        # a process of this host that lives is slow to answer, not lost
        mute = {rank for rank in silent if self._same_host(now[rank]) and self._state(now[rank]) is None}
        lost = {rank: now[rank] for rank in sorted(silent - mute)}
        alive = {rank: beat for rank, beat in now.items() if rank not in lost}
        waiting = {rank for rank, beat in alive.items() if _waits(beat.where)}
        behind = {rank for rank in alive if rank not in waiting | mute} if waiting else set()
        named = sorted(lost) or sorted(behind)
        who = f"rank{'' if len(named) == 1 else 's'} {_some(named)}" if named else f"rank {self._rank}"
        what = "lost" if lost else "hanging"
        lines = [f"{who} of {self._world_size} {'is' if len(named) <= 1 else 'are'} {what}: {reason}"]
        for rank in [*lost, *sorted(alive, key=lambda rank: (rank not in behind, rank))][:_SHOWN]:
            beat = now[rank]
            if rank in lost:
                state = self._state(beat) or "no sign of life"
                text = f"LOST, {state}; last seen in {beat.place}"
            else:
                state = "waits for others" if rank in waiting else "BEHIND" if rank in behind else "alive"
                text = f"{'alive, does not answer' if rank in mute else state}, {beat.place}"
                text += f" for {beat.since_s:.0f} s, at {beat.where}" if beat.where else f" for {beat.since_s:.0f} s"
            lines.append(f"  rank {rank} on {beat.host}, pid {beat.pid}: {text}")
        if len(now) > _SHOWN:
            lines.append(f"  and {len(now) - _SHOWN} more")
        missing = sorted(set(range(self._world_size)) - set(now))
        if missing:
            lines.append(f"  no beat of rank {_some(missing)}: ended, or never begun")
        lines.append(f"Stacks: {self._folder}/rank-N.txt. Started again, the run resumes from its last checkpoint")
        return "\n".join(lines)


def _without_own(frame: FrameType) -> FrameType:
    """Where the watchdog was called from; `frame` itself where it was not."""
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _lines(frame: FrameType | None) -> Iterator[str]:
    """The lines of a stack, without their source: the disk that it is on may be what all wait for."""
    while frame is not None:
        yield f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back


def _waits(where: str) -> bool:
    """Whether a rank sits in a collective: its innermost line is torch.distributed's."""
    return where.startswith(("distributed_c10d.py", "c10d_logger.py"))


def _some(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:_SHOWN]))
    return listed + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")
