"""Token editing and contrastive decoding against plain loops of transformers: no cache, no padding, one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.decoding.contrastive import continue_texts, contrast
from megatron_synth.synthesis.decoding.model import CausalModel, draw, load, uniforms
from megatron_synth.synthesis.decoding.token_editing import edit, token_probabilities
from tests.support import save_tiny_causal_model

TEXTS = [
    ("a", "The tide rises twice a day, and the ferry waits for it at the pier of Ostrand."),
    ("b", "Short."),
    (
        "c",
        "Bread <|end|> and caf\u00e9, \u6f6e\u6c50: the starter is fed with flour and water every few days, kept cold a week.",
    ),
    ("d", ""),
]


def save(folder: Path, seed: int, **more: Any) -> Path:
    return save_tiny_causal_model(folder, [text for _, text in TEXTS if "<" not in text], seed, **more)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    return load(save(tmp_path_factory.mktemp("good"), 1))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    return load(save(tmp_path_factory.mktemp("bad"), 2, layers=1, more=8))


def plain(model: CausalModel, tokens: list[int]) -> torch.Tensor:
    """Log probabilities [T, V] behind each token, as transformers gives them for one text."""
    with torch.inference_mode():
        logits: torch.Tensor = model.model(torch.tensor([tokens])).logits
        return logits[0].log_softmax(dim=-1)


def inverse(weights: np.ndarray, uniform: float) -> int:
    """The first value whose cumulative probability is above `uniform`."""
    ends = np.cumsum(weights / weights.sum())
    return int(np.argmax(ends > uniform * ends[-1]))


# ---- the model


def test_special_tokens_in_a_text_are_letters(good: CausalModel) -> None:
    tokens = good.encode(TEXTS[2][1])
    assert 0 not in tokens and good.decode(tokens) == TEXTS[2][1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_probabilities_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    model = load(save(tmp_path, 3, family=family))
    rows = [model.encode(text) for _, text in TEXTS[:3]]
    for row, (log_p, of_tokens) in zip(rows, token_probabilities(model, rows), strict=True):
        expected = plain(model, row)[:-1]
        torch.testing.assert_close(log_p.exp(), expected.exp(), rtol=0, atol=1e-5)
        torch.testing.assert_close(of_tokens, expected[range(len(row) - 1), row[1:]], rtol=0, atol=1e-5)


def test_draws_invert_the_distribution() -> None:
    weights = torch.tensor([[0.0, -torch.inf, 0.0, 0.0]] * 5)
    at = torch.tensor([0.0, 0.3333, 0.334, 0.67, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, at).tolist() == [0, 0, 2, 3, 3]
    assert draw(torch.tensor([[0.0, -torch.inf]]), at[-1:]).tolist() == [0]


def test_draws_follow_seed_and_key_alone() -> None:
    assert uniforms(0, "a", 3).tolist() == uniforms(0, "a", 9)[:3].tolist()
    assert len({tuple(uniforms(seed, key, 2)) for seed in (0, 1) for key in ("a", "b")}) == 4


def test_folders_that_hold_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read"):
        load(tmp_path)
    folder = save(tmp_path / "model", 1, more=-5)
    with pytest.raises(UserError, match="do not belong together"):
        load(folder)


# ---- token editing


@pytest.mark.parametrize("batch_tokens", [128, 4096])
@pytest.mark.parametrize("top_k", [None, 5])
def test_edits_are_those_of_a_plain_loop(good: CausalModel, batch_tokens: int, top_k: int | None) -> None:
    p = 0.004
    found = edit(good, TEXTS, p=p, top_k=top_k, seed=7, batch_tokens=batch_tokens)
    drawn = changed = 0
    for (key, text), edited in zip(TEXTS, found, strict=True):
        tokens = good.encode(text)
        after, numbers = list(tokens), uniforms(7, key, len(tokens))
        for at in range(1, len(tokens)):
            log_p = plain(good, tokens[:at])[-1]
            if log_p[tokens[at]].exp() >= p:
                weights = log_p.exp().double().numpy()
                weights[0] = 0  # the end of a text
                if top_k is not None:
                    weights[weights < np.sort(weights)[-top_k]] = 0
                after[at] = inverse(weights, numbers[at])
                drawn += 1
        changed += sum(one != other for one, other in zip(tokens, after, strict=True))
        assert edited.text == good.decode(after) and edited.tokens == len(tokens)
    assert (drawn, changed) == (sum(one.drawn for one in found), sum(one.changed for one in found))
    assert 0 < changed <= drawn < sum(one.tokens for one in found)


def test_above_one_nothing_is_edited_and_at_zero_all_is(good: CausalModel) -> None:
    for (_, text), edited in zip(TEXTS, edit(good, TEXTS, p=1.0001), strict=True):
        assert edited.text == text and edited.drawn == edited.changed == 0
    for edited in edit(good, TEXTS, p=1e-30):
        assert edited.drawn == max(edited.tokens - 1, 0)


def test_each_chunk_is_a_text_of_its_own(good: CausalModel) -> None:
    tokens = good.encode(TEXTS[0][1])
    found = edit(good, TEXTS[:1], p=1e-30, chunk_tokens=8)[0]
    assert found.drawn == len(tokens) - -(-len(tokens) // 8)
    for message, arguments in {
        "p: expected": {"p": 0.0},
        "top_k": {"top_k": 0},
        "2 to 100, the tokens of a batch": {"batch_tokens": 100},
    }.items():
        with pytest.raises(UserError, match=message):
            edit(good, TEXTS, **arguments)  # type: ignore[arg-type]


# ---- contrastive decoding


PREFIXES = [
    ("x", "The tide rises"),
    ("y", "Bread"),
    ("z", "The ferry waits for the flour and water every few days and"),
    ("w", "T"),
]


@pytest.mark.parametrize(("strength", "alpha"), [(0.0, 0.1), (1.0, 0.1), (0.5, 1.0), (2.0, 0.01)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tokens_are_those_of_a_plain_loop(
    good: CausalModel, bad: CausalModel, strength: float, alpha: float, batch_size: int
) -> None:
    found = continue_texts(good, bad, PREFIXES, max_tokens=12, strength=strength, alpha=alpha, seed=5, batch_size=batch_size)
    for (key, text), continuation in zip(PREFIXES, found, strict=True):
        tokens = good.encode(text)
        numbers = uniforms(5, key, 12)
        expected: list[int] = []
        finish = "length"
        for number in numbers:
            log_good = plain(good, tokens + expected)[-1].double().numpy()
            weights = np.exp(log_good)
            if strength:
                log_bad = plain(bad, tokens + expected)[-1].double().numpy()[: len(log_good)]
                weights = np.exp(log_good - strength * log_bad) * (weights >= alpha * weights.max() * (1 - 1e-6))
            token = inverse(weights, number)
            if token == 0:
                finish = "stop"
                break
            expected.append(token)
        assert continuation.tokens == tuple(expected) and continuation.finish_reason == finish
        assert continuation.text == good.decode(expected)


def test_weights_are_the_difference_within_plausible_tokens() -> None:
    log_good, log_bad = torch.tensor([[0.6, 0.3, 0.05, 0.05]]).log(), torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log()
    weights = contrast(log_good, log_bad, strength=2.0, alpha=0.1)
    assert weights[0, :2].tolist() == pytest.approx(np.log([0.6 / 0.49, 0.3 / 0.01]).tolist(), rel=1e-5)
    assert weights[0, 2:].tolist() == [-torch.inf, -torch.inf]
    assert contrast(log_good, None, 0.0, 0.1) is log_good


def test_without_strength_it_is_plain_sampling_of_transformers(good: CausalModel, bad: CausalModel) -> None:
    """The frequencies of first tokens: those of the model's distribution, within six standard deviations."""
    log_p = plain(good, good.encode("The tide"))[-1]
    count = 4000
    numbers = torch.from_numpy(np.concatenate([uniforms(0, str(key), 1) for key in range(count)]))
    tokens = draw(log_p.expand(count, -1), numbers)
    p = log_p.exp().double()
    frequencies = torch.bincount(tokens, minlength=p.numel()) / count
    assert ((frequencies - p).abs() <= 6 * (p * (1 - p) / count).sqrt() + 1 / count).all()


def test_models_and_numbers_that_do_not_fit_are_refused(good: CausalModel, bad: CausalModel, tmp_path: Path) -> None:
    other = load(save(tmp_path, 1, vocabulary=300))
    for message, model, arguments in [
        ("another vocabulary", other, {}),
        ("lambda of at least 0", bad, {"strength": -1.0}),
        ("alpha above 0", bad, {"alpha": 0.0}),
        ("prefix 'z'", bad, {"max_tokens": 120}),
    ]:
        with pytest.raises(UserError, match=message):
            continue_texts(good, model, PREFIXES, **{"max_tokens": 4, **arguments})  # type: ignore[arg-type]
    assert len(continue_texts(good, other, PREFIXES, max_tokens=2, strength=0.0)) == 4  # it is not asked


def losses_by_hand(folder, texts):
    """Mean nats of each text's tokens but the first, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(folder), {}
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            found[text] = float(reference(input_ids=ids, labels=ids).loss)
    return found
