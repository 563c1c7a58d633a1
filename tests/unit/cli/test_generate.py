"""`generate` from a folder in Hugging Face's format: a seed is a text, safe to look at; refused before long work."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.cli.generate import main
from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.engines import vllm
from tests.support import save_tiny_causal_model

CONTEXT = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_causal_model(tmp_path_factory.mktemp("hf"), ["the river and the mill", "a road over the hill"] * 20, 1)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert main([*map(str, arguments), "--json", "--device", "cpu"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_seed_is_a_text_whatever_else_is_asked(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a road"}\n\n{"prompt": "the\\nhill"}\n')
    common = ("--samples", 2, "--max-tokens", 12)
    many = run(capsys, model, "--prompt", "the river", "--prompts", file, *common)
    assert [one["prompt"] for one in many] == ["the river"] * 2 + ["a road"] * 2 + ["the\nhill"] * 2
    alone = run(capsys, model, "--prompt", "a road", *common)
    keys = ("prompt", "text", "seed", "finish")
    assert [[one[key] for key in keys] for one in alone] == [[one[key] for key in keys] for one in many[2:4]]
    assert len({one["text"] for one in many}) == 6
    other = run(capsys, model, "--prompt", "a road", *common, "--seed", 2)
    assert {one["text"] for one in other}.isdisjoint(one["text"] for one in alone)
    assert all(one["tokens"] <= 12 and one["finish"] in ("stop", "length") for one in many)


def test_greedy_texts_are_those_of_transformers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (found,) = run(capsys, model, "--prompt", "the river", "--temperature", 0, "--max-tokens", 10)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("the river", return_tensors="pt")["input_ids"]
    made = AutoModelForCausalLM.from_pretrained(model).generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=0)
    assert found["text"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_texts_cannot_pass_for_lines_of_the_program_or_move_a_terminal(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2Jred\u202ereversed\nprompt 1 of 1, sample 9\r\x9b2J <|end|> {{ 7 * 7 }} $(id)"
    assert main([str(model), "--prompt", hostile, "--max-tokens", "4", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert not set(printed) & set("\x1b\x07\r\x9b\u202e")
    assert "  | \\x1b]0;owned\\x07\\x1b[2Jred\\u202ereversed\n  | prompt 1 of 1, sample 9\\x0d\\x9b2J <|end|>" in printed
    assert sum(line.startswith("prompt 1 of 1") for line in printed.splitlines()) == 1


def test_a_special_token_in_a_prompt_is_text(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from megatron_synth.synthesis.engines.embedded import Embedded

    asked: list[tuple[int, ...]] = []
    answer = Embedded._answer

    def noted(self: Embedded, batch: Any, max_tokens: int) -> Any:
        asked.extend(request.prompt.tokens for request in batch)
        return answer(self, batch, max_tokens)

    monkeypatch.setattr(Embedded, "_answer", noted)
    run(capsys, model, "--prompt", "mill<|end|>road", "--prompt", "", "--max-tokens", 2)
    spelled, empty = asked
    assert 0 not in spelled and len(spelled) > 5
    assert empty == (0,)  # what ends a document is before the next one


def test_what_cannot_be_is_refused_by_one_message(model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    long = "x" * CONTEXT
    for arguments, message in (
        ((model,), "no prompts: give --prompt TEXT or --prompts FILE"),
        ((model, "--prompt", "a", "--samples", "2", "--temperature", "0"), "--samples: texts of one prompt are all equal"),
        ((model, "--prompt", "a", "--temperature", "nan"), "--temperature: "),
        ((model, "--prompt", "a", "--top-p", "0"), "--top-p: "),
        ((model, "--prompt", "\udcff"), "--prompt, number 1: not text in UTF-8"),
        ((model, "--prompts", lines), r"bad.jsonl, line 2: damaged: prompt is missing"),
        ((model, "--prompts", tmp_path / "none.txt"), "none.txt: cannot be read"),
        ((model, "--prompt", "a", "--chat"), "--chat: .* has no chat template"),
        ((model, "--prompt", "a", "--ema"), "--ema: .* has one set of weights"),
        (
            (model, "--prompt", "a", "--prompt", long, "--device", "cpu"),
            r"prompt 2: has 1\d\d tokens, .* context of 128; shorten",
        ),
        ((model, "--prompt", "a", "--max-tokens", "128", "--device", "cpu"), "or lower --max-tokens"),
        ((tmp_path / "none", "--prompt", "a"), "none: no such folder; expected a run directory"),
        ((tmp_path, "--prompt", "a"), "expected a run directory or a checkpoint, found no whole checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(part) for part in arguments])


def test_vllm_is_given_the_same_tokens(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A stand-in for the servers: what is asked of them, and that they are ended."""
    seen: list[dict[str, Any]] = []
    closed: list[bool] = []

    class Servers:
        def __init__(self, model: str, revision: None, engine: Any, shape: Any, log: Path):
            self.shape = shape

        def check(self) -> Any:
            return types.SimpleNamespace(context=CONTEXT, chat=None)

        def run(self, requests: Any, sink: Any, max_tokens: int) -> None:
            from megatron_synth.synthesis.answers.parts import Answer

            for request in list(requests)[::-1]:  # a server answers in any order
                seen.append(json.loads(self.shape.body(request, max_tokens)))
                sink([(request, Answer(f"text {request.order}", "stop", None, None))])

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(vllm, "Vllm", Servers)
    found = run(capsys, model, "--prompt", "the mill", "--samples", 2, "--engine", "vllm", "--stop", "hill", "--top-k", 5)
    assert [one["text"] for one in found] == ["text 0", "text 1"] and closed == [True]
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)("the mill")["input_ids"]
    assert [body["prompt"] for body in seen] == [tokens] * 2
    assert {body["max_tokens"] for body in seen} == {min(128, CONTEXT - len(tokens))}
    assert sorted(body["seed"] for body in seen) == sorted(one["seed"] for one in found)
    assert seen[0]["stop"] == ["hill"] and seen[0]["top_k"] == 5


def test_a_folder_without_a_tokenizer_says_so(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(UserError, match="has no tokenizer"):
        main([str(bare), "--prompt", "a"])
