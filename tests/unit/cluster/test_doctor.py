"""From measurements to findings: the bad node is named, and a good cluster is left in peace."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_synth.cli import doctor
from megatron_synth.cluster.diagnosis import diagnose
from megatron_synth.cluster.probe import answer_lines, read_answers

NAMES = ["n1", "n2", "n3", "n4"]


def node(name: str, **changes: Any) -> dict[str, Any]:
    device = {"name": "NVIDIA H100 80GB HBM3", "gemm_tflops": 700.0, "peak_share": 0.71, "copy_gb_s": 50.0}
    base = {"node": name, "versions": {"torch": "2.13.0"}, "driver": "570.1", "devices": [dict(device) for _ in range(8)]}
    return {**base, "disk_mb_s": 900.0, "scratch_mb_s": 2000.0, "shared": True, **changes}


def together(names: list[str], slow: dict[tuple[int, int], float] | None = None, **changes: Any) -> dict[str, Any]:
    count = len(names)
    ring = [] if count < 2 else [(0, 1)] if count == 2 else [(place, (place + 1) % count) for place in range(count)]
    pairs = [[*pair, (slow or {}).get(pair, 40.0)] for pair in ring]
    return {"nodes": names, "pairs": pairs, "clocks": [0.0] * count, "all_reduce_gb_s": 40.0, "ranks": 8 * count, **changes}


def found(nodes: list[dict[str, Any]], ranks: dict[str, Any] | None) -> list[tuple[str, str]]:
    return [(finding.node, finding.what) for finding in diagnose(NAMES, nodes, ranks)]


def test_good_nodes_are_left_in_peace() -> None:
    assert found([node(name) for name in NAMES], together(NAMES)) == []


def test_each_fault_names_its_node() -> None:
    good = [node(name) for name in NAMES[1:]]
    slow_device = node("n1")
    slow_device["devices"][3] |= {"gemm_tflops": 300.0, "peak_share": 0.3, "copy_gb_s": 10.0}
    cases = {
        "versions": node("n1", versions={"torch": "2.12.0"}),
        "shared": node("n1", shared=False),
        "disk": node("n1", disk_mb_s=100.0),
        "scratch": node("n1", scratch_mb_s=None),
        "driver": node("n1", driver="nvidia-smi fails: no devices"),
    }
    for what, bad in cases.items():
        assert ("n1", what) in found([bad, *good], together(NAMES)), what
    assert {("n1", "gemm"), ("n1", "copy")} == set(found([slow_device, *good], together(NAMES)))
    assert found([node("n1", devices=node("n1")["devices"][:7]), *good], together(NAMES)) == [("n1", "gemm")]


def test_a_silent_node_is_named_and_the_others_are_examined() -> None:
    assert found([node(name) for name in NAMES[:3]], together(NAMES[:3])) == [("n4", "silent")]


def test_the_network_fault_is_located() -> None:
    nodes = [node(name) for name in NAMES]
    of_node = together(NAMES, {(1, 2): 5.0, (2, 3): 4.0})  # both pairs of the third node
    assert found(nodes, of_node) == [("n3", "network")]
    of_link = diagnose(NAMES, nodes, together(NAMES, {(1, 2): 5.0}))
    assert [finding.node for finding in of_link] == ["n2"] and "with n3" in of_link[0].text
    assert ("n1, n2, n3, n4", "network") in found(nodes, None)


def test_clocks_are_held_against_the_others() -> None:
    nodes = [node(name) for name in NAMES]
    # the first one is wrong: measured from it, all others are
    assert found(nodes, together(NAMES, clocks=[0.0, 90.0, 90.01, 89.99])) == [("n1", "clock")]
    assert found(nodes, together(NAMES, clocks=[0.0, 0.2, -0.3, 0.1])) == []


def test_of_many_nodes_the_bad_ones_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"n{number:03d}" for number in range(512)]
    nodes = [node(name) for name in names]
    nodes[77] = node(names[77], disk_mb_s=100.0)
    ranks = together(names, {(3, 4): 30.0}) | {"backend": "nccl"}
    doctor._print(nodes, ranks, diagnose(names, nodes, ranks))
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 10 and "bad: n077" in printed and "and 511 nodes" in printed
    assert "slowest of 512 pairs of nodes: n003-n004 30, " in printed
    doctor._print(nodes[:32], together(names[:32]) | {"backend": "nccl"}, [])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names[:32]) and "; pairs of nodes: n000-n001 40, " in printed


def test_answers_of_any_length_come_through_srun_whole() -> None:
    """srun breaks lines of more than a kilobyte when it labels them, and mixes those of several nodes."""
    answers = [together([f"n{number}" for number in range(512)]), node("n1"), node("n2")]
    one, *others = ([f"{rank}: {line}" for line in answer_lines(answer)] for rank, answer in enumerate(answers))
    assert all(len(line) < 1000 for line in one) and len(one) > 10
    mixed = [*one[:5], *others[0], "3: a warning", *one[5:], *others[1]]
    assert read_answers(mixed) == (answers, ["3: a warning"])
    found, noise = read_answers([*one[:-1], *others[0]])
    assert found == answers[1:2] and noise == [f"an answer of which {len(one) - 1} of {len(one)} lines came"]
