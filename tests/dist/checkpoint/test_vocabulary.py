"""Weights for a tokenizer with added tokens: new rows are the mean of the old, in every layout; all else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_synth.data.tokenizer import Tokenizer, growth
from tests.dist.conftest import Run
from tests.dist.pool import RankPool
from tests.dist.layouts.test_huggingface import convert
from tests.support import EOD, LAYOUTS, VOCAB_SIZE, read_metrics, tokenizer, write_source

MORE = ("<|user|>", "<|model|>", "tool")
TIED = "model.share_embeddings_and_output_weights=true"


def _grown(change: Callable[[dict[str, Any]], None] = lambda data: None) -> Tokenizer:
    data = json.loads(tokenizer().content)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] += [{"id": VOCAB_SIZE + at, "content": text, **flags} for at, text in enumerate(MORE)]
    change(data)
    return Tokenizer(json.dumps(data), EOD)


def _corpus(folder: Path, made: Tokenizer, tokens: int = VOCAB_SIZE + len(MORE)) -> Path:
    folder.mkdir()
    made.save(folder / "tokenizer.json")
    for seed, name in enumerate(("web", "qa", "val", "val2")):
        write_source(folder / name, seed, 1300, fingerprint=made.fingerprint, vocab_size=tokens)
    return folder


def _train(ranks: RankPool, config: Path, corpus: Path, run: Path, layout: str, *settings: str, code: int = 0) -> str:
    world_size, of_layout = LAYOUTS[layout]
    paths = [f"data.{kind}.{name}.path={corpus / name}" for kind, name in _PLACES]
    steady = ["train.steps=1", "optim.lr=1e-30", "optim.warmup_steps=0", "optim.schedule=constant"]  # weights stay
    arguments = ["train", str(config), *of_layout, *paths, *steady, *settings, "--run-dir", str(run)]
    results = ranks.run(world_size, "megatron_synth.cli.main.main", arguments)
    printed = "".join(result.stdout + result.stderr for result in results)
    assert [result.value for result in results] == [code] * world_size, printed
    return printed


_PLACES = (("sources", "web"), ("sources", "qa"), ("validation", "val"), ("validation", "val2"))


def _state(ranks: RankPool, run: Path, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    convert(ranks, "to-hf", str(run), str(folder))
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("more", [(), (TIED,)])
def test_new_rows_are_the_mean_of_the_old(
    more: tuple[str, ...], trained: Callable[..., Run], ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    before = trained("tp2pp2", *more).path
    corpus = _corpus(tmp_path / "corpus", _grown())
    settings = (*more, f"checkpoint.init_from={before}", "checkpoint.init_vocabulary=extend")
    printed = _train(ranks, config, corpus, tmp_path / "run", "tp2pp2", *settings)
    assert f"the vocabulary grew from 256 to 259 tokens: each new row is the mean of the 256 old ones" in printed
    assert "the vocabulary grew from 256 to 259" in (tmp_path / "run" / "events.log").read_text()
    old, new = _state(ranks, before, tmp_path / "old"), _state(ranks, tmp_path / "run", tmp_path / "new")
    tables = [name for name, weight in old.items() if weight.shape[0] == VOCAB_SIZE and "layers" not in name]
    assert len(tables) == (1 if more else 2)
    for name, weight in old.items():
        if name in tables:
            assert new[name].shape[0] == VOCAB_SIZE + len(MORE)
            mean = weight.double().mean(dim=0).float().expand(len(MORE), -1)
            torch.testing.assert_close(new[name][VOCAB_SIZE:], mean, rtol=1e-6, atol=1e-8)
        assert torch.equal(new[name][: len(weight)], weight), name
    if not more:
        _train(ranks, config, corpus, tmp_path / "single", "single", *settings)
        found, expected = (read_metrics(tmp_path / name)[0]["train/loss"] for name in ("single", "run"))
        assert found == pytest.approx(expected, rel=1e-5)


def test_another_vocabulary_is_refused(trained: Callable[..., Run], ranks: RankPool, config: Path, tmp_path: Path) -> None:
    settings = (f"checkpoint.init_from={trained('single').path}",)
    grown, extend = _corpus(tmp_path / "grown", _grown()), "checkpoint.init_vocabulary=extend"
    said = _train(ranks, config, grown, tmp_path / "run", "single", *settings, code=2)
    assert "the vocabulary was 256 and is now 259" in said and "checkpoint.init_vocabulary: extend" in said
    other = _corpus(tmp_path / "other", _grown(lambda data: data["model"]["vocab"].update({"!": 5, "%": 1})))
    said = _train(ranks, config, other, tmp_path / "other-run", "single", *settings, extend, code=2)
    assert "is not the checkpoint's tokenizer" in said and "model differ" in said
    assert not (tmp_path / "other-run" / "run.json").exists()


def test_what_is_growth() -> None:
    old = tokenizer().content
    assert growth(old, old) is None and growth(old, _grown().content) is None
    assert growth(_grown().content, old) == "the token '<|user|>' is another one, or is gone"
    taken = _grown(lambda data: data["added_tokens"][-1].update(id=7))
    assert growth(old, taken.content) == "the new token 'tool' has the id 7 of an old one"
    lower = _grown(lambda data: data.update(normalizer={"type": "Lowercase"}))
    assert growth(old, lower.content) == "normalizer differ"
