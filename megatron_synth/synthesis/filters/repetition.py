"""Text that repeats itself: the rules of Gopher (arXiv 2112.11446, table A1), and words that follow themselves.

Gopher's shares are those of datatrove's `GopherRepetitionFilter`, but for three things: words are ours and not spaCy's, spaces
count neither in n-grams nor in the text, and an n-gram that stands once is not repeated, however short the text is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megatron_synth.synthesis.filters.base import FiltersConfig

_LONGEST_PERIOD = 40
_LOOP_WORDS = 8  # a shorter loop is emphasis: `very, very, very`


def is_repetitive(text: str, words: Sequence[str], config: FiltersConfig) -> bool:
    """Whether any of the shares is above its threshold, or the words of a text loop."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    repeated, characters = duplicates(lines)
    if repeated > config.max_duplicate_lines * len(lines) or characters > config.max_duplicate_line_characters * len(text):
        return True
    total = sum(map(len, words))
    if any(top_ngram(words, size) > share * total for size, share in config.max_top_ngram.items()):
        return True
    if any(duplicate_ngrams(words, size) > share * total for size, share in config.max_duplicate_ngrams.items()):
        return True
    return longest_loop(words) > config.max_loops


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts stood before, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count, characters


def top_ngram(words: Sequence[str], size: int) -> int:
    """Characters, without spaces, of the n-gram of `size` words that takes most of them; 0 if each stands once."""
    counts = Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))
    return max((count * sum(map(len, ngram)) for ngram, count in counts.items() if count > 1), default=0)


def duplicate_ngrams(words: Sequence[str], size: int) -> int:
    """Characters, without spaces, of n-grams of `size` words that stood before, none counted twice."""
    seen: set[tuple[str, ...]] = set()
    characters = at = 0
    while at <= len(words) - size:
        ngram = tuple(words[at : at + size])
        if ngram in seen:
            characters, at = characters + sum(map(len, ngram)), at + size
        else:
            seen.add(ngram)
            at += 1
    return characters


def longest_loop(words: Sequence[str]) -> int:
    """How often the same one to 40 words follow each other at most, where that is at least 8 words in all; else 1."""
    numbers: dict[str, int] = {}
    text = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int32)
    longest = 1
    for period in range(1, min(_LONGEST_PERIOD, len(words) // 2) + 1):
        equal = text[period:] == text[:-period]
        least = max(_LOOP_WORDS, 2 * period) - period
        if np.count_nonzero(equal) < least:
            continue
        ends = np.flatnonzero(np.concatenate([[True], ~equal, [True]]))
        run = int(np.diff(ends).max()) - 1
        if run >= least:
            longest = max(longest, (run + period) // period)
    return longest
