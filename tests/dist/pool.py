"""Jobs on several ranks, as torchrun would start them, without its 5 to 8 seconds of imports per process.

One server process imports everything once per session; the ranks of a job are forked from it. Every job therefore begins
with fresh processes: whatever a job leaves behind, a broken process group included, ends with it, and a rank that hangs or
dies costs nothing but its own job.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_synth.parallel import local_ranks
from tests.support import ROOT

_PRELOAD = ["pytest", "tests.dist.engine"]
_ENGINE = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
}
"""Environment of the server, and so of all ranks."""
_GRACE_S = 15.0
"""How long the others may go on after a rank has failed."""


@dataclass(frozen=True)
class RankResult:
    """What a rank returned and printed."""

    value: Any
    stdout: str
    stderr: str


class RanksFailed(AssertionError):
    """A job that did not return on every rank.

    failures: rank to what happened, for the ranks that raised, died or hung by themselves.
    exit_codes: rank to exit code of the process, negative for a signal; None if it had to be ended.
    """

    def __init__(self, job: str, failures: dict[int, str], exit_codes: dict[int, int | None], output: str):
        self.failures, self.exit_codes = failures, exit_codes
        parts = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
        super().__init__("\n".join([f"{job} failed", *parts, output]))


@contextmanager
def _environment(values: dict[str, str]) -> Any:
    saved = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _work(local_rank: local_ranks.LocalRank, results: connection.Connection, timeout: float, function: str, args: Any) -> None:
    """The life of a rank."""
    local_rank.enter(alone=local_rank.world_size == 1)
    # the server's own are bound to what it was started with
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.dump_traceback_later(timeout, file=sys.stderr)
    try:
        if "megatron.core" not in sys.modules:
            raise RuntimeError(f"the fork server could not import {_PRELOAD}: import it by hand to see why")
        module, _, name = function.rpartition(".")
        outcome = (True, getattr(importlib.import_module(module), name)(*args))
    except SystemExit as ended:
        outcome = (False, f"SystemExit({ended.code!r})")
    except BaseException:  # a rank reports whatever ends it
        outcome = (False, traceback.format_exc())
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        sys.stderr.flush()
    results.send(outcome)
    results.close()


class RankPool:
    """Runs jobs on up to 4 ranks, one after the other."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._context = multiprocessing.get_context("forkserver")
        # A process has one fork server. If other tests have started it, it has imported what they asked for: start ours now.
        server: Any = forkserver._forkserver  # type: ignore[attr-defined]
        server._stop()
        self._context.set_forkserver_preload(_PRELOAD)
        with _environment(_ENGINE):
            server.ensure_running()
        self._jobs = 0

    def close(self) -> None:
        """Remove the captured output."""
        self._folder.cleanup()

    def run(self, world_size: int, function: str, *args: Any, timeout: float = 120.0) -> list[RankResult]:
        """Call `function` (dotted name) with `args` in the main thread of each of `world_size` new processes.

        A single rank gets no launcher's environment, as if it were started by hand.

        Raises:
            RanksFailed: a rank raised, died or did not return in time; all ranks are ended by then.
        """
        assert 1 <= world_size <= 4
        self._jobs += 1
        output = [str(Path(self._folder.name) / f"{self._jobs}-{rank}") for rank in range(world_size)]
        started = local_ranks.start(
            self._context,
            world_size,
            _work,
            (timeout, function, args),
            lambda rank: (Path(f"{output[rank]}.out"), Path(f"{output[rank]}.err")),
        )
        processes, pipes = started.processes, started.pipes
        try:
            return self._collect(function, processes, pipes, output, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()

    def _collect(
        self,
        function: str,
        processes: list[BaseProcess],
        pipes: list[connection.Connection],
        output: list[str],
        timeout: float,
    ) -> list[RankResult]:
        values: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        deadline = time.monotonic() + timeout + 1  # a hanging rank prints where it is before that
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, connection.Connection)
                rank = waiting.pop(pipe)
                try:
                    fine, value = pipe.recv()
                except EOFError:
                    processes[rank].join(5)
                    fine, value = False, f"died with exit code {processes[rank].exitcode}"
                if fine:
                    values[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if not waiting and not failures:
            return [RankResult(values[rank], *_read_output(output[rank])) for rank in range(len(processes))]
        for rank, process in enumerate(processes):
            if rank not in waiting.values():
                process.join(5)  # it has sent its result and is about to end
        late = "was ended: it went on after another rank had failed" if failures else f"did not return in {timeout:g} s"
        failures |= {rank: late for rank in waiting.values()}
        exit_codes = {rank: None if rank in waiting.values() else process.exitcode for rank, process in enumerate(processes)}
        printed = "\n".join(f"--- output of rank {rank}\n{''.join(_read_output(name))}" for rank, name in enumerate(output))
        raise RanksFailed(function, failures, exit_codes, printed)


def _read_output(prefix: str) -> tuple[str, str]:
    """stdout and stderr of a rank; empty if it died before it had any."""
    files = [Path(f"{prefix}.{suffix}") for suffix in ("out", "err")]
    out, err = (file.read_text(errors="replace") if file.exists() else "" for file in files)
    return out, err
