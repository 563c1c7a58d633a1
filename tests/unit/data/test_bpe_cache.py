"""Tokenizing by words gives the tokens of the tokenizer itself, whatever the text."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_synth.data import bpe_cache
from megatron_synth.data.bpe_cache import WordEncoder, is_applicable
from megatron_synth.data.preparing import builtin_corpus
from megatron_synth.data.tokenizer import Tokenizer, train_tokenizer

EOD = "<|endoftext|>"
DTYPE = np.dtype(np.uint16)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for _, text in builtin_corpus.documents("unseen")][:150]
    return train_tokenizer([*texts, "naïve café 狐狸 €5 – “quoted” don't we'll I've"] * 3, 2000, EOD)


def whole(tokenizer, text):
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


# letters, digits and signs of many scripts, contractions, runs of all kinds of space
ATOMS = st.one_of(
    st.sampled_from(["'s", "'re", "'", "don't", " ", "  ", "\n", "\n\n    ", "\t", "\r\n", "\v", "\f", "\x1c", "\x00", "\x7f"]),
    st.sampled_from(["\xa0", "\u2009", "\u200b", "\u3000", "\x85", "é", "狐", "²", "٣", "€", "“", "\U0001f98a", "e\u0301"]),
    st.sampled_from([EOD, "foo", " bar", "12", "_", "((", ".", "--", "A", "\ufeff"]),
    st.text(max_size=3),
    st.text(st.characters(max_codepoint=127), max_size=6),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(ATOMS, max_size=25).map("".join))
@example("a 's  's\n 'll \n\n x  ")
def test_any_text_has_the_tokens_of_the_tokenizer(tokenizer, text):
    tokens, lengths = tokenizer.encode([text], DTYPE)
    assert tokens.tolist() == [*whole(tokenizer, text), tokenizer.eod_id]
    assert lengths.tolist() == [tokens.size]


def test_every_character_between_others_has_the_tokens_of_the_tokenizer(tokenizer):
    """All that Unicode assigns, so that no character is taken for another kind than the tokenizer takes it for."""
    characters = [chr(code) for code in range(0x11000) if not 0xD800 <= code < 0xE000]
    for pattern in ("a{}b 1{} {}2  {}\n{} .{}",):
        texts = [pattern.replace("{}", character) for character in characters]
        encoder = WordEncoder(tokenizer._encode_word, DTYPE)
        expected = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        for text, one in zip(texts, expected, strict=True):
            found = encoder.encode(text)
            assert found is None or found.tolist() == one.ids, text


def test_real_text_is_encoded_by_words_and_equal_when_the_table_overflows(tokenizer, monkeypatch):
    texts = [text for _, text in builtin_corpus.documents("unseen")][:120]
    expected = [whole(tokenizer, text) for text in texts]
    for size in (2**17, 50):
        monkeypatch.setattr(bpe_cache, "WORDS", size)
        encoder = WordEncoder(tokenizer._encode_word, DTYPE)
        found = [encoder.encode(text) for text in texts]
        assert sum(one is not None for one in found) > 100
        assert all(one is None or one.tolist() == ids for one, ids in zip(found, expected, strict=True))
        assert len(encoder._pieces) <= size


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}),
        ("pre_tokenizer", {"type": "Whitespace"}),
    ],
)
def test_other_tokenizers_encode_by_themselves(tokenizer, key, value):
    assert is_applicable(tokenizer.content)
    data = json.loads(tokenizer.content)
    data[key] = value
    other = Tokenizer(json.dumps(data), EOD)
    assert not is_applicable(other.content)
    for text in ("foo bar", " a\n b  c", "naïve  café"):
        assert other.encode([text], DTYPE)[0].tolist() == [*whole(other, text), other.eod_id]


def test_tokens_added_to_the_vocabulary_rule_it_out(tokenizer):
    data = json.loads(tokenizer.content)
    added = {"id": 2000, "content": "o b", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"].append({**added, "special": False})
    other = Tokenizer(json.dumps(data), EOD)
    assert not is_applicable(other.content)
    assert other.encode(["foo bar"], DTYPE)[0].tolist() == [*whole(other, "foo bar"), other.eod_id]
