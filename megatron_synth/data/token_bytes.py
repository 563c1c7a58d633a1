"""How many bytes of text each token stands for, so that losses by token become bits per byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_synth.core.files import read_regular

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space in SentencePiece's tokens."""


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """V entries, by token id."""

    sizes: npt.NDArray[np.int64]
    """[V] bytes of UTF-8 that a token adds to the text; 0 for special tokens and the end of a document."""
    added: npt.NDArray[np.int64]
    """[V] how many of these are no text where the token begins a document: the space that some tokenizers put there."""


def token_bytes(path: Path, eod_id: int | None) -> TokenBytes:
    """The bytes of each token of a tokenizer.json.

    Args:
        path: the file.
        eod_id: the token that ends a document, which is no text.

    Raises:
        ValueError: the file cannot be read, or the text cannot be recovered from its tokens; says why.
    """
    from tokenizers import Tokenizer, pre_tokenizers

    try:
        content = read_regular(path).decode("utf-8")
        backend = Tokenizer.from_str(content)
        state = json.loads(content)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception as error:  # the library raises it bare
        raise ValueError(f"{path}: not a tokenizer.json, {error}") from None
    decoders = list(_flat(state.get("decoder"), "decoders"))
    kinds = {part["type"] for part in decoders}
    replaces = any(part["type"] == "Replace" and part.get("pattern") == {"String": _SPACE} for part in decoders)
    if "ByteLevel" in kinds:
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())

        def size(token: str) -> int:
            return len(token) if alphabet.issuperset(token) else len(token.encode())

        space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # the byte 0x20 in that alphabet
    elif "Metaspace" in kinds or replaces:
        fallback = "ByteFallback" in kinds

        def size(token: str) -> int:
            single = fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            return 1 if single else len(token.replace(_SPACE, " ").encode())

        space = _SPACE
    else:
        raise ValueError(f"{path}: text cannot be recovered to the byte from tokens of this kind")
    vocab = backend.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocab.values()) + 1, np.int64)
    added = np.zeros_like(sizes)
    begins = _adds_a_space(state)
    for token, number in vocab.items():
        sizes[number] = size(token)
        added[number] = begins and token.startswith(space)
    for number, extra in backend.get_added_tokens_decoder().items():
        sizes[number] = 0 if extra.special else len(extra.content.encode())
        added[number] = 0
    if eod_id is not None and eod_id < sizes.size:
        sizes[eod_id] = added[eod_id] = 0
    return TokenBytes(sizes, added)


def _flat(part: Any, members: str) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer.json, or the members of a sequence of them."""
    if isinstance(part, dict) and isinstance(part.get("type"), str):
        if part["type"] == "Sequence":
            for member in part.get(members, []):
                yield from _flat(member, members)
        else:
            yield part


def _adds_a_space(state: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before each text."""
    for part in _flat(state.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            return True
        if part["type"] == "Metaspace":
            older = "always" if part.get("add_prefix_space") else "never"
            return bool(part.get("prepend_scheme", older) != "never")
    return any(part["type"] == "Prepend" for part in _flat(state.get("normalizer"), "normalizers"))
