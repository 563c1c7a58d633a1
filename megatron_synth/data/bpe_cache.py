r"""Tokenizing by looking up words: several times the speed of the tokenizer itself, and the same tokens.

Byte-level BPE as GPT-2 has it first cuts text by the pattern

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

and encodes each piece alone, so a table of pieces that were seen gives the tokens. Which characters are letters,
digits or space is beyond doubt in ASCII only, hence two ways to cut:

ASCII text   by the pattern itself.
other text   before each run of ASCII space: no piece reaches from a character that is no space to one that is, and what
             follows a cut does not depend on what stands before it. A part is encoded by the tokenizer as a whole.

Text with characters that some library may or may not take for space is left to the tokenizer, and so is all text when the
tokenizer cuts in any other way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

WORDS = 2**17  # in the table, about 40 MB; when it is full it begins again
LONGEST_WORD = 48  # longer ones hardly occur again

_SPACE = r"\t-\r "
_PIECE = re.compile(
    rf"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^{_SPACE}A-Za-z0-9]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)
_PART = re.compile(rf"[{_SPACE}]*[^{_SPACE}]+|[{_SPACE}]+")
# separators, format characters and what is space to some
_DOUBTFUL = re.compile("[\x1c-\x1f\x80-\xa0\xad\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]")


def is_applicable(content: str) -> bool:
    """Whether a tokenizer.json, used without special tokens in the text, cuts text by the pattern above and does no more."""
    data: dict[str, Any] = json.loads(content)
    before = data.get("pre_tokenizer") or {}
    model = data.get("model") or {}
    return (
        data.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and before.get("add_prefix_space") is False
        and before.get("use_regex", True) is True
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and all(token.get("special") for token in data.get("added_tokens", []))
    )


class _Table(dict[str, bytes]):
    """Token ids, as bytes, of words; encodes those that it does not have."""

    def __init__(self, encode: Callable[[str], list[int]], dtype: np.dtype[Any]):
        super().__init__()
        self._encode, self._dtype = encode, dtype

    def __missing__(self, word: str) -> bytes:
        data = np.array(self._encode(word), self._dtype).tobytes()
        if len(word) <= LONGEST_WORD:
            if len(self) >= WORDS:
                self.clear()
            self[word] = data
        return data


class WordEncoder:
    """Encodes texts by words. encode: the tokenizer's own way, for a word; dtype: of the tokens."""

    def __init__(self, encode: Callable[[str], list[int]], dtype: np.dtype[Any]):
        self._dtype = dtype
        self._pieces, self._parts = _Table(encode, dtype), _Table(encode, dtype)

    def encode(self, text: str) -> np.ndarray | None:
        """Tokens [T] of the text; None when it has to be left to the tokenizer."""
        if _DOUBTFUL.search(text):
            return None
        pattern, table = (_PIECE, self._pieces) if text.isascii() else (_PART, self._parts)
        return np.frombuffer(b"".join(map(table.__getitem__, pattern.findall(text))), self._dtype)


def encode_all(words: WordEncoder, texts: Sequence[str], rest: Callable[[list[str]], list[np.ndarray]]) -> list[np.ndarray]:
    """Tokens of each text; `rest` encodes those that words cannot."""
    found = [words.encode(text) for text in texts]
    missing = [number for number, tokens in enumerate(found) if tokens is None]
    for number, tokens in zip(missing, rest([texts[number] for number in missing]) if missing else [], strict=True):
        found[number] = tokens
    return [tokens for tokens in found if tokens is not None]
