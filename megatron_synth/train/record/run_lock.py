"""A run directory while it is trained in: nobody else's, and its events tell how the start ended."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

from megatron_synth.config.errors import EXIT_STOPPED, UserError
from megatron_synth.core import exit_record
from megatron_synth.core.lock import Holder, Lock, folder_for, holder, refuse_held
from megatron_synth.core.log import one_line
from megatron_synth.train.record.run_dir import RunDir

LOCK = ".lock"
"""In a run directory: who trains there now, or did when it died."""


def refuse_used(path: Path) -> None:
    """Refuse at once a run directory in which a program of this machine works.

    Raises:
        UserError: names it.
    """
    refuse_held(path / LOCK)


def user_of(path: Path) -> Holder | None:
    """Who trains in a run directory, or died there; None if it was left in order."""
    with contextlib.suppress(OSError):
        return holder(path / LOCK)
    return None


class RunLock:
    """The run directory `path`, from `take` on this process's alone. A context, on rank 0; elsewhere it does nothing."""

    def __init__(self, path: Path):
        self._path = path.resolve()
        self._open = contextlib.ExitStack()
        self._lock: Lock | None = None
        self._run: RunDir | None = None

    def take(self) -> None:
        """Make the directory and lock it.

        Raises:
            UserError: another program works there, something else is there, or it cannot be written.
        """
        if not (self._path / "run.json").exists():
            RunDir.check_free(self._path)
        self._open.enter_context(folder_for(self._path))
        self._lock = self._open.enter_context(Lock(self._path / LOCK, "train"))
        self._open.enter_context(exit_record.told_at_end(self._end))

    def begin(self, run: RunDir) -> None:
        """This start is in the record of the run: from now on its end is told there, too."""
        self._run = run
        dead = None if self._lock is None else self._lock.taken_over
        if dead is not None:
            run.event(f"the start before this one died without a word, killed or with its machine: {dead.name}")

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._tell(self._failure(error))
        self._open.close()

    def _end(self, code: int, error: BaseException | None) -> None:
        """The process ends amid the run, and says so in the last moment."""
        if code == EXIT_STOPPED:
            self._tell(f"stopped on request at step {_step()}, before the first step of this start")
        elif error is not None:
            self._tell(f"failed at step {_step()}: {one_line(str(error))[:300]}")
        else:
            self._tell(f"interrupted at step {_step()}, without a save")
        if self._lock is not None:
            self._lock.release()

    def _failure(self, error: BaseException) -> str:
        first = next(iter(str(error).splitlines()), "")
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return f"failed at step {_step()}: {name}{one_line(first)[:300]}"

    def _tell(self, text: str) -> None:
        if self._run is not None:
            with contextlib.suppress(OSError):  # the disk may be what the failure is about
                self._run.event(text)
            self._run = None  # it ends once


def _step() -> int:
    return exit_record.last_step() or 0
