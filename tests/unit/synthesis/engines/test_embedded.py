"""The generator in the process: tokens are drawn as they should be, alone and among others, and the same after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_synth.config.errors import UserError
from megatron_synth.config.synthesis import EngineConfig, SamplingConfig
from megatron_synth.synthesis.answers.parts import Answer
from megatron_synth.synthesis.documents.chunks import Chunk
from megatron_synth.synthesis.engines.drawing import SeededDraw, uniforms
from megatron_synth.synthesis.engines.embedded import Embedded
from megatron_synth.synthesis.requests import Prompt, Request
from megatron_synth.synthesis.run import run
from tests.unit.synthesis.test_run import product

CONTEXT = 768


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights over bytes, in Hugging Face's format."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{character: at for at, character in enumerate(alphabet, start=1)}}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=CONTEXT, eos_token_id=0, initializer_range=0.3, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def engine(model: Path, stop: tuple[str, ...] = (), batch_size: int = 4, **sampling: object) -> Embedded:
    settings = EngineConfig(batch_size=batch_size, device="cpu", dtype="float32")
    return Embedded(str(model), None, settings, SamplingConfig(**sampling), stop)


def requests(count: int, prompt: str = "about") -> list[Request]:
    chunk = Chunk((), "", 0, 1, 1)
    return [Request(f"{at:032x}", at, chunk, 0, (), Prompt(text=f"{prompt} {'x' * at}"), 77 + at) for at in range(count)]


def answers(found: Embedded, asked: list[Request], max_tokens: int = 24) -> list[Answer]:
    kept: dict[str, Answer] = {}
    found.run(iter(asked), lambda pairs: kept.update({request.key: answer for request, answer in pairs}), max_tokens)
    return [kept[request.key] for request in asked]


def test_drawn_tokens_have_the_probabilities_of_the_scores():
    count = 5_000
    scores = torch.log(torch.tensor([0.5, 0.25, 0.2, 0.05])).repeat(count, 1)
    for settings, expected in (
        ((1.0, 1.0, 0), [0.5, 0.25, 0.2, 0.05]),
        ((1.0, 0.9, 0), [0.5 / 0.95, 0.25 / 0.95, 0.2 / 0.95, 0]),
        ((1.0, 1.0, 2), [2 / 3, 1 / 3, 0, 0]),
        ((0.5, 1.0, 0), [value**2 / 0.355 for value in (0.5, 0.25, 0.2, 0.05)]),
    ):
        draw = SeededDraw(range(count), 1, *settings, "cpu")
        tokens = draw(torch.zeros(count, 1), scores).argmax(-1)
        shares = np.bincount(tokens.numpy(), minlength=4) / count
        # five standard deviations of a share of so many draws
        assert np.all(np.abs(shares - expected) < 5 * np.sqrt(0.25 / count)), (settings, shares)
        assert shares[np.array(expected) == 0].sum() == 0


def test_uniform_numbers_belong_to_the_seed_alone():
    together = uniforms([1, 2, 3], 10)
    assert np.array_equal(together[1], uniforms([2], 10)[0])
    assert np.array_equal(together[:, :4], uniforms([1, 2, 3], 4))
    assert len(np.unique(together)) == 30


def test_a_text_does_not_depend_on_its_neighbors(model):
    asked = requests(8)
    together = answers(engine(model, batch_size=8), asked)
    alone = answers(engine(model, batch_size=1), asked)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in together}) == 8
    other = answers(engine(model), requests(8, "of"))
    assert [answer.text for answer in other] != [answer.text for answer in together]


def test_greedy_answers_are_those_of_generate(model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (found,) = answers(engine(model, temperature=0), requests(1))
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("about ", return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(model).generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
    assert found.text == tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_say_why_they_end(model):
    plain = answers(engine(model, temperature=1.5), requests(12), 60)
    assert all(answer.finish in ("stop", "length") for answer in plain)
    assert all((answer.finish == "length") == (answer.tokens_out == 60) for answer in plain if answer.finish == "length")
    mark = plain[0].text[5]
    stopped = answers(engine(model, (mark,), temperature=1.5), requests(12), 60)
    for before, after in zip(plain, stopped, strict=True):
        assert after.text == before.text.split(mark)[0]
        if mark in before.text:
            assert after.finish == "stop"


def test_a_prompt_beyond_the_context_is_refused_and_its_neighbors_answered(model):
    asked = requests(3)
    asked[1] = Request("f" * 32, 1, asked[1].chunk, 0, (), Prompt(text="x" * CONTEXT), 5)
    found = answers(engine(model), asked)
    assert [answer.finish == "refused" for answer in found] == [False, True, False]
    assert f"the model's context is {CONTEXT}" in found[1].text


def test_a_stopped_run_goes_on_to_the_same_bytes(model, synthesis, tmp_path):
    template = {
        "name": "short",
        "version": 1,
        "origin": "tests",
        "source_kind": "other",
        "prompt": "{{ text }}",
        "parent_tokens": 200,
        "reassemble": False,
    }
    file = tmp_path / "short.yaml"
    file.write_text(json.dumps(template))

    def config(output: str):
        changes = {"kind": None, "template": str(file), "generator": {"model": str(model)}, "sampling": {"max_tokens": 20}}
        small = {
            "parents": {"web": {**whole_parents, "max_documents": 8}},
            "filters": {"off": ["cut_at_limit", "wrong_language"]},
        }
        return synthesis(None, output, engine={"batch_size": 4, "device": "cpu", "dtype": "float32"}, **changes, **small)

    whole_parents = synthesis("http://x").parents["web"].model_dump(exclude_none=True)
    whole = run(config("whole"))
    assert whole.account is not None
    assert whole.account.asked > 12
    calls = iter(range(1000))
    stopped = run(config("stopped"), lambda: next(calls) >= 2)
    assert stopped.account is None
    assert stopped.made == 8
    # as if the kill had come in the middle of a batch's answers
    part = config("stopped").folder / "answers" / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-700])
    rest = run(config("stopped"))
    assert rest.account == whole.account
    assert product(config("stopped").folder) == product(config("whole").folder)


def test_a_base_model_has_no_chat_template(model, synthesis):
    config = synthesis(None, generator={"model": str(model), "api": "chat"}, sampling={"max_tokens": 8})
    with pytest.raises(UserError, match=r"no chat template.*set generator.api to completions"):
        run(config)
