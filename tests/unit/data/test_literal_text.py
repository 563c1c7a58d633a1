"""Text that spells a special token stays text, whatever the tokenizer; ids and other texts stay what they were."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_synth.config.errors import UserError
from megatron_synth.data import tokenizer as ours
from megatron_synth.data.literal_text import read_literally

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LETTERS = {chr(code): code - 33 for code in range(33, 127)}
EOD = "</s>"


def added_not_special():
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(BYTES)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(EOD, special=False, normalized=False), AddedToken("<tool>", special=False)])
    return backend


def unigram():
    pieces = [("<unk>", 0.0), (EOD, 0.0)] + [(letter, -5.0) for letter in "\u2581ab</s>"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<unk>", EOD])
    return backend


def ignore_merges():
    backend = Tokenizer(models.BPE({**LETTERS, EOD: 94}, [], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([EOD])
    return backend


def merged():
    vocab = {**LETTERS, "</": 94, "s>": 95, EOD: 96}
    backend = Tokenizer(models.BPE(vocab, [("<", "/"), ("s", ">"), ("</", "s>")]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([EOD])
    return backend


def word_level():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, EOD: 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", EOD, "<beyond>"])
    backend.add_tokens(["<tool>"])
    return backend


def word_piece():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, EOD: 1, "a": 2, "b": 3, "<": 4, "##/": 5}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", EOD])
    return backend


KINDS = [added_not_special, unigram, ignore_merges, merged, word_level, word_piece]


@pytest.mark.parametrize("make", KINDS)
def test_a_text_that_spells_a_special_token_has_no_such_token(make):
    backend = make()
    tokenizer = ours.Tokenizer(backend.to_str(), EOD)
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special] + [EOD]
    texts = [f"a {token} b" for token in special] + [EOD, "a b"]
    tokens, lengths = tokenizer.encode(texts, np.dtype(np.int32))
    ends = np.cumsum(lengths) - 1
    assert np.flatnonzero(tokens == tokenizer.eod_id).tolist() == ends.tolist()
    assert tokenizer.eod_id == backend.token_to_id(EOD)
    # any other text, and tokens that were added and are not special, are what they were
    others = "a b a" if backend.token_to_id("<tool>") is None else "a <tool> b"
    assert tokenizer.encode([others], np.dtype(np.int32))[0][:-1].tolist() == backend.encode(others).ids
    assert tokenizer.content == backend.to_str(), "what is saved is the file that was given"


def test_what_needs_no_change_is_not_changed():
    content = ours.train_tokenizer(["some text, some more"], 300, "<|endoftext|>").content
    assert read_literally(content, "<|endoftext|>") is content


def test_a_text_that_becomes_the_end_of_a_document_all_the_same_is_refused():
    """Where the model's token for what it does not know ends documents, too."""
    backend = Tokenizer(models.WordLevel({EOD: 0, "a": 1}, unk_token=EOD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="out of text, of the document that begins 'a thing'"):
        ours.Tokenizer(backend.to_str(), EOD).encode(["a", "a thing"], np.dtype(np.int32))


def test_a_missing_end_of_document_token_suggests_the_nearest():
    content = merged().to_str()
    with pytest.raises(UserError, match=r"no end-of-document token '</S>'.*most like it: </s>.*usual for this: </s>"):
        ours.Tokenizer(content, "</S>")
    assert json.loads(content)["added_tokens"][0]["content"] == EOD


def test_characters_without_a_token_are_known_to_vanish():
    backend = Tokenizer(models.BPE({EOD: 0, "a": 1}, []))
    assert ours.Tokenizer(backend.to_str(), EOD).loses_characters()
    assert not any(ours.Tokenizer(make().to_str(), EOD).loses_characters() for make in (added_not_special, unigram, word_level))
