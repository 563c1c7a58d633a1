"""nodes.json: what the ranks of each node did before they waited for others, and what they waited for, over all starts.

Data-parallel ranks wait for each other in every step, so that the time of a step is that of the slowest. times.jsonl is
rank 0's; this says which node was slow, and why. It is one record of a few numbers for each node, replaced as a whole: of a
start that is killed it lacks the last half a minute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import duration, say, table
from megatron_synth.core.records import OPEN, Count, Reader
from megatron_synth.train.record.times import WAITS

FILE = "nodes.json"
_WRITE_S = 30.0
"""Least time between two writes."""
_SHOWN = 8
"""Nodes in a table, the slowest first."""
_HEADS = {"data": "waiting for data", "saving": "saving", "starting": "starting"}
_DIFFERS = 0.05
"""Part of the median by which a node is slower that is worth a word."""

Seconds = Annotated[float, Field(strict=True, ge=0, le=1e11, allow_inf_nan=False)]
"""Up to some thousand years."""


@with_config(OPEN)
class NodeTimes(TypedDict):
    """Of a node, over all starts: seconds of its slowest rank, and the steps in which it took part."""

    steps: Count
    own_s: Seconds
    """Within steps, before it waited for others; data included."""
    data: Seconds
    saving: Seconds
    starting: Seconds


NODES: Reader[dict[str, NodeTimes]] = Reader(dict[str, NodeTimes], "restore the file or delete it; the run begins another")


def read_nodes(run: Path) -> dict[str, NodeTimes]:
    """The record of a run, by node; empty for a run of a version that wrote none. UserError if it is damaged."""
    return NODES.read_optional(run / FILE) or {}


class Nodes:
    """Writes nodes.json. Rank 0."""

    def __init__(self, run: Path, hosts: Sequence[str]):
        """hosts: node of each rank. A record of earlier starts that is damaged is told and begun anew."""
        self._file, self._hosts = run / FILE, hosts
        self._before: dict[str, NodeTimes] = {}
        try:
            self._before = read_nodes(run)
        except UserError as error:  # nothing that the run needs
            say(f"warning: {error}; what earlier starts noted there is left out")
        self._own: dict[str, NodeTimes] = {
            host: {"steps": 0, "own_s": 0.0, "data": 0.0, "saving": 0.0, "starting": 0.0} for host in dict.fromkeys(hosts)
        }
        self._written, self._failed = 0.0, False

    def add(self, steps: int, own_s: Sequence[float], waits: Mapping[str, Sequence[float]]) -> None:
        """Take in some steps.

        Args:
            steps: how many.
            own_s: of each rank, the seconds in them before it waited for others.
            waits: by what was waited for (WAITS), of each rank the seconds since its process began.
        """
        for host, node in self._own.items():
            ranks = [rank for rank, of in enumerate(self._hosts) if of == host]
            node["steps"] += steps
            node["own_s"] = round(node["own_s"] + max(own_s[rank] for rank in ranks), 3)
            for name in WAITS:
                node[name] = round(max(waits[name][rank] for rank in ranks), 3)
        if time.monotonic() - self._written > _WRITE_S:
            self.write()

    def write(self) -> None:
        """Replace the record. A disk that fails is a warning, once."""
        if self._failed:
            return
        self._written = time.monotonic()
        found = {**self._before}
        for host, own in self._own.items():
            before = self._before.get(host)
            found[host] = own if before is None else _sum(before, own)
        try:
            write_json(self._file, found)
        except OSError as error:  # a full disk must not end the run for this
            self._failed = True
            say(f"warning: {self._file}: {error}; what each node spends its time with is not noted any more")


def _sum(before: NodeTimes, own: NodeTimes) -> NodeTimes:
    return {
        "steps": before["steps"] + own["steps"],
        "own_s": before["own_s"] + own["own_s"],
        "data": before["data"] + own["data"],
        "saving": before["saving"] + own["saving"],
        "starting": before["starting"] + own["starting"],
    }


def slowest(nodes: Mapping[str, NodeTimes]) -> str | None:
    """The slowest node in words; None: there is one alone, or none is slower than the median by more than 5 %."""
    step_s = _step_s(nodes)
    if len(step_s) < 2:
        return None
    host, median = max(step_s, key=step_s.__getitem__), statistics.median_low(list(step_s.values()))
    excess = step_s[host] / median - 1 if median else 0.0
    if excess <= _DIFFERS:
        return None
    node = nodes[host]
    text = f"{host} is the slowest of {len(step_s)} nodes: {step_s[host]:.3g} s a step before it waits for others, "
    text += f"{100 * excess:.0f} % over their median"
    data = node["data"] / node["steps"]
    return text + (f"; {data:.3g} s of them it waits for data" if data > _DIFFERS * step_s[host] else "")


def told(nodes: Mapping[str, NodeTimes]) -> str:
    """A table of the nodes, the slowest first, and a line on that one; empty where a run had one node alone."""
    step_s = _step_s(nodes)
    if len(step_s) < 2:
        return ""
    rows: list[tuple[str, ...]] = [("node", "steps", "s/step of its own", *(_HEADS[name] for name in WAITS))]
    order = sorted(step_s, key=step_s.__getitem__, reverse=True)
    for host in order[:_SHOWN]:
        node = nodes[host]
        rows.append((host, f"{node['steps']:,}", f"{step_s[host]:.4g}", *(duration(node[name]) for name in WAITS)))
    lines = [table(rows)]
    if len(order) > _SHOWN:
        lines.append(f"and {len(order) - _SHOWN} nodes more")
    return "\n".join([*lines, *filter(None, [slowest(nodes)])])


def _step_s(nodes: Mapping[str, NodeTimes]) -> dict[str, float]:
    return {host: node["own_s"] / node["steps"] for host, node in nodes.items() if node["steps"]}
