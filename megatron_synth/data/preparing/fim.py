"""Fill in the middle: documents cut in three, whose middle comes last.

A document becomes, with P, S, M the special tokens for prefix, suffix and middle (Bavarian et al., arXiv 2207.14255; SPM in its
second variant, as SantaCoder and StarCoder have it):

    PSM    P prefix S suffix M middle end
    SPM    P S suffix M prefix middle end

Which documents, in which order of the parts, and where they are cut follows from the seed, the source, the split of the input
and the number of the document in it. Of every 64 training documents of a split, in the order of the input, 64 x share are cut
to within one, those that a keyed order picks; of these `spm` have that form, likewise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import FimConfig
from megatron_synth.data.tokenizer import Tokenizer

BLOCK = 64


@dataclass(frozen=True)
class Cut:
    """How a document is cut: at two places of 2^64, ascending, of its length + 1."""

    spm: bool
    places: tuple[int, int]

    def at(self, length: int) -> tuple[int, int]:
        """Begin and end of the middle of a document of so many characters or tokens."""
        first, last = sorted(place * (length + 1) >> 64 for place in self.places)
        return first, last


class Cutter:
    """The documents of one split of a source, asked for one after the other."""

    def __init__(self, config: FimConfig, source: str, split: int):
        self._config = config
        self._key = hashlib.blake2b(f"{config.seed}\0{source}\0{split}".encode(), digest_size=16).digest()
        self._order: list[int] = []
        self._number = 0

    def next(self) -> Cut | None:
        """What becomes of the next document; None: it stays as it is."""
        block, place = divmod(self._number, BLOCK)
        if place == 0:
            numbers = np.frombuffer(self._hash(f"order {block}", 8 * BLOCK), "<u8")
            self._order = np.argsort(numbers, kind="stable").tolist()
        turn = BLOCK * block + self._order[place]
        drawn = self._hash(f"cut {self._number}", 16)
        self._number += 1
        before, after = _due(turn, self._config.share), _due(turn + 1, self._config.share)
        if before == after:
            return None
        spm = _due(before, self._config.spm) < _due(before + 1, self._config.spm)
        return Cut(spm, (int.from_bytes(drawn[:8], "little"), int.from_bytes(drawn[8:], "little")))

    def _hash(self, what: str, size: int) -> bytes:
        return hashlib.shake_128(self._key + what.encode()).digest(size)


def _due(turns: int, share: Any) -> int:
    """floor(turns x share)."""
    return int(turns * share.numerator // share.denominator)


def special_ids(tokenizer: Tokenizer, config: FimConfig, key: str) -> tuple[int, int, int]:
    """Ids of the tokens for prefix, suffix and middle. key: of the source, for messages.

    Raises:
        UserError: the tokenizer does not have them, as special tokens that no text becomes.
    """
    special = {token.content: number for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    names = config.prefix, config.suffix, config.middle
    for what, name in zip(("prefix", "suffix", "middle"), names, strict=True):
        if name not in special or name == tokenizer.eod:
            known = ", ".join(sorted(token for token in special if "fim" in token.lower()) or sorted(special)[:20]) or "none"
            raise UserError(
                f"{key}.{what}: {tokenizer.where} has no special token {name!r}; set it to the one that it has: {known}"
            )
    first, second, third = (special[name] for name in names)
    return first, second, third


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    cuts: Sequence[Cut | None],
    config: FimConfig,
    ids: tuple[int, int, int],
    dtype: np.dtype[Any],
) -> tuple[np.ndarray, np.ndarray]:
    """As `Tokenizer.encode`, with documents cut. A document of which the tokenizer leaves nothing stays so."""
    pieces: list[str] = []
    for text, cut in zip(texts, cuts, strict=True):
        if cut is None or config.by == "tokens":
            pieces.append(text)
        else:
            first, last = cut.at(len(text))
            pieces += [text[:first], text[first:last], text[last:]]
    tokens, lengths = tokenizer.encode(pieces, dtype)
    bodies = iter(np.split(tokens, np.cumsum(lengths)[:-1]) if pieces else ())
    found: list[np.ndarray] = []
    prefix_id, suffix_id, middle_id = (np.array([one], dtype) for one in ids)
    for cut in cuts:
        whole = next(bodies)
        if cut is None:
            found.append(whole)
            continue
        if config.by == "tokens":
            first, last = cut.at(len(whole) - 1)
            prefix, middle, suffix = whole[:first], whole[first:last], whole[last:-1]
        else:
            prefix, middle, suffix = whole[:-1], next(bodies)[:-1], next(bodies)[:-1]
        if not len(prefix) + len(middle) + len(suffix):
            found.append(whole[-1:])
        elif cut.spm:
            found.append(np.concatenate([prefix_id, suffix_id, suffix, middle_id, prefix, middle, whole[-1:]]))
        else:
            found.append(np.concatenate([prefix_id, prefix, suffix_id, suffix, middle_id, middle, whole[-1:]]))
    joined = np.concatenate(found) if found else np.empty(0, dtype)
    return joined, np.array([len(one) for one in found], np.int32)
