"""Starts of our loader: by number of shards, with the memory that they take, and by number of sources in the mixture."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader.memory import anonymous_bytes
from benchmarks.made_up import save_manifest
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.mixing.apportionment import Apportionment
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards.indexed import ShardWriter
from megatron_synth.data.shards.manifest import ShardInfo
from megatron_synth.data.shards.source import Source, open_source

SHARDS = (1, 100, 10_000)
SAMPLES = (10**5, 10**7, 10**12)
"""Where in a run the loader is started."""
ROWS, SEQUENCE_LENGTH = 8, 1024
STEP = 512
"""Samples of an optimizer step."""
TRIALS = 9
SOURCES = (2, 4, 8, 16, 32, 64)
MIXTURES, DENOMINATOR = 25, 10**6


def write_many_shards(folder: Path, shards: int, tokens: int) -> Path:
    """A prepared source of equal shards of so many tokens each. All names stand for one file pair: it is only read."""
    folder.mkdir()
    names = [f"shard-{number:05d}" for number in range(shards)]
    writer = ShardWriter(folder / names[0], np.dtype(np.uint16))
    documents = np.diff([*range(0, tokens, 100), tokens])
    writer.add(np.arange(tokens, dtype=np.uint16), documents)
    written = vars(writer.finish())
    for name in names[1:]:
        for suffix in (".bin", ".idx"):
            os.link(folder / f"{names[0]}{suffix}", folder / f"{name}{suffix}")
    save_manifest(folder, [ShardInfo(name=name, **written) for name in names], "uint16", 2**16)
    return folder


def run(shards: Sequence[int] = SHARDS) -> list[dict[str, Any]]:
    """All figures of each number of shards, in a process of its own."""
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-shards-") as name:
        for number in shards:
            folder = write_many_shards(Path(name) / f"of-{number}", number, 2 * SEQUENCE_LENGTH)
            command = [sys.executable, "-m", "benchmarks.loader.startup", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append({"shards": number, **json.loads(done.stdout.splitlines()[-1])})
    return results


def measure(folder: Path) -> dict[str, Any]:
    """Seconds to read the manifest and check all files; from the manifest to the first batch; memory that a longer run adds."""
    began = time.perf_counter()
    source = open_source(folder, "s")
    opened_s = time.perf_counter() - began
    _first_batch(source, 0)
    before = anonymous_bytes()
    starts = {}
    for samples in SAMPLES:
        trials = []
        for _ in range(TRIALS):
            began = time.perf_counter()
            # a source of its own, as a process has; what was checked on opening is not checked again
            fresh = Source("s", folder, source.manifest)
            _first_batch(fresh, samples // ROWS * ROWS)
            trials.append(time.perf_counter() - began)
        starts[str(samples)] = sorted(trials)[TRIALS // 2]
    return {"opened_s": opened_s, "start_s": starts, "growth_bytes": max(0, anonymous_bytes() - before)}


def _first_batch(source: Source, first_sample: int) -> None:
    plan = MixturePlan([SourceSpec("s", Fraction(1), source.num_windows(SEQUENCE_LENGTH), math.inf)], 1)
    loader = Loader(
        plan,
        [source],
        sequence_length=SEQUENCE_LENGTH,
        micro_batch_size=ROWS,
        data_parallel_rank=0,
        data_parallel_size=1,
        with_boundaries=True,
    )
    next(loader.micro_batches(first_sample, ROWS))


def mixtures() -> list[dict[str, Any]]:
    """Seconds to find the sources of an optimizer step far into a run, with nothing built before, of random mixtures."""
    random = np.random.default_rng(0)
    results = []
    for number in SOURCES:
        seconds, smallest = [], []
        for _ in range(MIXTURES):
            cuts = np.sort(random.choice(np.arange(1, DENOMINATOR), number - 1, replace=False)).tolist()
            ratios = [Fraction(end - begin, DENOMINATOR) for begin, end in zip([0, *cuts], [*cuts, DENOMINATOR], strict=True)]
            first = int(random.integers(SAMPLES[-1]))
            began = time.perf_counter()
            Apportionment(ratios).locate(np.arange(first, first + STEP))
            seconds.append(time.perf_counter() - began)
            smallest.append(float(min(ratios)))
        results.append({"sources": number, "seconds": sorted(seconds), "smallest": sorted(smallest)})
    return results


def mixture_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table of `mixtures`, head first."""
    rows = [
        ["sources", "found in, median, ms", "9 of 10 within, ms", "longest, ms", "smallest ratio, median", "smallest of all"]
    ]
    for result in results:
        times = [f"{1000 * result['seconds'][place]:.2f}" for place in (MIXTURES // 2, MIXTURES * 9 // 10, -1)]
        ratios = [f"{result['smallest'][place]:.1e}" for place in (MIXTURES // 2, 0)]
        rows.append([str(result["sources"]), *times, *ratios])
    return rows


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table, head first."""
    starts = [f"first batch at {samples:.0e}, ms".replace("e+0", "e").replace("e+", "e") for samples in SAMPLES]
    rows = [["shards", "files opened and checked, ms", *starts, "growth 1e5 to 1e12, MiB"]]
    for result in results:
        found = [f"{1000 * result['start_s'][str(samples)]:.2f}" for samples in SAMPLES]
        rows.append(
            [f"{result['shards']:,}", f"{1000 * result['opened_s']:.1f}", *found, f"{result['growth_bytes'] / 2**20:.1f}"]
        )
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))), flush=True)
