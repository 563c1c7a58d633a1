"""Documents of the built-in corpus, and changed copies of some of them: how alike each copy is to its original is known."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from megatron_synth.data.preparing import builtin_corpus

SHINGLE, THRESHOLD = 8, 0.8
COPY_SHARE = 0.25
CHANGED = (0.002, 0.005, 0.01, 0.02, 0.05)
"""Shares of the words of a copy that are replaced; one of these for each."""


def shingles(words: Sequence[str]) -> set[tuple[str, ...]]:
    """The n-grams that near duplicates are judged by."""
    return {tuple(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)}


def jaccard(one: Sequence[str], two: Sequence[str]) -> float:
    """Similarity of two texts, exactly."""
    first, second = shingles(one), shingles(two)
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def write(file: Path, seed: int = 0) -> list[tuple[int, int]]:
    """Write the documents, a line of JSON each, in random order; pairs (original, copy) of at least THRESHOLD."""
    dice = random.Random(seed)
    texts = [text.split() for name in builtin_corpus.NAMES for _, text in builtin_corpus.documents(name)]
    documents: list[tuple[list[str], int | None]] = [(words, None) for words in texts]
    for number, words in enumerate(texts):
        if len(words) >= 4 * SHINGLE and dice.random() < COPY_SHARE:
            share = dice.choice(CHANGED)
            changed = [f"other{dice.randrange(10**6)}" if dice.random() < share else word for word in words]
            documents.append((changed, number))
    order = list(range(len(documents)))
    dice.shuffle(order)
    place = {number: at for at, number in enumerate(order)}
    with open(file, "w") as out:
        for number in order:
            out.write(json.dumps({"text": " ".join(documents[number][0])}) + "\n")
    return [
        (place[original], place[number])
        for number, (words, original) in enumerate(documents)
        if original is not None and jaccard(texts[original], words) >= THRESHOLD
    ]


def precision(file: Path, pairs: Sequence[tuple[int, int]]) -> float:
    """The share of these pairs that are as alike as they should be, exactly."""
    texts = [json.loads(line)["text"].split() for line in file.read_text().splitlines()]
    good = sum(jaccard(texts[one], texts[two]) >= THRESHOLD for one, two in pairs)
    return good / max(len(pairs), 1)


def chained(groups: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs that tie documents of one group together."""
    return [pair for group in groups for pair in pairwise(sorted(group))]
