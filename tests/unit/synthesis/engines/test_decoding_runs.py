"""`synthesize run` with token editing and contrastive decoding: the corpus, its record, and a run that goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_synth.config.errors import UserError
from megatron_synth.data.preparing.readers.synthesized import SynthesisRecord
from megatron_synth.synthesis.filters.base import FiltersConfig
from megatron_synth.synthesis.run import run
from megatron_synth.synthesis.synthesis_file import SynthesisConfig
from tests.support import save_tiny_causal_model

MakeFile = Callable[..., SynthesisConfig]
TEXTS = ["The river rises in the hills, and a mill stands where it meets the road. " * 4]
PLAIN: dict[str, Any] = {"temperature": 1, "top_p": 1, "max_tokens": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        str(save_tiny_causal_model(tmp_path_factory.mktemp(name), TEXTS, seed)) for seed, name in enumerate(("good", "bad"))
    ]


def corpus(config: SynthesisConfig) -> tuple[SynthesisRecord, list[dict[str, Any]]]:
    outcome = run(config)
    assert outcome.record is not None and outcome.record.account.unanswered == 0
    files = [config.folder / "corpus" / name for name in outcome.record.files]
    return outcome.record, [json.loads(line) for file in files for line in file.read_text().splitlines()]


def few(config: SynthesisConfig, documents: int) -> SynthesisConfig:
    sources = {name: source.model_copy(update={"max_documents": documents}) for name, source in config.parents.items()}
    return config.model_copy(update={"parents": sources})


def parents(config: SynthesisConfig) -> list[str]:
    (source,) = config.parents.values()
    assert source.input is not None
    return [json.loads(line)["text"] for line in Path(source.input[0]).read_text().splitlines()]


def editing(synthesis: MakeFile, models: list[str], output: str, p: float) -> SynthesisConfig:
    config = synthesis(
        output=output,
        kind="token-editing",
        generator={"model": models[0]},
        sampling=PLAIN,
        decoding={"method": "token-editing", "p": p},
        filters={"language": None},
    )
    return few(config, 8)


def test_edited_documents_stand_in_the_corpus(
    synthesis: MakeFile, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = editing(synthesis, models, "edited", 0.003)
    record, documents = corpus(config)
    assert record.generator["decoding"]["p"] == 0.003 and record.generator["engine"] == "token-editing"
    assert record.cost.tokens_in > record.cost.tokens_out > 0
    assert "of the tokens were drawn anew" in capsys.readouterr().err
    first = run(config)
    assert first.made == 0 and first.record == record
    whole = record.account.kept
    assert whole and any(one["text"] not in parents(config) for one in documents)


def test_above_one_documents_are_their_parents(synthesis: MakeFile, models: list[str]) -> None:
    config = editing(synthesis, models, "same", 1.5)
    record, documents = corpus(config)
    assert record.cost.tokens_out == 0 and documents
    assert {one["text"] for one in documents} <= set(parents(config))
    assert record.account.kept + sum(record.account.rejected.values()) == record.account.asked


def test_prefixes_are_continued(synthesis: MakeFile, models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = synthesis(
        kind="continuation",
        generator={"model": models[0]},
        sampling=PLAIN,
        decoding={"method": "contrastive", "against": {"model": models[1], "api": "completions"}, "strength": 0.5},
        filters={"off": ["cut_at_limit", "wrong_language", "repetition"], "min_words": 1},
    )
    config = few(config, 4)
    record, documents = corpus(config)
    assert record.generator["decoding"]["against"]["weights"] != record.generator["weights"]
    assert record.cost.flops == 2 * 2 * record.generator["parameters"] * (record.cost.tokens_in + record.cost.tokens_out)
    whole = parents(config)
    assert documents and all(any(one["text"][:8] in parent for parent in whole) for one in documents)
    assert not any(one["text"] in parent for one in documents for parent in whole)


def test_a_choice_stands_in_the_account(synthesis: MakeFile, models: list[str]) -> None:
    choice = {"method": "coverage", "share": "1/3"}
    config = editing(synthesis, models, "chosen", 1.5)
    chosen = config.model_copy(
        update={"filters": FiltersConfig.model_validate({"language": None, "choice": choice}), "missing_chunks": "join"}
    )
    before, after = corpus(config)[0].account, corpus(chosen)[0].account
    assert after.kept == math.ceil(before.kept / 3) and after.rejected["not_chosen"] == before.kept - after.kept
    with pytest.raises(UserError, match="missing_chunks to join"):
        run(chosen.model_copy(update={"missing_chunks": "drop"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "continuation"}, "needs `decoding`"),
        ({"decoding": {"method": "token-editing"}}, "is for `kind: token-editing`"),
        ({"kind": "token-editing", "decoding": {"method": "token-editing"}, "sampling": {"top_p": 0.9}}, "to 1"),
        ({"kind": "continuation", "decoding": {"method": "contrastive"}}, "name the worse model"),
        ({"kind": "token-editing", "decoding": {"method": "token-editing"}, "generator": {"api": "chat"}}, "completions"),
    ],
)
def test_what_does_not_fit_is_refused(synthesis: MakeFile, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        synthesis(**{"sampling": PLAIN, **changes})
