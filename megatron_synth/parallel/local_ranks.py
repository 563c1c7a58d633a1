"""Ranks of one machine as processes that a program starts by itself, without torchrun: for benchmarks and tests."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets in the environment of a rank."""


@dataclass(frozen=True)
class LocalRank:
    """What a process needs to become a rank.

    held: ends of other ranks' pipes that a forked process has to close, or it would outlive its parent.
    log: file for standard output; standard error goes into the same one unless `error_log` is given.
    """

    rank: int
    world_size: int
    port: int
    log: Path
    error_log: Path | None = None
    held: tuple[connection.Connection, ...] = ()

    def enter(self, *, alone: bool = False) -> None:
        """Set this process's environment and standard streams.

        Args:
            alone: leave the launcher's variables out, as when a single rank is started by hand.
        """
        for pipe in self.held:
            pipe.close()
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        if not alone:
            values = (self.rank, self.rank, self.world_size, self.world_size, "127.0.0.1", self.port)
            os.environ.update(zip(LAUNCHER_VARIABLES, map(str, values), strict=True))
        for descriptor, path in ((1, self.log), (2, self.error_log or self.log)):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, descriptor)
            os.close(file)


@dataclass(frozen=True)
class Started:
    """The processes of a job and, by rank, the parent's ends of their pipes."""

    processes: list[Any]
    pipes: list[connection.Connection]


def start(
    context: Any,
    world_size: int,
    target: Callable[..., None],
    arguments: Sequence[Any],
    logs: Callable[[int], tuple[Path, Path | None]],
) -> Started:
    """Start `target(local_rank, pipe, *arguments)` in `world_size` processes.

    Args:
        context: of multiprocessing: `fork`, `spawn` or `forkserver`.
        world_size: number of ranks.
        target: what a process runs, with its LocalRank and its end of a two-way pipe first. It calls `local_rank.enter`.
        arguments: further arguments.
        logs: rank -> the files for standard output and error.
    """
    port = _free_port()
    started = Started([], [])
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        held = (*started.pipes, ours) if context.get_start_method() == "fork" else ()
        local_rank = LocalRank(rank, world_size, port, *logs(rank), held=held)
        process = context.Process(target=target, args=(local_rank, theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        started.processes.append(process)
        started.pipes.append(ours)
    return started


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
