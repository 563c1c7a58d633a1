"""Many runs on one machine: a process that has imported the engine once forks one process per run.

Runs that are finished are skipped, runs that were stopped or killed go on from their checkpoints, and one that fails
does not hold up the others. Corpora that the study makes are jobs beside them: one begins when the runs are finished whose
models write it, and a run when the corpora are there that it reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

import psutil

from megatron_synth.config.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from megatron_synth.core.log import compact, duration, say, show
from megatron_synth.study.execute.folder import Folder, Job
from megatron_synth.study.plan.corpora import Corpus, generating
from megatron_synth.study.plan.runs import Run, needs_of
from megatron_synth.study.plan.study_file import Study

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
    job: Job
    places: list[int]
    began: float
    first_step: int
    done: bool = False


@dataclass
class Execution:
    """The jobs of one call, in order.

    jobs: runs to train, and corpora to make. What a job needs may be elsewhere, and must then be finished or under way there.
    """

    study: Study
    folder: Folder
    jobs: Sequence[Job]
    slots: Slots
    vocab_size: int
    stop: bool = False
    interrupts: int = 0
    children: dict[int, _Child] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    """Ids of jobs that were seen to be finished."""

    @property
    def runs(self) -> list[Run]:
        """The runs among the jobs."""
        return [job for job in self.jobs if isinstance(job, Run)]

    def go(self) -> int:
        """Run all that is not finished. Returns 0: all done, 1: some failed, 75: stopped on request."""
        from megatron_synth.study.execute.worker import import_once

        places = len(self.slots.free)
        waiting = self._waiting(places)
        skipped = len(self.jobs) - len(waiting)
        corpora = [job for job in waiting if isinstance(job, Corpus)]
        made = f", {len(corpora)} corpora to make" if corpora else ""
        say(f"{len(waiting) - len(corpora)} runs to train{made}, {skipped} finished already; {places} x {self.slots.kind}")
        if not waiting:
            return EXIT_OK
        self.kept = generating(job for job in self.jobs if isinstance(job, Corpus))
        for run in self.runs:
            self.kept |= generating(corpus for corpus in run.corpora.values())
        import_once(generates=bool(corpora))
        sys.stdout.flush()
        with self._listening():
            self.progress = Progress(self.folder, self.runs, self.vocab_size)
            self.total, self.finished, self.failed = len(self.jobs), skipped, 0
            shown, told = time.monotonic(), False
            while self.children or (waiting and not self.stop):
                while not self.stop and (job := self._next(waiting)) is not None:
                    places_taken = self.slots.take(job.ranks)
                    if places_taken is None:
                        break
                    waiting.remove(job)
                    self._fork(job, places_taken)
                if waiting and not self.stop and self._next(waiting) is None:
                    self._give_up_without_trunk(waiting)
                if not self.children and waiting and not self.stop and not self._is_coming(waiting):
                    break
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
        finished = sum(self.folder.is_done(job) for job in self.jobs)
        elsewhere = sum(self.folder.is_locked(job) for job in self.jobs)
        others = f", {elsewhere} trained by another process" if elsewhere else ""
        what = "runs" if len(self.runs) == len(self.jobs) else "runs and corpora"
        say(f"{finished} of {self.total} {what} finished, {self.failed} failed{others}, in {took}")
        self._tell_what_waits(waiting)
        if self.stop:
            say("stopped on request: finished runs are kept, others go on from their checkpoints; the same command goes on")
            return EXIT_STOPPED
        return 1 if self.failed or finished < self.total else EXIT_OK

    def _next(self, waiting: Sequence[Job]) -> Job | None:
        """The first job that has what it needs: the corpora that it reads, the step of its trunk."""
        return next((job for job in waiting if all(map(self._is_done, needs_of(job))) and self._has_trunk(job)), None)

    def _has_trunk(self, job: Job) -> bool:
        return isinstance(job, Corpus) or self.folder.may_begin(job)

    def _is_done(self, job: Job) -> bool:
        if job.id not in self.done and self.folder.is_done(job):
            self.done.add(job.id)
        return job.id in self.done

    def _is_coming(self, waiting: Sequence[Job]) -> bool:
        """Whether another process works at something that a waiting job needs."""
        needed = {need.id: need for job in waiting for need in needs_of(job) if not self._is_done(need)}
        trunks = {run.id: run for run in self.runs if not run.branch_step}
        needed |= {run.trunk: trunks[run.trunk] for run in waiting if isinstance(run, Run) and run.trunk in trunks}
        return any(map(self.folder.is_locked, needed.values())) or self._next(waiting) is not None

    def _give_up_without_trunk(self, waiting: list[Job]) -> None:
        """Branches whose trunk is neither waiting nor running anywhere have failed: nothing brings the step that they need."""
        runs = [job for job in waiting if isinstance(job, Run)]
        coming = {run.id for run in runs if not run.branch_step} | {child.job.id for child in self.children.values()}
        trunks = {run.id: run for run in self.runs if not run.branch_step}
        for run in runs:
            if not run.branch_step or self.folder.may_begin(run):
                continue
            if run.trunk in coming or (run.trunk in trunks and self.folder.is_locked(trunks[run.trunk])):
                continue
            waiting.remove(run)
            self.failed += 1
            why = f"step {run.branch_step} of its trunk, run {run.trunk}, is not there, and the trunk is not being trained"
            if run.trunk in trunks and self.folder.state(trunks[run.trunk]) == "done":
                why += "; it was finished before this branch was planned: remove its folder, to train it again"
            self.folder.record_failure(run, EXIT_USER_ERROR, why)
            self._tell(f"{run.name} FAILED: {why}", waiting)

    def _tell_what_waits(self, waiting: Sequence[Job]) -> None:
        """Say what was not begun, as something that it needs is not there."""
        if not waiting or self.stop:
            return
        needed = dict.fromkeys(need.name for job in waiting for need in needs_of(job) if not self._is_done(need))
        mine = {job.name for job in waiting}
        first = [name for name in needed if name not in mine]
        more = f" and {len(first) - 3} more" if len(first) > 3 else ""
        say(f"{len(waiting)} wait for what is not finished: {', '.join(first[:3])}{more}")

    def _waiting(self, places: int) -> list[Job]:
        waiting = []
        for job in self.jobs:
            done = self.folder.corpus(job) if isinstance(job, Corpus) else self.folder.result(job)  # a damaged one is told
            if done is None:
                waiting.append(job)
        too_large = [job for job in waiting if isinstance(job, Run) and job.ranks > places]
        if too_large:
            need = max(run.ranks for run in too_large)
            names = ", ".join(sorted({run.size for run in too_large}))
            raise UserError(
                f"sizes {names} need {need} ranks, here are {places} x {self.slots.kind}: use --jobs {need}, a larger "
                "machine, or --slurm"
            )
        return waiting

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Within, a signal asks the runs to save and leave; afterwards signals do what they did before."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.stop = True
            self.interrupts += number == signal.SIGINT
            for pid, child in self.children.items():
                if not child.done:
                    if self.interrupts > 1:
                        _end_all(pid)
                    else:
                        os.kill(pid, signal.SIGTERM)

        before = {number: signal.signal(number, handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _fork(self, job: Job, places: list[int]) -> None:
        parent = os.getpid()
        first = self.folder.steps_done(job) if isinstance(job, Run) else 0
        sys.stdout.flush()
        sys.stderr.flush()
        # a stop request between the fork and the entry in `children` must not be lost
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for number in _SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                code = self._body(job, places if self.slots.gpus else (), parent)
            finally:
                os._exit(code)  # nothing of the parent's is to be cleaned up here
        self.children[pid] = _Child(job, places, time.monotonic(), first)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _body(self, job: Job, devices: Sequence[int], parent: int) -> int:
        """What a forked process does; its exit code."""
        from megatron_synth.study.execute import worker

        if isinstance(job, Corpus):
            return worker.make(self.study, self.folder, job, devices, parent)
        # the weights of a run whose model generates are needed as long as the study goes on
        keep = self.study.keep_checkpoints or job.id in self.kept
        return worker.work(self.folder, job, devices, keep, parent)

    def _reap(self, waiting: list[Job]) -> None:
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
            job = child.job
            if code == EXIT_OK:
                if isinstance(job, Run):
                    steps = job.config.train.steps - child.first_step
                    self.progress.finished(job, seconds, steps * job.config.train.tokens_per_step)
                self.finished += 1
                self._tell(f"{job.name} done in {seconds:.0f} s, {self._made(job)}", waiting)
            elif code == EXIT_TAKEN:
                what = "made" if isinstance(job, Corpus) else "trained"
                self._tell(f"{job.name} is {what} by another process; left to it", waiting)
            elif not (self.stop and (code == EXIT_STOPPED or (self.interrupts > 1 and code == -signal.SIGKILL))):
                if code < 0:  # a signal, such as that of the kernel when memory runs out
                    self.folder.record_failure(job, code, f"killed by {signal.Signals(-code).name}")
                self.failed += 1
                why = self.folder.describe_failure(job) or f"exit code {code}"
                self._tell(f"{job.name} FAILED: {why}; see {self.folder.log(job)}", waiting)

    def _made(self, job: Job) -> str:
        """What has come of a job: losses, or how much text."""
        if isinstance(job, Corpus):
            made = self.folder.corpus(job)
            assert made is not None, job.name
            return f"{made['documents']:,} documents of {made['account']['asked']:,}, {compact(made['tokens'])} tokens"
        result = self.folder.result(job)
        assert result is not None, job.name
        return ", ".join(f"{name} {'n/a' if loss is None else f'{loss:.3f}'}" for name, loss in result["loss"].items())

    def _tell(self, text: str, waiting: Sequence[Job]) -> None:
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        say(f"[{self.finished}/{self.total}] {text} | eta {duration(self._eta(waiting))}", control=clear)

    def _running(self) -> list[Run]:
        return [child.job for child in self.children.values() if isinstance(child.job, Run)]

    def _eta(self, waiting: Sequence[Job]) -> float:
        """Seconds that the runs will take; those of corpora are not known."""
        running = {run.id: self.folder.steps_done(run) for run in self._running()}
        left = [*(job for job in waiting if isinstance(job, Run)), *self._running()]
        places = len(self.slots.free) + sum(len(child.places) for child in self.children.values())
        return self.progress.eta_s(left, running, places) if left else 0.0

    def _line(self, waiting: Sequence[Job]) -> str:
        """The progress line."""
        tokens = sum(run.own_tokens for run in self.runs)
        left = [*(job for job in waiting if isinstance(job, Run)), *self._running()]
        left_tokens = sum(run.own_tokens for run in left)
        for run in self._running():
            steps = self.folder.steps_done(run) - run.branch_step
            left_tokens -= steps * run.config.train.tokens_per_step
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
