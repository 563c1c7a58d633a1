"""From what nodes measured to what is wrong, and with which of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SLOW = 0.7
"""A device, disk or network below this fraction of what is usual among the nodes is called slow."""
PEAK_SHARE = 0.5
"""A GPU below this fraction of its data sheet's peak in a large matrix product is called slow."""
CLOCK_S = 1.0
"""Clocks further apart are called wrong: logs no longer sort, and file times mislead."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    node: str
    what: str
    """versions, shared, disk, scratch, gemm, copy, network, clock, driver, silent."""
    text: str

    def __str__(self) -> str:
        return f"{self.node}: {self.text}"


def diagnose(asked: Sequence[str], nodes: Sequence[Mapping[str, Any]], ranks: Mapping[str, Any] | None) -> list[Finding]:
    """All that is wrong, by node.

    Args:
        asked: names of the nodes that were to be looked at.
        nodes: what `probe.probe_node` found on those that answered.
        ranks: what `probe.probe_ranks` found; None if that gave no result.
    """
    answered = {str(node["node"]) for node in nodes}
    found = [Finding(name, "silent", "did not answer; look at the lines above") for name in asked if name not in answered]
    for node in nodes:
        if not node["shared"]:
            text = "does not see the shared folder (it cannot read there what this machine wrote)"
            found.append(Finding(node["node"], "shared", text))
        if node["driver"] is not None and "fails" in node["driver"]:
            found.append(Finding(node["node"], "driver", node["driver"]))
    found += _versions(nodes)
    found += _slow(
        nodes, "disk", "shared folder", {node["node"]: node["disk_mb_s"] for node in nodes if node["shared"]}, "MB/s"
    )
    found += _slow(nodes, "scratch", "temporary folder", {node["node"]: node["scratch_mb_s"] for node in nodes}, "MB/s")
    found += _devices(nodes)
    if ranks is None:
        if len(asked) > 1 or not nodes:
            found.append(Finding(", ".join(sorted(answered)) or "all", "network", "no result of the ranks together"))
        return found
    names = ranks["nodes"]
    found += _network(names, ranks["pairs"])
    for name, offset in zip(names, ranks["clocks"], strict=True):
        middle = statistics.median_low(ranks["clocks"])
        if abs(offset - middle) > CLOCK_S:
            direction = "ahead of" if offset > middle else "behind"
            found.append(Finding(name, "clock", f"clock is {abs(offset - middle):.1f} s {direction} the others"))
    return found


def _versions(nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    found = []
    names = dict.fromkeys(name for node in nodes for name in (*node["versions"], "driver"))
    for name in names:
        have = {node["node"]: node["driver"] if name == "driver" else node["versions"].get(name) for node in nodes}
        usual, _ = Counter(have.values()).most_common(1)[0]
        for node, version in have.items():
            if version != usual:
                found.append(Finding(node, "versions", f"{name} is {version or 'absent'}, elsewhere {usual or 'absent'}"))
    return found


def _slow(
    nodes: Sequence[Mapping[str, Any]], what: str, name: str, rates: Mapping[str, float | None], unit: str
) -> list[Finding]:
    found = [Finding(node, what, f"the {name} cannot be written") for node, rate in rates.items() if rate is None]
    known = {node: rate for node, rate in rates.items() if rate is not None}
    if known:
        usual = statistics.median_high(known.values())
        for node, rate in known.items():
            if rate < SLOW * usual:
                found.append(Finding(node, what, f"writes {rate:.0f} {unit} to the {name}, usual is {usual:.0f}"))
    return found


def _devices(nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    found = []
    counts = Counter(len(node["devices"]) for node in nodes)
    for node in nodes:
        usual_count, _ = counts.most_common(1)[0]
        if len(node["devices"]) != usual_count:
            text = f"has {len(node['devices'])} devices, elsewhere there are {usual_count}"
            found.append(Finding(node["node"], "gemm", text))
    for key, what, unit in (("gemm_tflops", "matrix product", "TFLOP/s"), ("copy_gb_s", "copy from the host", "GB/s")):
        by_name: dict[str, list[tuple[str, int, float]]] = {}
        for node in nodes:
            for index, device in enumerate(node["devices"]):
                if device[key] is not None:
                    by_name.setdefault(device["name"], []).append((node["node"], index, device[key]))
        for rates in by_name.values():
            usual = statistics.median_high(rate for *_, rate in rates)
            for name, index, rate in rates:
                if rate < SLOW * usual:
                    text = f"device {index}: {what} at {rate:.3g} {unit}, usual is {usual:.3g}"
                    found.append(Finding(name, key.partition("_")[0], text))
    for node in nodes:
        for index, device in enumerate(node["devices"]):
            if device["peak_share"] is not None and device["peak_share"] < PEAK_SHARE:
                text = f"device {index}: matrix product at {100 * device['peak_share']:.0f}% of the peak of {device['name']}"
                found.append(Finding(node["node"], "gemm", text))
    return found


def _network(names: Sequence[str], pairs: Sequence[Sequence[float]]) -> list[Finding]:
    """A node is slow if even the better of its two pairs is; a pair of good nodes with a bad link names both."""
    if len(names) < 3:
        return []  # with a single pair there is nothing to compare with
    best = [max(rate for first, second, rate in pairs if node in (first, second)) for node in range(len(names))]
    usual = statistics.median_high(rate for *_, rate in pairs)
    found = []
    for node, rate in enumerate(best):
        if rate < SLOW * usual:
            found.append(
                Finding(names[node], "network", f"all-reduce with either neighbor at {rate:.3g} GB/s, usual is {usual:.3g}")
            )
    slow = {finding.node for finding in found}
    for first, second, rate in pairs:
        one, other = names[int(first)], names[int(second)]
        if rate < SLOW * usual and not slow & {one, other}:
            text = f"all-reduce with {other} at {rate:.3g} GB/s, usual is {usual:.3g}; both are faster with others"
            found.append(Finding(one, "network", text))
    return found
