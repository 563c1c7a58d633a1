"""Batches made ready in the background by one thread, in buffers that are used again.

One thread and not processes: copying releases the interpreter lock, and a batch that passes between processes is copied
once more and costs many times as much.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np

from megatron_synth.data.loading.loader import Batch, Loader, Tokens

STEPS_AHEAD = 2
"""Steps that are ready or in the making while one is trained."""
SLOW_ROW_S = 50e-6
"""A row that takes longer was not in the page cache: then the disk is asked for steps before they are read."""
ASKED_STEPS = 2
"""Steps that a slow disk is asked for beyond the one that is read."""
ASKED_LONGER = 64
"""Steps without a slow row, after which the disk is not asked any more: rows that were asked for are quick."""

Allocate = Callable[[tuple[int, int], np.dtype[Any]], Tokens]


class Prefetcher:
    """A loader's steps, one after the other. What it delivers is what the loader delivers, with or without the thread.

    The tokens of a step lie in buffers that are filled again once the step after it is asked for: until then they must
    have been used or copied.
    """

    def __init__(
        self,
        loader: Loader,
        step_samples: int | Callable[[int], int],
        *,
        threads: int = 1,
        end_sample: int | None = None,
        allocate: Allocate = np.empty,
    ):
        """Prefetch from `loader`.

        Args:
            loader: used by the thread alone from now on.
            step_samples: samples of a step, over all ranks; where steps differ, a function of the step's first sample.
            threads: 1, or 0 to make batches when they are asked for.
            end_sample: the thread goes no further than to this sample. Default: as far as the plan goes.
            allocate: makes a buffer from shape and type, such as one of pinned memory.
        """
        assert threads in (0, 1), "one thread keeps the order and is enough"
        self.loader, self._threads = loader, threads
        self.step_samples = step_samples if callable(step_samples) else lambda first_sample: step_samples
        self._allocate = allocate
        limits = [limit for limit in (end_sample, loader.plan.samples) if limit is not None]
        self._end = min(limits, default=None)
        # those that wait for the thread; a spare set in the caller's hands
        self._buffers: list[list[Tokens]] = [[] for _ in range(STEPS_AHEAD + 1)]
        self._in_use: list[Tokens] | None = None
        self._worker: _Worker | None = None

    def step(self, first_sample: int) -> list[Batch]:
        """This rank's micro-batches of the step that consumes samples from `first_sample` on.

        Steps may be asked for in any order; those that follow each other are ready before they are asked for.

        Raises:
            UserError: of the loader, here and not in the thread.
        """
        size = self.step_samples(first_sample)
        if not self._threads or (self._end is not None and first_sample + size > self._end):
            self.close()
            if self._in_use is None:
                self._in_use = self._buffers.pop()
            buffers = self._in_use
            return list(self.loader.micro_batches(first_sample, size, _take_from(buffers, self._allocate)))
        worker = self._worker
        if worker is None or worker.next_sample != first_sample:
            self.close()
            if self._in_use is not None:
                self._buffers.append(self._in_use)
            worker = self._worker = _Worker(
                self.loader, self.step_samples, first_sample, self._end, self._buffers, self._allocate
            )
        elif self._in_use is not None:
            worker.free.put(self._in_use)
        self._in_use = None
        batches, self._in_use = worker.get()
        return batches

    def close(self) -> None:
        """Stop the thread and wait for it. The next `step` starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()
            # in the caller's hands until now: new ones take their place
            self._buffers = [*worker.reclaimed(), *([] if self._in_use is None else [self._in_use])]
            self._buffers += [[] for _ in range(STEPS_AHEAD + 1 - len(self._buffers))]
            self._in_use = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class _Worker:
    """A thread that makes the steps from one sample on."""

    def __init__(
        self,
        loader: Loader,
        step_samples: Callable[[int], int],
        first_sample: int,
        end_sample: int | None,
        buffers: list[list[Tokens]],
        allocate: Allocate,
    ):
        self._loader, self._size_of, self._allocate = loader, step_samples, allocate
        self._end = math.inf if end_sample is None else end_sample
        self.next_sample = first_sample
        self.free: SimpleQueue[list[Tokens] | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[list[Batch], list[Tokens]] | BaseException] = SimpleQueue()
        self._stopping = False
        self._asked = first_sample
        """The disk was asked for all samples before."""
        for own in buffers:
            self.free.put(own)
        self._thread = threading.Thread(target=self._run, args=(first_sample,), name="prefetch", daemon=True)
        self._thread.start()

    def get(self) -> tuple[list[Batch], list[Tokens]]:
        made = self._ready.get()
        if isinstance(made, BaseException):
            self._ready.put(made)  # whoever asks again hears the same
            raise made
        self.next_sample += self._size_of(self.next_sample)
        return made

    def stop(self) -> None:
        self._stopping = True
        self.free.put(None)
        self._thread.join()

    def reclaimed(self) -> list[list[Tokens]]:
        """Buffers that came back, or were filled and not taken."""
        found: list[list[Tokens]] = []
        while not self.free.empty():
            own = self.free.get()
            if own is not None:
                found.append(own)
        while not self._ready.empty():
            made = self._ready.get()
            if not isinstance(made, BaseException):
                found.append(made[1])
        return found

    def _run(self, first_sample: int) -> None:
        asking = 0
        try:
            self._ask(first_sample, 1)
            while first_sample + (size := self._size_of(first_sample)) <= self._end:
                buffers = self.free.get()
                if buffers is None or self._stopping:
                    return
                if asking:
                    self._ask(first_sample, 1 + ASKED_STEPS)
                began = time.perf_counter()
                batches = list(self._loader.micro_batches(first_sample, size, _take_from(buffers, self._allocate)))
                rows = size // self._loader.data_parallel_size
                asking = ASKED_LONGER if time.perf_counter() - began > SLOW_ROW_S * rows else max(asking - 1, 0)
                self._ready.put((batches, buffers))
                first_sample += size
        except BaseException as error:  # the consumer raises it
            self._ready.put(error)

    def _ask(self, first_sample: int, steps: int) -> None:
        """Ask the system for the rows of so many steps, all of them at once; of those asked for before it is not again."""
        for _ in range(steps):
            end = first_sample + self._size_of(first_sample)
            if end > self._end:
                return
            if first_sample >= self._asked:
                self._loader.will_need(first_sample, end - first_sample)
                self._asked = end
            first_sample = end


def _take_from(buffers: list[Tokens], allocate: Allocate) -> Allocate:
    """Gives the buffers one after the other, and makes those that are lacking."""
    existing: Iterator[Tokens] = iter(tuple(buffers))

    def take(shape: tuple[int, int], dtype: np.dtype[Any]) -> Tokens:
        buffer = next(existing, None)
        if buffer is None:
            buffer = allocate(shape, dtype)
            buffers.append(buffer)
        assert buffer.shape == shape and buffer.dtype == dtype
        return buffer

    return take
