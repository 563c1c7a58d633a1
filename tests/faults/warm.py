"""Processes that begin with everything imported, for campaigns that start hundreds of programs.

`install` lets `subprocess` fork this process, and not start a new interpreter, where the command is `python -m` with a module
of this project. All that `subprocess` promises holds: descriptors, environment, folder, session, the parent. Signals have
their defaults, and nothing of this process runs at the child's exit. What others start (a shell, `forkserver`) is not touched.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "megatron.core.optimizer",
    "megatron_synth.cli.train",
    "megatron_synth.cli.study",
    "megatron_synth.cli.prepare",
    "megatron_synth.cli.synthesize",
    "megatron_synth.data.preparing.prepare",
    "megatron_synth.model.build",
    "megatron_synth.parallel.wrap",
    "megatron_synth.study.execute.local",
    "megatron_synth.synthesis.run",
    "megatron_synth.train.loop",
    "torch.distributed.run",
)
_OURS = ("megatron_synth", "megatron_synth.cluster.agent")


def install() -> None:
    """Import what programs need, and have `subprocess` fork from here on.

    Raises:
        AssertionError: a thread runs here, which a fork would lose.
    """
    for name in MODULES:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "set OMP_NUM_THREADS=1: libraries have started threads"
    original = subprocess._fork_exec  # type: ignore[attr-defined]

    def fork_exec(arguments: Any, *rest: Any) -> int:
        words = [os.fsdecode(word) for word in arguments]
        module = words.index("-m") + 1 if words[0] == sys.executable and "-m" in words[:3] else 0
        if module == 0 or words[module] not in _OURS:
            return int(original(arguments, *rest))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        process = os.fork()
        if process == 0:
            _become(words[module], words[module + 1 :], "-u" in words[1:module], *rest)
        return process

    subprocess._fork_exec = fork_exec  # type: ignore[attr-defined]


def _become(
    module: str,
    arguments: list[str],
    unbuffered: bool,
    _executables: Any,
    close_others: bool,
    kept: tuple[int, ...],
    folder: Any,
    environment: list[bytes] | None,
    stdin: int,
    _stdin_of_parent: int,
    _stdout_of_parent: int,
    stdout: int,
    _stderr_of_parent: int,
    stderr: int,
    _error_of_parent: int,
    error_pipe: int,
    _restore_signals: bool,
    new_session: bool,
    *_more: Any,
) -> NoReturn:
    """What `_posixsubprocess.fork_exec` does in the child, then the module as `python -m` runs it."""
    code = 255
    try:
        atexit._clear()
        _default_signals()
        for number, descriptor in enumerate((stdin, stdout, stderr)):
            if descriptor >= 0:
                os.dup2(descriptor, number, inheritable=True)
        if folder is not None:
            os.chdir(folder)
        if new_session:
            os.setsid()
        if environment is not None:
            os.environ.clear()
            os.environ.update(os.fsdecode(pair).split("=", 1) for pair in environment)
        if error_pipe >= 0:
            os.close(error_pipe)  # the parent reads from it that all went well
        if close_others:
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor not in kept:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
        sys.stdout = open(1, "w", buffering=1 if unbuffered else -1, closefd=False, encoding="utf-8")  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        sys.argv = [module, *arguments]
        code = _run(module)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _run(module: str) -> int:
    """Exit code of a module, as an interpreter gives it."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        atexit._run_exitfuncs()
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 255
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        atexit._run_exitfuncs()
        return 1
    atexit._run_exitfuncs()
    return 0
