"""Bytes of tokens add up to the bytes of the text that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_synth.data.token_bytes import token_bytes
from megatron_synth.data.tokenizer import train_tokenizer

TEXTS = [
    "plain words, plain words",
    "Größe und Maß: 12 €",
    "日本語のテキスト",
    "emoji 🙂🙂 \n\ttabs",
    "a" * 70,
    "[eod] spelled",
    "\x00\x7f",
]


def _bytes_of(path: Path, backend: Any, text: str, eod: int) -> int:
    table = token_bytes(path, eod)
    ids = [*backend.encode(text, add_special_tokens=False).ids, eod]
    return int(table.sizes[ids].sum() - table.added[ids[0]])


def _byte_level(eod_is_special: bool) -> Tokenizer:
    backend = Tokenizer.from_str(train_tokenizer(TEXTS * 3, 400, "<eod>").content)
    if not eod_is_special:
        backend.add_tokens([AddedToken("<mark>", special=False)])
    backend.encode_special_tokens = True
    return backend


def _pieces(*, prepend: str, fallback: bool) -> Tokenizer:
    """SentencePiece's way: spaces as a character of their own, unknown characters as bytes."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<eod>", "<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS[:1] * 5 + ["other words here"], trainer)
    vocab = [(token, score) for token, score in json.loads(backend.to_str())["model"]["vocab"]]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    again = Tokenizer(models.Unigram(vocab, unk_id=1, byte_fallback=fallback))
    again.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    again.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)])
    again.add_special_tokens(["<eod>", "<unk>"])
    again.encode_special_tokens = True
    return again


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "bytes with another token", "pieces", "pieces without a first space", "llama"])
def test_the_bytes_of_a_text(kind: str, text: str, tmp_path: Path) -> None:
    if kind.startswith("bytes"):
        backend = _byte_level(kind == "bytes")
    else:
        backend = _pieces(prepend="never" if kind == "pieces without a first space" else "always", fallback=True)
    if kind == "llama":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    path = tmp_path / "tokenizer.json"
    path.write_text(backend.to_str())
    assert _bytes_of(path, backend, text, backend.token_to_id("<eod>")) == len(text.encode())


def test_an_added_token_that_is_text_counts(tmp_path: Path) -> None:
    backend = _byte_level(False)
    path = tmp_path / "tokenizer.json"
    path.write_text(backend.to_str())
    assert token_bytes(path, 0).sizes[backend.token_to_id("<mark>")] == len("<mark>")


def test_an_end_of_document_that_is_not_special_is_no_text(tmp_path: Path) -> None:
    backend = _byte_level(True)
    path = tmp_path / "tokenizer.json"
    path.write_text(backend.to_str())
    letter = backend.token_to_id("a")
    assert (token_bytes(path, None).sizes[letter], token_bytes(path, letter).sizes[letter]) == (1, 0)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}'])
def test_another_file_says_so(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"not a tokenizer.json"):
        token_bytes(path, None)
    with pytest.raises(ValueError, match="absent"):
        token_bytes(tmp_path / "absent", None)


def test_tokens_that_forget_the_text_say_so(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    path.write_text(backend.to_str())
    with pytest.raises(ValueError, match="cannot be recovered"):
        token_bytes(path, None)
