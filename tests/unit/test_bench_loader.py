"""The loader benchmark: what it measures of our loader is true, on small data."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.bench import loader as bench
from megatron_synth.bench import loader_peers as peers
from megatron_synth.data.store import open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    bench.write_sources(made, 200_000)
    return made


def contender(name: str) -> peers.Contender:
    return next(one for one in peers.CONTENDERS if one.name == name)


def test_sources_can_be_told_by_their_tokens(folder) -> None:
    for number, prefix in enumerate(peers.Sources(folder, 32).prefixes):
        source = open_source(prefix, "s")
        assert 150_000 < source.num_tokens <= 200_000 and source.num_documents > 50
        stream = peers.Sources(folder, 32).stream(number)
        assert set(np.unique(stream[stream != peers.EOD] // peers.VALUES)) == {number}


def test_order_is_judged_as_it_is(folder, monkeypatch) -> None:
    monkeypatch.setattr(bench, "PREFIXES", 4000)
    monkeypatch.setattr(bench, "RESUME_STEP", 300)
    found = bench._order(contender("ours"), peers.Sources(folder, 32))
    assert found["worst"] < 1 - 1 / 6 + 1e-9 and found["resumed_exactly"] and found["extend"] == [200, 200]
    assert found["state_bytes"] < 100

    class Drifting(peers.Indexed):
        """One source for ever, starting elsewhere each time."""

    def drifting(sources: peers.Sources, samples: int) -> peers.Stream:
        import torch

        batches = (torch.full((8, 32), samples + at) % peers.VALUES for at in range(10**6))
        return Drifting(lambda first: batches)

    found = bench._order(peers.Contender("drifting", drifting), peers.Sources(folder, 32))
    assert found["worst"] == pytest.approx(4000 * 0.33)
    assert not found["resumed_exactly"] and found["extend"] == [0, 0]


@pytest.mark.parametrize("name", ["ours", "ours, int32", "ours, position ids too", "ours, prefetch thread"])
def test_ways_to_use_our_loader_give_the_same_tokens(folder, name) -> None:
    sources = peers.Sources(folder, 64)
    plain, other = contender("ours").open(sources, 1000), contender(name).open(sources, 10**12)
    for _ in range(20):
        assert plain.next().tolist() == other.next().tolist()
    other.restore(7)
    plain.restore(7)
    assert plain.next().tolist() == other.next().tolist()
    other.close()


def test_the_table_has_a_row_for_each_and_says_why_one_is_left_out(folder, monkeypatch) -> None:
    monkeypatch.setattr(peers.Contender, "missing", property(lambda self: self.needs is not None))
    assert bench._in_process(contender("Grain, no threads"), folder)["left_out"] == "not installed"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    failed = bench._in_process(contender("ours"), folder)
    assert failed["left_out"] == "failed: exit code 1"
    turn = {"limit": 4e9, "random": 2e9, "own": 1e9}
    measured = {
        "name": "ours",
        "rounds": [turn],
        "start_s": {"100000": 0.001, "10000000": 0.002, "1000000000000": 0.003},
        "growth_bytes": 2**20,
        "worst": 0.83,
        "resume_s": 0.004,
        "resumed_exactly": True,
        "state_bytes": 15,
        "extend": [200, 200],
    }
    rows = bench.table_rows([measured, failed])
    assert [row[0] for row in rows[1:]] == ["limit: in order", "limit: random windows", "ours", "ours"]
    assert rows[2][1:3] == ["2000", "50.0%"]
    assert rows[3][1:8] == ["1000.0", "25.0%", "50.0%", "0.0010", "0.0020", "0.0030", "1.0"]
    assert rows[4][1] == "failed: exit code 1" and len({len(row) for row in rows}) == 1
