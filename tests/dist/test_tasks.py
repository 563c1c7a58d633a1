"""A downstream task from local files: its score is that of our own log-probabilities, and stands in the run's records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_synth.train.record import tasks as record
from tests.dist.conftest import Run
from tests.dist.pool import RankPool
from tests.support import VOCAB_SIZE, read_metrics, tokenizer

QUESTIONS = [
    ("abc", ["d", "z"], 0),
    ("hello", ["QQQ", " world"], 1),
    ("one two", [" three", "#"], 0),
    ("x", ["y", "1"], 0),
    ("aaaa", ["b", "a"], 1),
    ("1 2 3", [" 4", "!"], 0),
    ("again", ["st", "#~"], 1),
]


def _task(folder: Path) -> Path:
    folder.mkdir()
    lines = [json.dumps({"text": text, "choices": choices, "answer": answer}) for text, choices, answer in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    content = {
        "task": "next_letter",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "next_letter.yaml").write_text(json.dumps(content))
    return folder


def _cli(ranks: RankPool, *arguments: str, code: int = 0) -> str:
    (result,) = ranks.run(1, "megatron_synth.cli.main.main", list(arguments))
    assert result.value == code, result.stdout + result.stderr
    return str(result.stdout if code == 0 else result.stderr)


def test_a_task_of_our_own(
    trained: Callable[..., Run], ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run, own = tmp_path / "run", _task(tmp_path / "tasks")
    shutil.copytree(trained("single").path, run)
    before = read_metrics(run)
    ask = ("eval", str(run), "--tasks", "next_letter", "--task-path", str(own), "--device", "cpu")
    printed = _cli(ranks, *ask)
    assert "next_letter" in printed and "and to the record of step 20" in printed

    # what the engine itself gives each answer; what is behind a text does not change it
    encode = tokenizer().backend.encode
    pairs = [(encode(text).ids, encode(text + choice).ids) for text, choices, _ in QUESTIONS for choice in choices]
    rows = np.zeros((len(pairs), 16), dtype=np.int64)
    for row, (_, ids) in zip(rows, pairs, strict=True):
        row[: len(ids)] = ids
    (ours,) = ranks.run(1, "tests.dist.layouts.hf_jobs.logits", str(run), rows)
    logs = torch.from_numpy(ours.value)[..., :VOCAB_SIZE].log_softmax(-1)
    scores = [
        sum(float(log[place - 1, ids[place]]) for place in range(len(start), len(ids)))
        for log, (start, ids) in zip(logs, pairs, strict=True)
    ]
    right = sum(int(np.argmax(scores[2 * at : 2 * at + 2])) == answer for at, (*_, answer) in enumerate(QUESTIONS))
    expected = right / len(QUESTIONS)
    assert 0 < expected < 1, "choose questions of which some are right"
    info = record.TASKS.read(run / "tasks.json")
    assert info["tasks"]["next_letter"]["acc"] == pytest.approx(expected, abs=1e-9) and info["step"] == 20
    after = read_metrics(run)
    assert after[-1]["tasks/next_letter/acc"] == info["tasks"]["next_letter"]["acc"]
    assert [{name: value for name, value in one.items() if not name.startswith("tasks/")} for one in after] == before
    assert record.of_run(run)["tasks/next_letter/acc"] == info["tasks"]["next_letter"]["acc"]

    for arguments, message in (
        (("eval", str(run), "--tasks", "next_leter", "--task-path", str(own)), "did you mean next_letter"),
        ((*ask, "eval.batches=2"), "eval.batches=2: has no effect with --tasks"),
        ((*ask[:-2], "--task-path", str(tmp_path / "none")), "none: no such folder"),
    ):
        assert message in _cli(ranks, *arguments, code=2)
