"""Made-up text of any size, for measurements that must not read one file again and again.

Words are drawn by Zipf's law from 2^18 made-up ones, some documents from another alphabet; one word in a hundred is a new
number, so that the number of different words grows with the text as it does in real text. Lengths are log-normal with a
tail of books. Some documents are copies of earlier ones, whole or with a few words changed, and how many is known.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

VOCABULARY = 2**18
SLOTS = 2**21
"""Places of a table in which each word has as many as its share: a draw is one look-up."""
MEDIAN_WORDS, SIGMA, LEAST_WORDS = 250, 1.1, 5
BOOK_SHARE, BOOK_WORDS = 1 / 5000, (100_000, 700_000)
"""Documents of some MB."""
FOREIGN_SHARE = 0.25
"""Documents whose words are not ASCII."""
NUMBER_SHARE = 0.01
COPY_SHARE, NEAR_COPY_SHARE = 1 / 1000, 1 / 1000
KEPT, LONGEST_COPY = 256, 2000
"""Documents that may be copied: the latest so many, of so many words at most."""
_PLAIN = ("etaoinshrdlcumwfgypbvk",)
_FOREIGN = (
    "àâçèéêîïôöùûüabcdefghilmnoprstu",
    "абвгдежзиклмнопрстуфхцчшщыэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "的一是不了人我在有他这为之大来",
)


@dataclass(frozen=True)
class Corpus:
    """What was written. copies, near_copies: documents that repeat an earlier one, exactly or nearly."""

    files: tuple[Path, ...]
    documents: int
    text_bytes: int
    copies: int
    near_copies: int


def write_corpus(folder: Path, text_bytes: int, *, seed: int = 0, compressed: bool = True) -> Corpus:
    """Write so much text to `folder`: two .jsonl files, and with `compressed` two thirds of it only and the rest as .zst."""
    folder.mkdir(parents=True)
    text = Text(seed)
    names = ["0.jsonl", "1.jsonl"] + ["2.jsonl.zst"] * compressed
    documents = size = 0
    for at, name in enumerate(names):
        with _opened(folder / name) as file:
            while size < text_bytes * (at + 1) // len(names):
                document = next(text)
                file.write(json.dumps({"id": documents, "text": document}, ensure_ascii=False).encode() + b"\n")
                documents += 1
                size += len(document) if document.isascii() else len(document.encode())
    return Corpus(tuple(folder / name for name in names), documents, size, text.copies, text.near_copies)


class Text(Iterator[str]):
    """Documents without end; the same seed gives the same ones."""

    def __init__(self, seed: int):
        self._random = np.random.default_rng(seed)
        self._plain = self._table(_PLAIN)
        self._foreign = self._table(_FOREIGN)
        self._kept: deque[list[str]] = deque(maxlen=KEPT)
        self.copies = self.near_copies = 0

    def __next__(self) -> str:
        kind, random = self._random.random(), self._random
        if len(self._kept) == KEPT and kind < COPY_SHARE + NEAR_COPY_SHARE:
            words = self._kept[int(random.integers(KEPT))]
            if kind < COPY_SHARE:
                self.copies += 1
                return " ".join(words)
            self.near_copies += 1
            changed = words.copy()
            changed[int(random.integers(len(words)))] = "otherwise"
            return " ".join(changed)
        count = max(LEAST_WORDS, int(random.lognormal(np.log(MEDIAN_WORDS), SIGMA)))
        if kind > 1 - BOOK_SHARE:
            count = int(random.integers(*BOOK_WORDS))
        table = self._foreign if random.random() < FOREIGN_SHARE else self._plain
        drawn: list[str] = table[random.integers(0, SLOTS, count)].tolist()
        for place in np.flatnonzero(random.random(count) < NUMBER_SHARE).tolist():
            drawn[place] = str(random.integers(10**9))
        if LEAST_WORDS * 20 <= count <= LONGEST_COPY:
            self._kept.append(drawn)
        return " ".join(drawn)

    def _table(self, alphabets: tuple[str, ...]) -> np.ndarray:
        """Object [SLOTS]: words by Zipf's law; now and then with a mark or a line break after them."""
        random = self._random
        lengths = random.integers(1, 12, VOCABULARY)
        which = random.integers(0, len(alphabets), VOCABULARY)
        draws = random.integers(0, 2**32, (VOCABULARY, 12))
        ends = np.array(["", "", "", "", "", "", ",", ".", ".\n"])[random.integers(0, 9, VOCABULARY)]
        words = np.empty(VOCABULARY, object)
        for number, (length, alphabet, row, end) in enumerate(zip(lengths.tolist(), which.tolist(), draws, ends, strict=True)):
            letters = alphabets[alphabet]
            words[number] = "".join(letters[draw % len(letters)] for draw in row[:length].tolist()) + str(end)
        shares = np.cumsum(1.0 / np.arange(10, VOCABULARY + 10))
        found: np.ndarray = words[np.searchsorted(shares, (np.arange(SLOTS) + 0.5) / SLOTS * shares[-1])]
        return found


def _opened(path: Path) -> IO[Any]:
    if path.suffix == ".zst":
        import zstandard

        return zstandard.open(path, "wb")
    return open(path, "wb")
