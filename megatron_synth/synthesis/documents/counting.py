"""How many tokens a text has, by the generator's tokenizer where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_synth.core.records import read_text
from megatron_synth.data.tokenizer import open_backend

BYTES_PER_TOKEN = 4
MAX_TOKENIZER_BYTES = 2**28


class TokenCounter(Protocol):
    """Counts tokens."""

    exact: bool
    """Whether a tokenizer counts, or bytes are divided."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        ...


class ByteCounter:
    """Four bytes are a token, which is about right for English."""

    exact = False

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, rounded up."""
        return [-(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN) for text in texts]


class TokenizerCounter:
    """By a tokenizer.json; text that spells a special token is text."""

    exact = True

    def __init__(self, file: Path):
        self._backend = open_backend(read_text(file, MAX_TOKENIZER_BYTES), file)
        self.special = tuple(token.content for token in self._backend.get_added_tokens_decoder().values())
        """What its added tokens spell."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        return [len(one.ids) for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
