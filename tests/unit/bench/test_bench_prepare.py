"""`python -m benchmarks prepare`: rates come from the runs, contenders take turns, and other tokens void the comparison."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.prepare import measure as bench
from benchmarks.prepare import peers
from benchmarks.prepare.measure import PrepareBench, Run, compare, to_json
from megatron_synth.config.errors import UserError
from megatron_synth.data.tokenizer import train_tokenizer
from tests.support import ROOT


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "VOCABULARY", 300)
    monkeypatch.setattr(bench.builtin_corpus, "documents", lambda builtin: [("k", f"{builtin} {n} text") for n in range(9)])


def test_contenders_take_turns_and_all_read_the_same_text(quick, monkeypatch):
    seen = []

    def run(python, name, folder, workers):
        files = sorted((folder / "corpus").iterdir())
        texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
        seen.append((name, python, len(files), len(texts), sum(len(text.encode()) for text in texts)))
        return Run(name, 1000, {"megatron-synth": 1.0, "megatron-lm": 4.0, "datatrove": 2.0}[name], 2.0, 5), "same"

    monkeypatch.setattr(bench, "_run", run)
    result = compare(1, 2, 2, datatrove=Path("/other/python"))
    names = ["megatron-synth", "megatron-lm", "datatrove"]
    assert [one[0] for one in seen] == names + names[::-1]
    assert {one[1] for one in seen if one[0] == "datatrove"} == {"/other/python"}
    assert {one[1] for one in seen if one[0] != "datatrove"} == {sys.executable}
    assert {one[2:] for one in seen} == {(2, result.documents, result.text_bytes)} and result.text_bytes >= 10**6
    assert (result.rate("megatron-synth"), result.rate("megatron-lm")) == (500, 125)
    assert result.cpu_rate("datatrove") == 500
    assert to_json({}, result)["per_worker"]["megatron-lm"]["tokens_per_s"] == 125


def test_the_rate_is_the_median():
    runs = tuple(Run("megatron-synth", 100, seconds, 1.0, 1) for seconds in (1.0, 50.0, 2.0))
    assert PrepareBench(runs, 1, 1, 1).rate("megatron-synth") == 50


def test_other_tokens_void_the_comparison(quick, monkeypatch):
    monkeypatch.setattr(bench, "_run", lambda python, name, folder, workers: (Run(name, 1, 1.0, 1.0, 1), name))
    with pytest.raises(UserError, match="megatron-lm wrote other tokens than megatron-synth"):
        compare(1, 1, 1, datatrove=None)


def test_a_contender_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"datatrove: failed with exit code 1: .*No module named 'datatrove'"):
        bench._run(sys.executable, "datatrove", tmp_path, 1)


@pytest.mark.slow
def test_both_loops_of_this_environment_write_the_same_tokens(tmp_path):
    texts = [f"Document {n} says {'naïve ' * (n % 4)}things <|endoftext|>\n" for n in range(70)]
    train_tokenizer(texts, 320, bench.EOD).save(tmp_path / "tokenizer.json")
    (tmp_path / "corpus").mkdir()
    for number in range(2):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::2])
        (tmp_path / "corpus" / f"{number}.jsonl").write_text("".join(lines))
    found = []
    for name in ("megatron-synth", "megatron-lm"):
        command = [sys.executable, peers.__file__, name]
        command += [str(tmp_path / "corpus"), str(tmp_path / "tokenizer.json"), str(tmp_path / "out"), "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        result = json.loads(run.stdout.splitlines()[-1])
        assert result["seconds"] > 0 and result["cpu_s"] > 0 and not (tmp_path / "out").exists()
        found.append((result["tokens"], result["sha256"]))
    assert found[0] == found[1] and found[0][0] > 70
