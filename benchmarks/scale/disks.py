"""How much of the time training waits for batches from a disk of a given speed, with and without read-ahead."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from benchmarks.scale import corpus
from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.loading.prefetch import Prefetcher
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards.source import open_source

ROWS, SEQUENCE_LENGTH = 16, 8192
STEP_S = 0.2
"""What a step takes beside its data."""
STEPS, BUDGET_S = 30, 10
"""Steps that are measured, or fewer where they take longer than so many seconds together."""
PAGES = SEQUENCE_LENGTH * corpus.DTYPE.itemsize // 4096 + 1
NEEDED = ROWS * PAGES * 4096 / STEP_S
"""Bytes per second: whole pages of the rows of a step."""
RATES = (0.5, 1.0, 2.0, 4.0)
LATENCIES = (0.0, 0.005, 0.05)
WAYS = ((True, 1), (False, 1), (True, 0), (False, 0))
"""Memory map or not, threads of read-ahead."""


@dataclass(frozen=True)
class Wait:
    """Of the steps after the first: the share of the time in which training waited for its batch."""

    rate: float
    """Of the disk, in parts of what training needs."""
    latency: float
    memory_map: bool
    threads: int
    waited: float


@contextmanager
def slow_disk(folder: Path, mount: Path, control: Path) -> Iterator[None]:
    """The folder, seen at `mount` at the speed in `control`.

    Raises:
        UserError: there is no FUSE here.
    """
    command = [sys.executable, "-m", "benchmarks.scale.slow_disk", str(folder), str(mount), str(control)]
    serving = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not os.path.ismount(mount):
            if serving.poll() is not None:
                assert serving.stderr is not None
                raise UserError(
                    f"no slow disk: {serving.stderr.read().strip().splitlines()[-1]}; needs /dev/fuse, root, mfusepy and "
                    "libfuse (FUSE_LIBRARY_PATH names its file)"
                )
            time.sleep(0.05)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=False, stderr=subprocess.DEVNULL)
        serving.terminate()
        serving.wait(30)


def run(rates: Sequence[float] = RATES, latencies: Sequence[float] = LATENCIES) -> list[Wait]:
    """All of them, one after the other."""
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-disk-") as name:
        folder, mount, control = (Path(name) / part for part in ("data", "mount", "control"))
        mount.mkdir()
        corpus.write_source(folder / "web", 4, 25_000_000, seed=0)
        control.write_text("1e12 0")
        with slow_disk(folder, mount, control):
            for latency in latencies:
                for rate in rates:
                    for memory_map, threads in WAYS:
                        control.write_text("1e12 0")
                        loader = _loader(mount / "web", memory_map=memory_map)
                        control.write_text(f"{rate * NEEDED} {latency}")
                        found.append(Wait(rate, latency, memory_map, threads, _waited(loader, threads)))
    return found


def _loader(folder: Path, *, memory_map: bool) -> Loader:
    """Its shards are open, so that tokens alone are read at the disk's speed."""
    source = open_source(folder, "web", memory_map=memory_map)
    row = np.empty(1, np.int64)
    for number in range(4):
        source.read(source.first_token(number), row)
    plan = MixturePlan([SourceSpec("web", Fraction(1), source.num_windows(SEQUENCE_LENGTH), 1.0)], 1)
    places = {"data_parallel_rank": 0, "data_parallel_size": 1}
    return Loader(plan, [source], sequence_length=SEQUENCE_LENGTH, micro_batch_size=ROWS, **places)


def _waited(loader: Loader, threads: int) -> float:
    waited = 0.0
    with Prefetcher(loader, ROWS, threads=threads) as prefetcher:
        prefetcher.step(0)
        time.sleep(STEP_S)
        began = time.perf_counter()
        for step in range(1, STEPS + 1):
            asked = time.perf_counter()
            prefetcher.step(step * ROWS)
            waited += time.perf_counter() - asked
            time.sleep(STEP_S)
            if time.perf_counter() - began > BUDGET_S:
                break
        return waited / (time.perf_counter() - began)


def rows(results: Sequence[Wait]) -> list[list[str]]:
    """The table, head first."""
    names = {
        (True, 1): "read ahead",
        (False, 1): "read ahead, no memory map",
        (True, 0): "no read-ahead",
        (False, 0): "neither",
    }
    table = [["latency, ms", "disk / needed", *(f"{names[way]}, waited" for way in WAYS)]]
    for latency, rate in dict.fromkeys((one.latency, one.rate) for one in results):
        cells = {(one.memory_map, one.threads): one.waited for one in results if (one.latency, one.rate) == (latency, rate)}
        table.append([f"{1000 * latency:.0f}", f"{rate:g}", *(f"{100 * cells[way]:.0f}%" for way in WAYS)])
    return table
