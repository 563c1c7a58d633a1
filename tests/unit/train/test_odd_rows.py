"""Rows that stand out from those of their source, and what each node waited for: what is noted, and what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import LogConfig
from megatron_synth.train.record import nodes
from megatron_synth.train.record.nodes import Nodes, read_nodes, slowest, told
from megatron_synth.train.spikes import Rows
from tests.unit.train.test_anomalies import notes


def losses(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Of two sources, one of which has twice the losses of the other and wide spread."""
    sources = np.arange(number) % 2
    return np.where(sources == 1, rng.normal(4.0, 0.6, number), rng.normal(2.0, 0.1, number)), sources


def test_a_row_is_held_against_its_own_source() -> None:
    rng, made = np.random.default_rng(1), Rows(8.0, 2)
    for begin in range(0, 4096, 64):
        values, sources = losses(rng, 64)
        assert made.look(values, sources, np.arange(begin, begin + 64)) == []
    values, sources = losses(rng, 64)
    values[[10, 30]] = 3.9  # far above source 0, and what rows of source 1 have
    values[33] = 3.9
    values[41] = 12.0
    found = made.look(values, sources, np.arange(5000, 5064))
    assert [row.sample for row in found] == [5010, 5030, 5041]
    assert found[0].loss == 3.9 and found[0].sigmas > 8 and found[2].sigmas == pytest.approx(8 / 0.6, rel=0.2)
    # what stood out is no measure for others: the next one does, too
    values, sources = losses(rng, 64)
    values[0], values[2] = 3.9, np.nan
    assert [row.sample for row in made.look(values, sources, np.arange(64))] == [0, 2]


def test_a_falling_loss_hides_no_row() -> None:
    rng, made = np.random.default_rng(2), Rows(8.0, 1)
    zeros = np.zeros(8, dtype=np.int64)
    for step in range(60):
        values = rng.normal(6.0 - 0.08 * step, 0.1, 8)
        if step == 50:
            values[5] = 4.0  # below the losses of half of the steps before
        found = made.look(values, zeros, np.arange(8 * step, 8 * step + 8))
        assert [row.sample for row in found] == ([8 * 50 + 5] if step == 50 else [])


def test_nothing_stands_out_among_a_few_rows() -> None:
    made = Rows(8.0, 1)
    for _ in range(2):
        assert made.look(np.array([2.0] * 63 + [99.0]), np.zeros(64, dtype=np.int64), np.arange(64)) == []


def test_notes_on_rows_are_bounded() -> None:
    made, events = notes()
    rows = Rows(8.0, 1)
    for _ in range(8):
        rows.look(np.linspace(1.9, 2.1, 64), np.zeros(64, dtype=np.int64), np.arange(64))
    (row,) = rows.look(np.array([9.0]), np.zeros(1, dtype=np.int64), np.array([777]))
    for step in range(100, 150):
        made.tell_rows(step, 1, row, ["sample 777 9 (web: data/web/shard-00001.bin, document 3)"])
    assert len(events) == 20 and "later ones are not noted" in events[-1]
    assert events[0].startswith("warning: step 100: a row far above the other rows of the source, ")
    assert "sample 777 9 (web: data/web/shard-00001.bin, document 3)" in events[0]
    assert events[0].endswith("megatron-synth mix show runs/a 777-777 --text")
    assert LogConfig().loss_spike_sigmas == 8


def test_nodes_add_up_over_starts_by_their_slowest_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_WRITE_S", -1.0)
    waits: Any = {"data": [1.0, 2.0, 5.0, 0.5], "saving": [0.0, 1.0, 0.0, 0.0], "starting": [9.0, 9.0, 30.0, 8.0]}
    for _ in range(2):
        made = Nodes(tmp_path, ["a", "a", "b", "b"])
        made.add(10, [10.0, 11.0, 20.0, 12.0], {name: [0.0] * 4 for name in waits})
        made.add(10, [10.0, 9.0, 20.0, 21.0], waits)
    found = read_nodes(tmp_path)
    assert found["a"] == {"steps": 40, "own_s": 42.0, "data": 4.0, "saving": 2.0, "starting": 18.0}
    assert found["b"] == {"steps": 40, "own_s": 82.0, "data": 10.0, "saving": 0.0, "starting": 60.0}
    line = "b is the slowest of 2 nodes: 2.05 s a step before it waits for others, 95 % over their median"
    assert slowest(found) == f"{line}; 0.25 s of them it waits for data"
    text = told(found).splitlines()
    assert text[0].split() == ["node", "steps", "s/step", "of", "its", "own", "waiting", "for", "data", "saving", "starting"]
    assert [text[1].split()[0], text[2].split()[0]] == ["b", "a"] and text[3] == slowest(found)
    assert slowest({"a": found["a"]}) is None and told({"a": found["a"]}) == "" and slowest({}) is None
    even = {"a": found["a"], "c": {**found["a"], "own_s": 43.0}}
    assert slowest(even) is None and "slowest" not in told(even)


@pytest.mark.parametrize("content", ['{"a": {"steps": -1}}', "[", '{"a": {"steps": 1, "own_s": 1e308}}', "null"])
def test_a_damaged_record_of_nodes_is_begun_anew(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nodes.json").write_text(content)
    with pytest.raises(UserError, match=r"nodes\.json"):
        read_nodes(tmp_path)
    Nodes(tmp_path, ["a"]).add(1, [1.0], {"data": [0.0], "saving": [0.0], "starting": [1.0]})
    assert "nodes.json" in capsys.readouterr().out and read_nodes(tmp_path)["a"]["steps"] == 1


def test_many_nodes_are_eight_rows(tmp_path: Path) -> None:
    hosts = [f"node{number}" for number in range(20)]
    made = Nodes(tmp_path, hosts)
    made.add(
        1, [1.0 + 0.1 * number for number in range(20)], {"data": [0.0] * 20, "saving": [0.0] * 20, "starting": [1.0] * 20}
    )
    text = told(read_nodes(tmp_path)).splitlines()
    assert len(text) == 1 + 8 + 2 and text[1].split()[0] == "node19" and text[-2] == "and 12 nodes more"
