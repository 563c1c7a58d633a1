"""Many runs on one machine: a process that has imported the engine once forks one process per run.

Runs that are finished are skipped, runs that were stopped or killed go on from their checkpoints, and one that fails
does not hold up the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

import psutil

from megatron_synth.config.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from megatron_synth.core.log import compact, duration, say, show
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.plan.runs import Run

_POLL_S = 0.2
_TICK_S = 1.0
"""Between updates of the progress line on a terminal."""


@dataclass
class Slots:
    """Places for ranks on this machine: GPUs by number, or just places on a CPU."""

    gpus: bool
    free: list[int]

    @classmethod
    def of_machine(cls, jobs: int | None) -> Slots:
        """One place per GPU, or `jobs` (default 1) on a CPU.

        Raises:
            UserError: more jobs are asked for than there are GPUs.
        """
        gpus = visible_gpus()
        if not gpus:
            return cls(False, list(range(jobs or 1)))
        if jobs is not None and jobs > len(gpus):
            raise UserError(f"--jobs {jobs}: this machine shows {len(gpus)} GPUs; one run needs at least one of its own")
        return cls(True, gpus[:jobs])

    @property
    def kind(self) -> str:
        """What a place is."""
        return "GPU" if self.gpus else "CPU process"

    def take(self, number: int) -> list[int] | None:
        """`number` places, if so many are free."""
        if len(self.free) < number:
            return None
        taken, self.free = self.free[:number], self.free[number:]
        return taken

    def give_back(self, places: Sequence[int]) -> None:
        """Free places that were taken."""
        self.free = sorted([*self.free, *places])


def visible_gpus() -> list[int]:
    """Numbers of the GPUs that this process may use, found without initializing CUDA."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    count = torch.cuda.device_count()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = [int(part) for part in shown.split(",") if part.strip().isdigit()]
    return numbers[:count] if numbers else list(range(count))


class Progress:
    """What is done, and when the rest will be: seconds per token by size, as measured since this start."""

    def __init__(self, folder: Folder, runs: Sequence[Run], vocab_size: int):
        self.folder, self.runs, self.vocab_size = folder, runs, vocab_size
        self.began = time.monotonic()
        self.spent: dict[str, tuple[float, float]] = {}
        """By size: seconds and tokens of finished runs."""

    def finished(self, run: Run, seconds: float, tokens: int) -> None:
        """Count a run: seconds that this start spent on it, tokens that it trained on meanwhile."""
        before = self.spent.get(run.size, (0.0, 0.0))
        self.spent[run.size] = (before[0] + seconds, before[1] + tokens)

    def seconds_of(self, run: Run, tokens: int) -> float:
        """Expected seconds for `tokens` of a run: by its size, else by the FLOPs of the others; NaN if nothing is known."""
        seconds, counted = self.spent.get(run.size, (0.0, 0.0))
        if counted:
            return tokens * seconds / counted
        known = [(self.spent[other.size], other) for other in self.runs if self.spent.get(other.size, (0, 0))[1]]
        if not known:
            return float("nan")
        (seconds, counted), other = known[-1]
        per_flop = seconds / (counted * other.flops(self.vocab_size) / other.tokens)
        return tokens * per_flop * run.flops(self.vocab_size) / run.tokens

    def eta_s(self, left: Sequence[Run], running: dict[str, int], places: int) -> float:
        """Seconds until all is done. running: by id, the steps that a running run has done."""
        seconds = 0.0
        for run in left:
            tokens = run.tokens - running.get(run.id, run.branch_step) * run.config.train.tokens_per_step
            seconds += self.seconds_of(run, tokens) * run.ranks
        return seconds / places


@dataclass
class _Child:
    run: Run
    places: list[int]
    began: float
    first_step: int
    done: bool = False


@dataclass
class Execution:
    """The runs of one call, in order."""

    folder: Folder
    runs: Sequence[Run]
    slots: Slots
    keep_checkpoints: bool
    vocab_size: int
    stop: bool = False
    interrupts: int = 0
    children: dict[int, _Child] = field(default_factory=dict)

    def go(self) -> int:
        """Run all that is not finished. Returns 0: all done, 1: some failed, 75: stopped on request."""
        from megatron_synth.study.execute.worker import import_once

        places = len(self.slots.free)
        waiting = self._waiting(places)
        skipped = len(self.runs) - len(waiting)
        say(f"{len(waiting)} runs to train, {skipped} finished already; {places} x {self.slots.kind}")
        if not waiting:
            return EXIT_OK
        import_once()
        sys.stdout.flush()
        self._listen()
        self.progress = Progress(self.folder, self.runs, self.vocab_size)
        self.total, self.finished, self.failed = len(self.runs), skipped, 0
        shown, told = time.monotonic(), False
        while self.children or (waiting and not self.stop):
            while waiting and not self.stop:
                ready = next((run for run in waiting if self.folder.may_begin(run)), None)
                if ready is None:
                    self._give_up_without_trunk(waiting)
                    break
                places_taken = self.slots.take(ready.ranks)
                if places_taken is None:
                    break
                waiting.remove(ready)
                self._fork(ready, places_taken)
            self._reap(waiting)
            if self.stop and not told:
                told = True
                self._tell("asked to stop: running runs save and leave; Ctrl-C again ends them at once", waiting)
            if sys.stdout.isatty() and time.monotonic() - shown > _TICK_S:
                shown = time.monotonic()
                show(self._line(waiting), control="\r\033[K", end="")
            time.sleep(_POLL_S)
        if sys.stdout.isatty():
            show("", control="\r\033[K", end="")
        took = duration(time.monotonic() - self.progress.began)
        # others may have finished theirs meanwhile
        finished = sum(self.folder.result(run) is not None for run in self.runs)
        elsewhere = sum(self.folder.is_locked(run) for run in self.runs)
        others = f", {elsewhere} trained by another process" if elsewhere else ""
        say(f"{finished} of {self.total} runs finished, {self.failed} failed{others}, in {took}")
        if self.stop:
            say("stopped on request: finished runs are kept, others go on from their checkpoints; the same command goes on")
            return EXIT_STOPPED
        return 1 if self.failed or finished < self.total else EXIT_OK

    def _give_up_without_trunk(self, waiting: list[Run]) -> None:
        """Branches whose trunk is neither waiting nor running anywhere have failed: nothing brings the step that they need."""
        coming = {run.id for run in waiting if not run.branch_step} | {child.run.id for child in self.children.values()}
        trunks = {run.id: run for run in self.runs if not run.branch_step}
        for run in list(waiting):
            if run.trunk in coming or (run.trunk in trunks and self.folder.is_locked(trunks[run.trunk])):
                continue
            waiting.remove(run)
            self.failed += 1
            why = f"step {run.branch_step} of its trunk, run {run.trunk}, is not there, and the trunk is not being trained"
            if run.trunk in trunks and self.folder.state(trunks[run.trunk]) == "done":
                why += "; it was finished before this branch was planned: remove its folder, to train it again"
            self.folder.record_failure(run, EXIT_USER_ERROR, why)
            self._tell(f"{run.name} FAILED: {why}", waiting)

    def _waiting(self, places: int) -> list[Run]:
        waiting = [run for run in self.runs if self.folder.result(run) is None]
        too_large = [run for run in waiting if run.ranks > places]
        if too_large:
            need = max(run.ranks for run in too_large)
            names = ", ".join(sorted({run.size for run in too_large}))
            raise UserError(
                f"sizes {names} need {need} ranks, here are {places} x {self.slots.kind}: use --jobs {need}, a larger "
                "machine, or --slurm"
            )
        return waiting

    def _listen(self) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            self.stop = True
            self.interrupts += number == signal.SIGINT
            for pid, child in self.children.items():
                if not child.done:
                    if self.interrupts > 1:
                        _end_all(pid)
                    else:
                        os.kill(pid, signal.SIGTERM)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handle)

    def _fork(self, run: Run, places: list[int]) -> None:
        from megatron_synth.study.execute import worker

        parent = os.getpid()
        first = self.folder.steps_done(run)
        sys.stdout.flush()
        sys.stderr.flush()
        # a stop request between the fork and the entry in `children` must not be lost
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            code = worker.EXIT_FAILED
            try:
                for number in _SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                code = worker.work(self.folder, run, places if self.slots.gpus else (), self.keep_checkpoints, parent)
            finally:
                os._exit(code)  # nothing of the parent's is to be cleaned up here
        self.children[pid] = _Child(run, places, time.monotonic(), first)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _reap(self, waiting: list[Run]) -> None:
        from megatron_synth.study.execute.worker import EXIT_TAKEN

        for pid in list(self.children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            child = self.children[pid]
            child.done = True
            del self.children[pid]
            self.slots.give_back(child.places)
            code = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - child.began
            run = child.run
            if code == EXIT_OK:
                steps = run.config.train.steps - child.first_step
                self.progress.finished(run, seconds, steps * run.config.train.tokens_per_step)
                self.finished += 1
                self._tell(f"{run.name} done in {seconds:.0f} s, {self._losses(run)}", waiting)
            elif code == EXIT_TAKEN:
                self._tell(f"{run.name} is trained by another process; left to it", waiting)
            elif not (self.stop and (code == EXIT_STOPPED or (self.interrupts > 1 and code == -signal.SIGKILL))):
                if code < 0:  # a signal, such as that of the kernel when memory runs out
                    self.folder.record_failure(run, code, f"killed by {signal.Signals(-code).name}")
                self.failed += 1
                why = self.folder.describe_failure(run) or f"exit code {code}"
                self._tell(f"{run.name} FAILED: {why}; see {self.folder.log(run)}", waiting)

    def _losses(self, run: Run) -> str:
        result = self.folder.result(run)
        assert result is not None, run.name
        return ", ".join(f"{name} {'n/a' if loss is None else f'{loss:.3f}'}" for name, loss in result["loss"].items())

    def _tell(self, text: str, waiting: Sequence[Run]) -> None:
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        say(f"[{self.finished}/{self.total}] {text} | eta {duration(self._eta(waiting))}", control=clear)

    def _eta(self, waiting: Sequence[Run]) -> float:
        running = {child.run.id: self.folder.steps_done(child.run) for child in self.children.values()}
        left = [*waiting, *(child.run for child in self.children.values())]
        places = len(self.slots.free) + sum(len(child.places) for child in self.children.values())
        return self.progress.eta_s(left, running, places) if left else 0.0

    def _line(self, waiting: Sequence[Run]) -> str:
        """The progress line."""
        tokens = sum(run.own_tokens for run in self.runs)
        left = [*waiting, *(child.run for child in self.children.values())]
        left_tokens = sum(run.own_tokens for run in left)
        for child in self.children.values():
            steps = self.folder.steps_done(child.run) - child.run.branch_step
            left_tokens -= steps * child.run.config.train.tokens_per_step
        parts = [
            f"{self.finished}/{self.total} done",
            f"{len(self.children)} running",
            f"{self.failed} failed",
            f"{compact(tokens - left_tokens)}/{compact(tokens)} tokens",
            f"eta {duration(self._eta(waiting))}",
        ]
        return " | ".join(parts)


def _end_all(pid: int) -> None:
    """End a child at once, with the launcher and ranks that it may have."""
    child = psutil.Process(pid)
    for process in (child, *child.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
