"""The measurements of large numbers, with small ones: what they make is what they say, and what they find is there."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.duplicates import corpus as planted
from benchmarks.duplicates import memory
from benchmarks.duplicates.cli import _together
from benchmarks.scale import corpus, disks, nodes, start
from benchmarks.usage import usage_of
from megatron_synth.cluster.diagnosis import diagnose
from megatron_synth.data.overlap.minhash import find_duplicates
from megatron_synth.data.shards.source import open_source


def test_made_up_sources_open_as_any_and_have_the_tokens_that_they_say(tmp_path) -> None:
    made = corpus.write(tmp_path, tokens=1_000_000, shards=200, sources=3)
    sources = [open_source(folder, folder.name) for folder in made]
    assert sum(source.num_tokens for source in sources) == 1_000_000
    assert sorted(len(source.manifest.shards) for source in sources) == [36, 54, 110]
    assert len({source.digest for source in sources}) == 3
    for source in sources:
        source.shard(3).check_index()
        assert source.document_starts(1, 1200).tolist() == [300, 800]
    assert sum(corpus.ratios(64)) == 1


def test_a_rank_starts_on_them(tmp_path) -> None:
    made = corpus.write(tmp_path / "data", tokens=10**9, shards=200, sources=2)
    found = start.measure(str(start.write_config(tmp_path, made, tokens=10**9, ranks=8)), 3, 8)
    assert 0 < found.median_s <= found.longest_s and found.anonymous > 0


def test_the_nodes_answers_have_the_one_fault_that_was_planted() -> None:
    names = [f"node{number}" for number in range(1, 41)]
    answers = [nodes.node_answer(number, name, shared=True) for number, name in enumerate(names)]
    findings = diagnose(names, answers, nodes.together_answer(40, 40))
    assert {finding.node for finding in findings} == {names[nodes.SLOW_NODE]}


def test_the_table_of_disks_has_a_row_for_each_disk() -> None:
    waits = [
        disks.Wait(rate, 0.005, memory_map, threads, 0.1 * rate + threads)
        for rate in (1.0, 2.0)
        for memory_map, threads in disks.WAYS
    ]
    assert disks.rows(waits)[1:] == [
        ["5", "1", "110%", "110%", "10%", "10%"],
        ["5", "2", "120%", "120%", "20%", "20%"],
    ]


def test_planted_copies_are_as_alike_as_they_are_said_to_be(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(planted, "COPY_SHARE", 0.02)
    pairs = planted.write(tmp_path / "text.jsonl")
    assert len(pairs) > 20 and planted.precision(tmp_path / "text.jsonl", pairs) == 1.0
    assert planted.precision(tmp_path / "text.jsonl", [(0, 1), *pairs[:1]]) == 0.5
    assert _together([(1, 3), (0, 2)], [(1, 2), (2, 3)], 4) == 1


def test_random_documents_of_the_memory_s_corpus_hold_their_copies(tmp_path) -> None:
    report = find_duplicates([memory.write(tmp_path / "web", 16 * 200)])
    assert report.sources == {"web": 3200} and report.shared[0].near == 16 * 3 * 2


def test_usage_is_the_command_s_own() -> None:
    ballast = bytearray(200 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])  # what the caller holds is not counted
    used = usage_of([sys.executable, "-c", "print(sum(range(10**6)))"])
    assert used.peak < 100 << 20 and used.seconds > 0
    with pytest.raises(RuntimeError, match=r"exit code 3\nbecause"):
        usage_of([sys.executable, "-c", "import sys; print('because', file=sys.stderr); sys.exit(3)"])
    assert json.dumps(len(ballast))
