"""A function run in a process that dies at its n-th change to the disk: half a write, a rename, a removal, a sync.

Every write of a file, fsync, mkdir, rename and removal is one step. A process can die as when it is killed, which keeps
all that was handed to the system, or as when the power fails: then files that were not forced to disk come back empty.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_synth.config.errors import UserError


@dataclass(frozen=True)
class Ended:
    """How a process ended. steps: changes to the disk that it made; both None when it was killed."""

    killed: bool
    refused: str | None = None
    steps: int | None = None


def run_until(step: int | None, power_fails: bool, function: Callable[..., Any], *arguments: Any) -> Ended:
    """Run `function(*arguments)` in a copy of this process, which dies at change `step` to the disk; None: it does not."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads do not come along: `function` must not need them
        process = os.fork()
    if process == 0:
        os.close(read)
        _run(write, step, power_fails, function, arguments)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    _, status = os.waitpid(process, 0)
    if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
        return Ended(True)
    refused, steps = json.loads(data)
    return Ended(False, refused, steps)


def _run(result: int, step: int | None, power_fails: bool, function: Callable[..., Any], arguments: Any) -> NoReturn:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        disk = _Disk(step, power_fails)
        disk.watch()
        try:
            function(*arguments)
            refused = None
        except UserError as error:
            refused = str(error)
        os.write(result, json.dumps([refused, disk.steps]).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


class _Disk:
    """Counts what this process does to the disk."""

    def __init__(self, last: int | None, power_fails: bool):
        self.steps = 0
        self._last, self._power_fails = last, power_fails
        self._not_synced: set[str] = set()
        self._truncate = os.truncate

    def watch(self) -> None:
        """From now on."""
        real_open = io.open

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            found = real_open(file, mode, *arguments, **options)
            if not set(mode) & set("wax+"):
                return found
            self._not_synced.add(_path_of(found.fileno()))
            return _Watched(found, self)

        def fsync(file: int) -> None:
            # the disk itself is left alone: what a power failure loses is made up here, and syncs are slow
            self.step()
            self._not_synced.discard(_path_of(file))

        builtins.open = io.open = opened  # type: ignore[assignment]
        os.fsync = fsync
        for name in ("unlink", "remove", "rmdir", "mkdir", "truncate"):
            setattr(os, name, self._counted(getattr(os, name)))
        for name in ("rename", "replace"):
            setattr(os, name, self._moving(getattr(os, name)))

    def step(self, half: Callable[[], object] = lambda: None) -> None:
        """One step; the last one is only done by half."""
        self.steps += 1
        if self.steps == self._last:
            half()
            if self._power_fails:
                for path in self._not_synced:
                    if Path(path).exists():
                        self._truncate(path, 0)
            os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.step()
            return real(*arguments, **options)

        return counted

    def _moving(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def moving(old: Any, new: Any, **options: Any) -> Any:
            self.step()
            real(old, new, **options)
            before, after = os.path.abspath(old), os.path.abspath(new)  # noqa: PTH100 (links stay)
            self._not_synced = {
                after + path.removeprefix(before) if path == before or path.startswith(before + os.sep) else path
                for path in self._not_synced
            }

        return moving


class _Watched:
    """A file that is written to. What it buffers is lost with the process, as it is in a kill."""

    def __init__(self, file: Any, disk: _Disk):
        self._file, self._disk = file, disk

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._disk.step(half)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _path_of(file: int) -> str:
    return str(Path(f"/proc/self/fd/{file}").readlink())
