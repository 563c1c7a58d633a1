"""The loader benchmark: what it measures of our loader is true, on small data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import measure as bench
from benchmarks.loader import peers, report, startup
from megatron_synth.config.errors import UserError
from megatron_synth.data.shards.source import open_source


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
    assert bench._in_process(contender("Grain, no threads"), folder, ())["left_out"] == "not installed"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    failed = bench._in_process(contender("ours"), folder, ())
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


def test_peers_are_looked_for_in_other_environments(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(peers.Contender, "missing", property(lambda self: self.needs is not None))
    for name, code in (("without", 1), ("with", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    others = [tmp_path / "without", tmp_path / "with"]
    assert bench._python(contender("Grain, no threads"), others) == str(tmp_path / "with")
    assert bench._python(contender("Grain, no threads"), others[:1]) is None
    assert bench._python(contender("ours"), others) == sys.executable


def test_runs_of_single_loaders_make_one_table_that_names_versions(tmp_path, capsys) -> None:
    turn = {"limit": 4e9, "random": 2e9, "own": 1e9}
    rest = {"rounds": [turn], "start_s": {"100000": 0.1}, "growth_bytes": 0, "worst": 0.8, "resume_s": 0.1, "state_bytes": 15}
    files = []
    for number, (package, numpy) in enumerate((("grain 1.0", "2.0"), ("streaming 3.0", "1.9"))):
        loader = {"name": package, "package": package, "versions": {"numpy": numpy, "torch": "2.9"}, **rest}
        loader |= {"resumed_exactly": True, "extend": [200, 200]}
        head = {
            "command": f"c{number}",
            "date": f"2026-01-0{number + 1}",
            "git": None,
            "device": "d",
            "threads": 1,
            "tokens": 9,
        }
        content = {**head, "versions": {"numpy": "2.0", "torch": "2.9"}, "loaders": [loader]}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(content))
    assert report.main([str(file) for file in files]) == 0
    printed = capsys.readouterr().out
    assert "- command: `c0`, `c1`" in printed and "2026-01-01 to 2026-01-02" in printed
    assert "- peers: grain 1.0, streaming 3.0 (with numpy 1.9)" in printed
    assert printed.count("| limit: in order") == 1 and printed.count("\n| streaming 3.0") == 1
    files[1].write_text(files[1].read_text().replace('"device": "d"', '"device": "e"'))
    with pytest.raises(UserError, match="device is d in `c0` and e in `c1`"):
        report.main([str(file) for file in files])


def test_olmo_core_mixes_as_it_is_judged(folder) -> None:
    pytest.importorskip("olmo_core")
    stream = contender("OLMo-core, no threads").open(peers.Sources(folder, 32), 2000)
    first = [stream.next() for _ in range(3)]
    state = stream.state()
    expected = stream.next()
    again = contender("OLMo-core, no threads").open(peers.Sources(folder, 32), 2000)
    again.restore(state)
    assert first[0].shape == (peers.ROWS, 32) and again.next().tolist() == expected.tolist()


def test_starts_are_measured_of_any_number_of_shards(tmp_path) -> None:
    folder = startup.write_many_shards(tmp_path / "s", 5, 2 * startup.SEQUENCE_LENGTH)
    source = open_source(folder, "s")
    assert source.num_tokens == 10 * startup.SEQUENCE_LENGTH and source.num_documents == 5 * 21
    found = startup.measure(folder)
    assert all(0 < seconds < 60 for seconds in (found["opened_s"], *found["start_s"].values()))
    (head, row) = startup.table_rows([{"shards": 5, **found}])
    assert head[2:5] == ["first batch at 1e5, ms", "first batch at 1e7, ms", "first batch at 1e12, ms"]
    assert len(row) == len(head) and row[0] == "5"
