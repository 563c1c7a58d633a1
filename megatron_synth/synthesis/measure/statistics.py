"""Figures of texts as functions of words: distribution, variety, novelty, compressibility.

Words are those of the filters: case folded, numbers included. Divergences are in nats.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 1000
"""Words in which different ones are counted: a share of different words falls with the length of what is counted."""


def kl_divergence(counts: Mapping[str, int], reference: Mapping[str, int], smoothing: float = 1.0) -> float:
    """Kullback-Leibler divergence of two unigram distributions, KL(counts || reference) in nats.

    Both are taken over the words of either, each counted `smoothing` times more than it occurs, so that a word which one of
    them lacks does not make it infinite. It depends on how much text was counted: compare corpora of one size.

    Args:
        counts: how often each word occurs in the one.
        reference: and in the other.
        smoothing: above 0; 1 is Laplace's rule.

    Raises:
        ValueError: neither has a word.
    """
    return sum(part for _, part in divergence_by_word(counts, reference, smoothing))


def divergence_by_word(
    counts: Mapping[str, int], reference: Mapping[str, int], smoothing: float = 1.0
) -> list[tuple[str, float]]:
    """What each word adds to `kl_divergence`, p log(p / q), sorted by word."""
    words = sorted(set(counts) | set(reference))
    if not words:
        raise ValueError("no words to compare")
    ours, theirs = (_smoothed(one, words, smoothing) for one in (counts, reference))
    return list(zip(words, (ours * np.log(ours / theirs)).tolist(), strict=True))


def _smoothed(counts: Mapping[str, int], words: Sequence[str], smoothing: float) -> np.ndarray:
    values = np.array([counts.get(word, 0) for word in words], np.float64) + smoothing
    shares: np.ndarray = values / values.sum()
    return shares


def tail_share(counts: Mapping[str, int], reference: Mapping[str, int], head: int) -> float:
    """Share of the words counted that are not among the `head` most frequent ones of the reference.

    Below the reference's own share the tail of the distribution is being lost, as in models that learn from their own text.
    """
    total = sum(counts.values())
    frequent = sorted(reference, key=lambda word: (-reference[word], word))[:head]
    return 1 - sum(counts.get(word, 0) for word in frequent) / total if total else 0.0


class TypeTokenRatio:
    """Different words among the words of each whole window, on average: streams of any length compare."""

    def __init__(self, window: int = WINDOW):
        self.window = window
        self._held: list[str] = []
        self._different = self._windows = 0

    def add(self, words: Sequence[str]) -> None:
        """Take the words of the next text."""
        self._held.extend(words)
        whole = len(self._held) // self.window * self.window
        for begin in range(0, whole, self.window):
            self._different += len(set(self._held[begin : begin + self.window]))
            self._windows += 1
        del self._held[:whole]

    @property
    def value(self) -> float | None:
        """Between 1 / window and 1; of fewer words than a window, that of all of them; None without words."""
        if self._windows:
            return self._different / (self._windows * self.window)
        return len(set(self._held)) / len(self._held) if self._held else None


def novelty(words: Sequence[str], parent: Sequence[str], size: int) -> float | None:
    """Share of the n-grams of `size` words that the parent does not have; None of a text that is shorter."""
    ngrams = list(zip(*(words[at:] for at in range(size)), strict=False))
    if not ngrams:
        return None
    known = set(zip(*(parent[at:] for at in range(size)), strict=False))
    return sum(ngram not in known for ngram in ngrams) / len(ngrams)


class CompressionRatio:
    """UTF-8 bytes for each byte of their zlib stream: higher is more repetitive, within texts and between neighbors.

    The measure of arXiv 2403.00553. zlib looks back 32 KiB, so the order of the texts matters a little.
    """

    def __init__(self) -> None:
        self._stream = zlib.compressobj(9)
        self._before = self._after = 0

    def add(self, text: str) -> None:
        """Take the next text."""
        data = text.encode("utf-8", "surrogatepass") + b"\n"
        self._before += len(data)
        self._after += len(self._stream.compress(data))

    @property
    def value(self) -> float | None:
        """The ratio of all texts so far; None without text."""
        return self._before / (self._after + len(self._stream.copy().flush())) if self._before else None


@dataclass(frozen=True)
class Lengths:
    """Words of texts: how many texts, and the mean and quantiles of their words."""

    texts: int
    mean: float
    p10: float
    median: float
    p90: float
    longest: int

    @staticmethod
    def of(counts: Sequence[int]) -> Lengths:
        """Of the words of each text; zeros where there is none."""
        if not counts:
            return Lengths(0, 0.0, 0.0, 0.0, 0.0, 0)
        low, middle, high = np.quantile(np.array(counts), [0.1, 0.5, 0.9]).tolist()
        return Lengths(len(counts), math.fsum(counts) / len(counts), low, middle, high, max(counts))
