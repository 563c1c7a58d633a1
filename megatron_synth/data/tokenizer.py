"""Tokenizers: load, fetch or train a tokenizer.json, and turn texts into token arrays."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import read_regular, write_atomic
from megatron_synth.data.bpe_cache import WordEncoder, encode_all, is_applicable
from megatron_synth.data.literal_text import read_literally
from megatron_synth.data.shards.manifest import canonical_digest
from megatron_synth.storage.objects import read_location
from megatron_synth.storage.remote import location_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

FILE_NAME = "tokenizer.json"
_USUAL_ENDS = frozenset(
    ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]", "<|end▁of▁sentence|>"]
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json and the token that ends a document.

    content: the file, word for word; eod: the token's text; where: what error messages call it.
    """

    content: str
    eod: str
    where: str = field(default=FILE_NAME, compare=False)

    def __post_init__(self) -> None:
        if self.backend.token_to_id(self.eod) is None:
            special = sorted(token.content for token in self.backend.get_added_tokens_decoder().values() if token.special)
            near = get_close_matches(self.eod, self.backend.get_vocab(with_added_tokens=True), 3, 0.6)
            likely = [token for token in special if token in _USUAL_ENDS]
            hint = f"most like it: {', '.join(near)}; " if near else ""
            hint += f"usual for this: {', '.join(likely)}; " if likely else ""
            raise UserError(
                f"{self.where}: has no end-of-document token {self.eod!r}; set `tokenizer.eod` to the one that it has; {hint}"
                f"its special tokens are {', '.join(special[:20]) or 'none'}"
            )

    @cached_property
    def backend(self) -> Backend:
        """The `tokenizers` object of the file, told to look for no special tokens in text."""
        return open_backend(self.content, self.where)

    @cached_property
    def _text_backend(self) -> Backend:
        """As `backend`, but what spells a special token becomes none in any other way: a document could end itself."""
        content = read_literally(self.content, self.eod)
        return self.backend if content is self.content else open_backend(content, self.where)

    @cached_property
    def eod_id(self) -> int:
        """Id of the token that ends a document."""
        token = self.backend.token_to_id(self.eod)
        assert token is not None
        return token

    @cached_property
    def vocab_size(self) -> int:
        """Largest token id + 1."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the token ids, independent of formatting and of the version that wrote the file."""
        return _fingerprint(self.content)

    def encode(self, texts: Sequence[str], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all texts one after the other [T], each text closed by eod, and the length of each, int32 [N].

        Raises:
            UserError: a text has become the end of a document, which it would be in training.
        """
        if dtype not in self._words:
            applicable = is_applicable(self.content)
            self._words[dtype] = WordEncoder(self._encode_word, dtype) if applicable else None
        words = self._words[dtype]

        def whole(some: list[str]) -> list[np.ndarray]:
            return [np.array(encoding.ids, dtype) for encoding in self._encode(some)]

        found = whole(list(texts)) if words is None else encode_all(words, texts, whole)
        lengths = np.array([one.size + 1 for one in found], np.int32)
        eod = np.array([self.eod_id], dtype)
        parts = [part for one in found for part in (one, eod)]
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype)
        if np.count_nonzero(tokens == self.eod_id) != len(found):
            number = next(at for at, one in enumerate(found) if (one == self.eod_id).any())
            start = texts[number].lstrip()[:60]
            raise UserError(
                f"{self.where}: makes the end-of-document token {self.eod!r} out of text, of the document that begins "
                f"{start!r}; set `tokenizer.eod` to a token that no text becomes"
            )
        return tokens, lengths

    @property
    def special_tokens(self) -> list[str]:
        """What its special tokens are spelled like."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    @cached_property
    def _markup_backend(self) -> Backend:
        backend = open_backend(self.content, self.where)
        backend.encode_special_tokens = False
        return backend

    def encode_markup(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
        """Tokens of each text [T]: what spells a special token is one. Nothing is added at the end."""
        if not texts:
            return []
        return [
            np.array(one.ids, dtype) for one in self._markup_backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def loses_characters(self) -> bool:
        """Whether characters that are not in the vocabulary vanish, with no token in their place."""
        model = json.loads(self.content).get("model") or {}
        if model.get("type") != "BPE" or model.get("unk_token") is not None or model.get("byte_fallback"):
            return False
        return "ByteLevel" not in json.dumps(json.loads(self.content).get("pre_tokenizer"))

    def _encode(self, texts: list[str]) -> list[Any]:
        return self._text_backend.encode_batch_fast(texts, add_special_tokens=False)

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = self._text_backend.encode(word, add_special_tokens=False).ids
        return ids

    @cached_property
    def _words(self) -> dict[np.dtype[Any], WordEncoder | None]:
        return {}

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of `tokens`; eod and other special tokens are left out."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        write_atomic(path, self.content)


def _fingerprint(content: str) -> str:
    data: dict[str, Any] = json.loads(content)
    for key in ("version", "truncation", "padding"):  # no part of the mapping as used here
        data.pop(key, None)
    merges = data.get("model", {}).get("merges")
    if merges:  # written as "a b" by older versions, as ["a", "b"] by newer ones
        data["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return canonical_digest(data)


def open_backend(content: str, where: str | Path) -> Backend:
    """The `tokenizers` object of a tokenizer.json that cuts, pads and obeys nothing: text that spells a special token is text.

    Raises:
        UserError: it is no tokenizer; `where` names it.
    """
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(content)
    except Exception as error:  # the library raises it bare
        raise UserError(f"{where}: not a tokenizer.json, {error}") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def fingerprint_of(path: Path) -> str:
    """`Tokenizer.fingerprint` of a tokenizer.json, whatever its end-of-document token.

    Raises:
        UserError: the file cannot be read, or is no tokenizer.
    """
    from tokenizers import Tokenizer as Backend

    try:
        content = read_regular(path).decode("utf-8")
        Backend.from_str(content)
        return _fingerprint(content)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a tokenizer.json") from None
    except Exception as error:  # the library raises its own bare
        raise UserError(f"{path}: not a tokenizer.json, {error}") from None


_NO_PART = ("version", "truncation", "padding", "added_tokens")
"""Of a tokenizer.json, what does not decide the ids of text, and what `growth` looks at by itself."""


def growth(old: str, new: str) -> str | None:
    """Why a tokenizer.json is not another one with tokens added to it; None: it is.

    Added tokens may have been added; all else must be the same, and every old token must have its id.
    """
    before, after = json.loads(old), json.loads(new)
    if _fingerprint(json.dumps(_rest(before))) != _fingerprint(json.dumps(_rest(after))):
        parts = {key for key in {*before, *after} - {*_NO_PART} if before.get(key) != after.get(key)}
        return f"{' and '.join(sorted(parts))} differ"
    ids = {token["content"]: token for token in after.get("added_tokens") or []}
    for token in before.get("added_tokens") or []:
        if ids.get(token["content"]) != token:
            return f"the token {token['content']!r} is another one, or is gone"
    taken = set(_ids(before))
    for token in after.get("added_tokens") or []:
        if token["id"] in taken and token not in before["added_tokens"]:
            return f"the new token {token['content']!r} has the id {token['id']} of an old one"
    return None


def _rest(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in _NO_PART}


def _ids(data: dict[str, Any]) -> Iterator[int]:
    vocab = data["model"].get("vocab") or {}
    yield from vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram: in the order of the ids
    yield from (token["id"] for token in data.get("added_tokens") or [])


def load_tokenizer(path: str | Path, eod: str) -> Tokenizer:
    """Read a tokenizer.json."""
    place = location_of(path, "tokenizer.path")
    if place.name.endswith((".model", "vocab.json", "merges.txt", ".bpe", ".tiktoken")):
        raise UserError(
            f"{path}: expected a tokenizer.json; `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT)` of the library "
            "transformers makes one of other formats, which the folder of a model holds"
        )
    try:
        content = read_location(place).decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a tokenizer.json") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a tokenizer.json, {error.reason} at byte {error.start}") from None
    return Tokenizer(content, eod, str(path))


def fetch_tokenizer(name: str, eod: str) -> Tokenizer:
    """The tokenizer.json of a model on the Hugging Face Hub, from its cache when it is there."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, FILE_NAME)
    except Exception as error:  # network, login, no such model: all end the same way
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"tokenizer.name {name!r}: cannot fetch its {FILE_NAME} ({reason}); check the name, the network and your "
            f"login, or download the file and set `tokenizer.path`"
        ) from None
    return Tokenizer(Path(path).read_text(encoding="utf-8"), eod, f"{FILE_NAME} of {name}")


def train_tokenizer(texts: Iterable[str], vocab_size: int, eod: str) -> Tokenizer:
    """Train a byte-level BPE. The same texts in any order and on any number of threads give the same tokenizer.

    The trainer counts words, so that memory grows with the number of different words, about 2 kB each; it is given back.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    content = backend.to_str(pretty=False)
    del backend, trainer
    _release_freed()
    return Tokenizer(content, eod, "the trained tokenizer")


def _release_freed() -> None:
    """Give freed memory back to the system: glibc keeps what many small pieces lie between, hundreds of MB of them here."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other libraries have no such call
        trim(0)
