"""Keywords of documents, drawn by how much they say: for text about the same matters that is no copy.

A word's weight in a document is its count there times the logarithm of the share of documents that lack it (tf-idf; Sparck
Jones, 1972). Words of most documents say nothing, and words of a single one are often names or typing errors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|[-']){3,30}")
MIN_DOCUMENTS = 2
MAX_SHARE = 0.2
MAX_WORDS = 500_000
"""Different words that are kept while counting; the rarest go when there are twice as many."""


class Keywords:
    """In how many documents each word stands."""

    def __init__(self, texts: Iterable[str]):
        self._frequencies: Counter[str] = Counter()
        self.documents = 0
        for text in texts:
            self._frequencies.update(set(words(text)))
            self.documents += 1
            if len(self._frequencies) > 2 * MAX_WORDS:
                ranked = sorted(self._frequencies.items(), key=lambda entry: (-entry[1], entry[0]))
                self._frequencies = Counter(dict(ranked[:MAX_WORDS]))

    def draw(self, text: str, count: int, seed: int) -> tuple[str, ...]:
        """Up to `count` different words of a text, drawn by weight, in the order of the draw; all when there are fewer."""
        weights = self._weights(text)
        if not weights:
            return ()
        names = sorted(weights)
        values = np.array([weights[name] for name in names])
        # the largest of log(uniform) / weight are a draw by weight without replacement (Efraimidis and Spirakis, 2006)
        keys = np.log(np.random.default_rng(seed).random(len(names))) / values
        return tuple(names[at] for at in np.argsort(-keys, kind="stable")[:count])

    def _weights(self, text: str) -> dict[str, float]:
        weights = {}
        for word, count in Counter(words(text)).items():
            documents = self._frequencies[word]
            usual = documents > max(MAX_SHARE * self.documents, MIN_DOCUMENTS)
            if documents >= min(MIN_DOCUMENTS, self.documents) and not usual:
                weights[word] = count * math.log(1 + self.documents / documents)
        return weights


def words(text: str) -> list[str]:
    """The words of a text in lower case, four letters and longer."""
    return [word.lower() for word in WORD.findall(text)]
