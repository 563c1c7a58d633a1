"""Rows and task files become questions, and questions tokens as lm-evaluation-harness makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import AnswersConfig
from megatron_synth.data.answer_tasks import Task
from megatron_synth.data.answers import encode, open_answers, read_questions
from tests.support import write_corpus

TASK = {
    "task": "colors",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question.strip()}}\nAnswer:",
    "doc_to_choice": "{{[right, wrong]}}",
    "doc_to_target": 0,
}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def task(folder: Path, **changes: Any) -> Task:
    file = folder / "task.yaml"
    file.write_text(json.dumps({**TASK, **changes}))
    return Task.read(file)


def test_rows_and_tasks_become_questions(tmp_path: Path) -> None:
    rows = lines(
        tmp_path / "rows.jsonl",
        {"context": "1 + 1 =", "answer": " 2"},
        "",
        {"context": "a", "choices": ["b", "c"], "answer": 1},
    )
    first, second = read_questions(rows)
    assert (first.context, first.answers, first.right) == ("1 + 1 =", (" 2",), 0)
    assert (second.context, second.answers, second.right) == ("a", ("b", "c"), 1)
    assert len(list(read_questions(rows, limit=1))) == 1
    docs = lines(
        tmp_path / "docs.jsonl", {"question": " sky? ", "right": "blue", "wrong": "red", "label": "1", "choices": ["x", "y"]}
    )
    (found,) = read_questions(docs, task(tmp_path, description="Colors.\n"))
    assert (found.context, found.answers, found.right) == ("Colors.\nQuestion: sky?\nAnswer:", (" blue", " red"), 0)
    (found,) = read_questions(docs, task(tmp_path, doc_to_choice="choices", doc_to_target="label", target_delimiter=""))
    assert (found.answers, found.right) == (("x", "y"), 1)
    (found,) = read_questions(docs, task(tmp_path, doc_to_choice=["blue", "red"], doc_to_target="{{right}}"))
    assert (found.answers, found.right) == ((" blue", " red"), 0)
    (found,) = read_questions(docs, task(tmp_path, output_type="loglikelihood", doc_to_choice=None, doc_to_target="{{right}}"))
    assert (found.answers, found.right) == ((" blue",), 0)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{", "line 1: "),
        ("[]", "expected a JSON object"),
        ({"context": "a"}, "answer is missing"),
        ({"context": "a", "answer": ""}, "an answer is empty"),
        ({"context": "a", "answer": 1}, "no choices"),
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "not the number of one of the 2 choices"),
        ({"context": "a", "choices": ["b", "c"], "answer": "b"}, "not the number of one of the 2 choices"),
    ],
)
def test_bad_rows_are_named(row: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fault) as caught:
        list(read_questions(lines(tmp_path / "rows.jsonl", row)))
    assert f"{tmp_path}/rows.jsonl: line 1" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"doc_to_text": "!function utils.text"}, "!function"),
        ({"num_fewshot": 5}, "num_fewshot: 5"),
        ({"include": "other.yaml"}, "include"),
        ({"output_type": "loglikelihood_rolling"}, "output_type"),
        ({"doc_to_target": None}, "doc_to_target"),
        ({"doc_to_choice": None}, "doc_to_choice"),
    ],
)
def test_tasks_that_cannot_be_followed_are_refused(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fault):
        task(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"doc_to_text": "{{absent}}"}, "'absent' is undefined"),
        ({"doc_to_text": "{{question.__class__.__mro__}}"}, "cannot be applied"),
        (
            {"doc_to_text": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"},
            "more than 1,000,000 steps",
        ),
        ({"doc_to_choice": "{{question}}"}, "no list"),
        ({"doc_to_target": 2}, "none of the 2 choices"),
    ],
)
def test_rows_that_a_task_does_not_fit_are_named(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    docs = lines(tmp_path / "docs.jsonl", {"question": "sky?", "right": "blue", "wrong": "red"})
    with pytest.raises(UserError, match=fault) as caught:
        list(read_questions(docs, task(tmp_path, **changes)))
    assert "line 1" in str(caught.value)


def test_tokens_are_cut_where_the_harness_cuts_them(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    # tokens that reach over the border: "b c" is one where it can be
    words = {token: number for number, token in enumerate(["a", "b", "c", " ", " c", "ab", "<end>"])}
    backend = Tokenizer(models.BPE(words, [(" ", "c"), ("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split(" c", "isolated")

    def made(context: str, answer: str, longest: int = 9) -> tuple[list[int], int]:
        (request,) = encode(backend, [(context, answer)], 6, longest)
        return request.tokens.tolist(), request.begin

    assert made("ab", " c") == ([5, 4], 1)
    assert made("ab ", "c") == ([5, 4], 1)  # the space belongs to the answer
    assert made("", "ab") == ([6, 5], 1)
    assert made("a c c", " c", longest=2) == ([4, 4, 4], 2)
    assert made("a", " c c c c", longest=3) == ([4, 4, 4, 4], 1)  # of the answer only what fits
    with pytest.raises(ValueError, match="without a context"):
        list(encode(backend, [("", "a")], None, 9))
    with pytest.raises(ValueError, match="no token of its own"):
        list(encode(backend, [("a", "b")], None, 9))


def test_a_domain_is_opened(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    rows = lines(
        tmp_path / "rows.jsonl", {"context": "a", "choices": ["b", "cdé"], "answer": 1}, {"context": "a", "answer": "b"}
    )
    (tokenizer,) = set(corpus.rglob("tokenizer.json"))
    with pytest.raises(UserError, match=r"data\.answers\.x: needs a tokenizer\.json"):
        open_answers("x", AnswersConfig(path=str(rows)), None, 0, 256, 32)
    with pytest.raises(UserError, match="no questions in it"):
        open_answers("x", AnswersConfig(path=str(lines(tmp_path / "none.jsonl"))), tokenizer, 0, 256, 32)
    found = open_answers("x", AnswersConfig(path=str(rows)), tokenizer, 0, 256, 32)
    assert found.question.tolist() == [0, 0, 1] and found.is_right.tolist() == [False, True, True]
    assert found.sizes.tolist() == [1, 4, 1] and found.sizes.dtype == np.int64
