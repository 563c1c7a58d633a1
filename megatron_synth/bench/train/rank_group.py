"""Training engines in processes of their own that wait to be asked for a block of steps.

So two configurations can be timed in turn though neither can share a process with the other: each has its own environment,
process group and memory, and one that fails ends alone. While one works the other waits for its pipe, and does nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_synth.bench.train.engine import Block, Engine, allocated, random_batches, run_block
from megatron_synth.bench.train.sweep import OUT_OF_MEMORY
from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config
from megatron_synth.parallel import engine, local_ranks
from megatron_synth.parallel.groups import process_group
from megatron_synth.parallel.plan import Layout
from megatron_synth.train.garbage import ManualCollection

BATCHES = 4
"""Optimizer steps' worth of distinct random tokens; the timed steps walk round them."""
OOM_STATUS = "out of memory"


class RankGroupFailed(Exception):
    """A group that cannot go on. `status`: `out of memory`, `too slow` or `failed`; `error`: what it said."""

    def __init__(self, status: str, error: str):
        self.status, self.error = status, error
        super().__init__(f"{status}: {error}")


@dataclass(frozen=True)
class Job:
    """What a group trains."""

    config: Config
    layout: Layout
    warmup: int
    """Steps before anything is timed, at least 1."""
    environment: tuple[tuple[str, str], ...] = ()
    real_data: bool = False
    read_ahead: bool = True
    measured_steps: int = 0
    """All steps that will be asked for, for the length of the loader's plan."""


@dataclass(frozen=True)
class Ready:
    """A rank's first steps."""

    losses: tuple[float, ...]
    """Of the warm-up steps, nats per token; equal on all ranks."""
    start_s: float
    """From the joined processes to the end of the first step: model, optimizer, whatever is compiled."""
    device: str


def prepare(on_gpu: bool) -> str:
    """Import the engine once, for all processes to come.

    Returns:
        How `RankGroup` is to start them: `fork`, or `spawn` where CUDA was touched here and a forked process could not use it:
        each then imports the engine by itself. An import may have initialized it, as an optional library's does, or devices
        were counted by the runtime, since NVML is not to be had, as in some containers.
    """
    # torch then counts devices through the driver's library, and does not initialize CUDA
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    engine.load()
    if not on_gpu:
        return "fork"
    touched = torch.cuda.is_initialized() or torch.cuda._device_count_nvml() < 0
    return "spawn" if touched else "fork"


class RankGroup:
    """The ranks of one configuration."""

    def __init__(self, job: Job, method: str, timeout_s: float):
        """Start the processes; `ready` waits for them."""
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context(method)
        started = local_ranks.start(context, job.layout.world_size, _rank, (job,), lambda rank: (self._log(rank), None))
        self._processes, self._pipes = started.processes, started.pipes

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for process in self._processes:
            if process.is_alive() and error is not None:
                process.kill()
            process.join(self._timeout_s)
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def ready(self) -> Ready:
        """Wait for the warm-up steps. The losses are rank 0's, the time that of the slowest rank."""
        replies: list[Ready] = self._replies()
        return Ready(replies[0].losses, max(reply.start_s for reply in replies), replies[0].device)

    def block(self, steps: int) -> Block:
        """Time `steps` steps: rank 0's clock, processor time summed over the ranks, memory of the busiest."""
        replies: list[Block] = self._ask("block", steps)
        cpu = tuple(sum(times) for times in zip(*(reply.cpu_s for reply in replies), strict=True))
        return Block(replies[0].step_s, cpu, max(reply.peak_bytes for reply in replies))

    def end(self) -> int:
        """Let the processes go. Returns the peak of the busiest rank's tensors in bytes."""
        peaks: list[int] = self._ask("end", 0)
        return max(peaks)

    def _ask(self, what: str, argument: int) -> list[Any]:
        for pipe in self._pipes:
            try:
                pipe.send((what, argument))
            except BrokenPipeError:  # its reply, or the lack of it, tells why
                continue
        return self._replies()

    def _replies(self) -> list[Any]:
        """Every rank's reply; the first failure ends all."""
        deadline = time.monotonic() + self._timeout_s
        found: dict[int, Any] = {}
        while len(found) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankGroupFailed("too slow", f"no answer within {self._timeout_s:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, connection.Connection)
                rank = waiting[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(5)
                    code = self._processes[rank].exitcode
                    # the kernel ends a process that outgrows the host with SIGKILL
                    status = OOM_STATUS if code == -9 else "failed"
                    raise RankGroupFailed(status, f"rank {rank} ended with {code}{self._last_line(rank)}") from None
                if kind == "error":
                    raise RankGroupFailed(OOM_STATUS if OUT_OF_MEMORY.search(value) else "failed", value)
                found[rank] = value
        return [found[rank] for rank in range(len(found))]

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"{rank}.log"

    def _last_line(self, rank: int) -> str:
        log = self._log(rank)
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return f": {lines[-1].strip()[:300]}" if lines else ""


def _rank(local_rank: local_ranks.LocalRank, pipe: connection.Connection, job: Job) -> None:
    """The life of a rank: join, build, warm up, then blocks as they are asked for."""
    local_rank.enter()
    os.environ.update(job.environment)
    try:
        _work(job, pipe)
    except EOFError:  # the parent is gone
        return
    except Exception as error:  # whatever it is, it is the parent's to tell
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        # a UserError's lines are one message; of others the first says what, the rest is often a stack
        text = " ".join(lines) if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"
        pipe.send(("error", text[:300]))


def _work(job: Job, pipe: connection.Connection) -> None:
    from megatron_synth.train.record.run_dir import device_name

    with process_group(job.layout, job.config.train.seed) as ranks:
        source, config = _batches(job, ranks)
        with source as batches, ManualCollection(config.train.gc_interval) as collection:
            before, began = allocated(ranks.device), time.perf_counter()
            engine = Engine(config, job.layout, ranks)
            losses: list[float] = []
            start_s = 0.0
            for step in range(job.warmup):
                engine.step(batches[step % len(batches)])
                losses.append(engine.loss())
                start_s = start_s or time.perf_counter() - began
            static = allocated(ranks.device) - before
            collecting = _Collecting(engine, collection, job.warmup)
            pipe.send(("ready", Ready(tuple(losses), start_s, device_name())))
            most = 0
            while True:
                what, argument = pipe.recv()
                if what == "end":
                    break
                block = run_block(collecting, batches, argument, ranks.device)
                most = max(most, static + block.peak_bytes)
                pipe.send(("block", block))
        if ranks.device.type != "cuda":
            from megatron_synth.bench.train.memory import measure

            del engine, collecting
            most = measure(config, job.layout, ranks).peak
        pipe.send(("peak", most))


class _Collecting:
    """The engine's steps with Python's garbage collected between them, as the trainer does."""

    def __init__(self, engine: Engine, collection: ManualCollection, done: int):
        self.name, self._engine, self._collection, self._done = engine.name, engine, collection, done
        self.loss: Callable[[], float] = engine.loss

    def step(self, batches: Any) -> None:
        self._engine.step(batches)
        self._done += 1
        self._collection.after_step(self._done)


def _batches(job: Job, ranks: Any) -> tuple[AbstractContextManager[Any], Config]:
    """What the steps are trained on, and the configuration with the vocabulary of it."""
    if not job.real_data:
        return nullcontext(random_batches(job.config, job.layout, ranks, BATCHES)), job.config
    from megatron_synth.bench.train.data import real_batches, with_data

    config, data = with_data(job.config, job.warmup + job.measured_steps + 1)
    return real_batches(config, job.layout, ranks, data, read_ahead=job.read_ahead), config
