"""Concepts recombined (after SynthLLM, arXiv 2503.19551): walks over concepts that occur together, across documents.

The concepts of each document come from elsewhere, such as a generator. Two concepts are joined when a document has both, with
the weight log(1 + number of such documents). A walk begins at a concept by the weights that meet there and goes on to another
one by the weight between them. Its parents are the documents that together hold most of its concepts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class Walk:
    """concepts: in the order of the walk, each once. parents: keys of documents, that with most of the concepts first."""

    concepts: tuple[str, ...]
    parents: tuple[str, ...]


class ConceptGraph:
    """The graph of the concepts of documents, by the key of a document. Concepts that differ in case or spaces are one."""

    def __init__(self, concepts: Mapping[str, Iterable[str]]):
        self.documents = {key: frozenset(filter(None, map(_plain, found))) for key, found in sorted(concepts.items())}
        self.holders: dict[str, list[str]] = defaultdict(list)
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for key, found in self.documents.items():
            for concept in sorted(found):
                self.holders[concept].append(key)
            for pair in combinations(sorted(found), 2):
                counts[pair] += 1
        self.neighbors: dict[str, dict[str, float]] = {concept: {} for concept in sorted(self.holders)}
        for (one, other), count in sorted(counts.items()):
            self.neighbors[one][other] = self.neighbors[other][one] = math.log1p(count)

    def walk(self, seed: int, number: int, length: int, most_parents: int = 3) -> Walk:
        """Walk `number` of a seed: up to `length` concepts, fewer where no other one can be reached.

        Raises:
            ValueError: no two concepts occur together in any document.
        """
        starts = {concept: sum(near.values()) for concept, near in self.neighbors.items() if near}
        if not starts:
            raise ValueError("no two concepts occur together in a document")
        draws = np.random.Generator(np.random.Philox(key=[seed, number])).random(length)
        found = [_drawn(starts, draws[0])]
        for uniform in draws[1:]:
            near = {one: weight for one, weight in self.neighbors[found[-1]].items() if one not in found}
            if not near:
                break
            found.append(_drawn(near, uniform))
        return Walk(tuple(found), self._parents(found, most_parents))

    def _parents(self, concepts: Sequence[str], most: int) -> tuple[str, ...]:
        """Documents that add most concepts to those before; of equal ones the least key."""
        left, parents = set(concepts), list[str]()
        candidates = sorted({key for concept in concepts for key in self.holders[concept]})
        while left and len(parents) < most:
            best = max(candidates, key=lambda key: len(left & self.documents[key]))
            if not left & self.documents[best]:
                break
            parents.append(best)
            left -= self.documents[best]
        return tuple(parents)


def _plain(concept: str) -> str:
    return " ".join(concept.casefold().split())


def _drawn(weights: Mapping[str, float], uniform: float) -> str:
    names = list(weights)
    ends = np.cumsum([weights[name] for name in names])
    return names[min(int(np.searchsorted(ends, uniform * ends[-1], side="right")), len(names) - 1)]
