"""Many settings of one training benchmark, each in processes of its own: what runs out of memory ends alone.

Points come from the layout search, pruned by the memory estimate and tried in the order of the predicted speed. Every point is
`megatron-synth bench train ... --vs none --json FILE`, which runs by itself just as well.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.core.log import say
from megatron_synth.estimate.memory import Device, memory_per_rank
from megatron_synth.parallel.plan import plan

OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|can't allocate memory|Cannot allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Point:
    """One setting of the sweep."""

    settings: tuple[str, ...]
    ranks: int
    predicted_bytes: int
    """Of the fullest rank, by the memory model."""


@dataclass
class Outcome:
    """What became of a point."""

    point: Point
    status: str
    """`measured`, `out of memory`, `too slow`, `failed` or `not tried: ...`."""
    result: dict[str, Any] | None = None
    """What `--json` wrote."""
    took_s: float = 0.0
    error: str = field(default="", repr=False)
    label: str = ""
    """Its row in a table."""

    @property
    def tokens_per_s(self) -> float:
        """Per rank; 0 when there is no measurement."""
        return 0.0 if self.result is None else float(self.result["rows"][0]["tokens_per_s_per_rank"])


def points(
    config_path: str, settings: Sequence[str], ranks: int, axes: dict[str, list[str]], device: Device
) -> tuple[list[Point], list[Outcome]]:
    """All combinations of the axes that the rules allow, and those that they do not, with the reason.

    Args:
        config_path: the configuration to vary.
        settings: overrides that hold for every point.
        ranks: processes of each point.
        axes: key to values.
        device: whose kernels the memory estimate is for.
    """
    legal, refused = [], []
    for values in itertools.product(*axes.values()):
        chosen = tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        try:
            config = load_file(Config, config_path, [*settings, *chosen])
            layout = plan(config, ranks)
        except ConfigError as error:
            reason = str(error.problems[0])
            refused.append(Outcome(Point(chosen, ranks, 0), f"not tried: {reason}"))
            continue
        predicted = max(stage.total for stage in memory_per_rank(config, layout.data, device=device))
        legal.append(Point(chosen, ranks, predicted))
    return legal, refused


def sweep(
    config_path: str,
    settings: Sequence[str],
    candidates: Sequence[Point],
    *,
    options: Sequence[str] = (),
    capacity: int | None = None,
    timeout_s: float = 600.0,
) -> list[Outcome]:
    """Measure the points one after the other; what cannot fit by the estimate is not tried.

    Args:
        config_path: the configuration to vary.
        settings: overrides that hold for every point.
        candidates: in the order in which they are tried.
        options: further arguments of `bench train`.
        capacity: bytes of memory of a rank; None tries everything.
        timeout_s: longest time of a point.
    """
    outcomes = []
    for number, point in enumerate(candidates, start=1):
        if capacity is not None and point.predicted_bytes > capacity:
            reason = f"estimated {point.predicted_bytes / 2**30:.1f} of {capacity / 2**30:.1f} GiB"
            outcomes.append(Outcome(point, f"not tried: {reason}"))
        else:
            outcomes.append(measure(config_path, settings, point, options, timeout_s))
        done = outcomes[-1]
        rate = f" {done.tokens_per_s:,.0f} tokens/s/rank" if done.result else ""
        say(f"{number}/{len(candidates)} {' '.join(point.settings)}: {done.status}{rate} {done.error}".rstrip())
    return outcomes


def measure(config_path: str, settings: Sequence[str], point: Point, options: Sequence[str], timeout_s: float) -> Outcome:
    """One point, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "point.json"
        verb = ["-m", "megatron_synth", "bench", "train", config_path, *settings, *point.settings]
        if point.ranks > 1:
            launcher = ["-m", "megatron_synth.cluster.agent", "--local", "--nproc-per-node", str(point.ranks)]
            verb = [*launcher, *verb]
        command = [sys.executable, *verb, "--vs", "none", "--json", str(file), *options]
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return Outcome(point, "too slow", took_s=timeout_s)
        took = time.perf_counter() - began
        if process.returncode == 0:
            return Outcome(point, "measured", json.loads(file.read_text()), took)
        # the kernel ends a process that outgrows the host with SIGKILL; torchrun reports that as text
        killed = process.returncode == -9 or "Signal 9 (SIGKILL)" in printed
        lines = [line for line in printed.splitlines() if "rror" in line] or printed.splitlines()[-1:]
        if killed or OUT_OF_MEMORY.search(printed):
            return Outcome(point, "out of memory", took_s=took)
        return Outcome(point, "failed", took_s=took, error=lines[0].strip()[:300] if lines else "")


def best(outcomes: Sequence[Outcome]) -> Outcome:
    """The fastest point.

    Raises:
        UserError: none was measured.
    """
    measured = [outcome for outcome in outcomes if outcome.result is not None]
    if not measured:
        reasons = "; ".join(sorted({f"{outcome.status} {outcome.error}".strip() for outcome in outcomes}))
        raise UserError(f"no point of the sweep could be measured: {reasons}")
    return max(measured, key=lambda outcome: outcome.tokens_per_s)


def table_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Fastest first, then what was not measured and why."""
    from megatron_synth.core.log import gib
    from megatron_synth.estimate.hardware import show_mfu

    rows = [["settings", "tokens/s/rank", "ms/step", "min to max", "MFU", "peak GiB", "estimate GiB", "status"]]
    for outcome in sorted(outcomes, key=lambda one: -one.tokens_per_s):
        name = " ".join(setting.split(".", 1)[-1] for setting in outcome.label.split()) or "as configured"
        cells = [""] * 5
        if outcome.result is not None:
            row = outcome.result["rows"][0]
            times = [1000 * second for block in row["step_s"] for second in block]
            peak = "n/a" if row["peak_bytes"] is None else gib(row["peak_bytes"])
            cells = [
                f"{outcome.tokens_per_s:,.0f}",
                f"{statistics.median(times):.1f}",
                f"{min(times):.1f} to {max(times):.1f}",
                show_mfu(row["mfu"]),
                peak,
            ]
        status = f"{outcome.status}: {outcome.error}" if outcome.error else outcome.status
        rows.append([name, *cells, gib(outcome.point.predicted_bytes), status])
    return rows


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every point with all that is known of it."""
    return [
        {
            "settings": list(outcome.point.settings),
            "ranks": outcome.point.ranks,
            "predicted_bytes": outcome.point.predicted_bytes,
            "status": outcome.status,
            "error": outcome.error,
            "took_s": outcome.took_s,
            "result": outcome.result,
        }
        for outcome in outcomes
    ]
