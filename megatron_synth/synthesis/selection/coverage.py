"""Coverage selection (ACS, arXiv 2504.14508): k of n documents that stand for most of the others.

Documents are joined in a graph when they are similar, and a choice covers itself and its neighbors. For k documents, the
largest threshold of similarity is sought at which greedy maximum coverage still covers a wanted share: a larger one would leave
more documents without a representative, a smaller one would let unlike documents stand for each other.

Greedy maximum coverage covers at least 1 - 1/e of what the best k would (G. Nemhauser, L. Wolsey, M. Fisher 1978).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xxhash

from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.filters.words import words_of

DIMENSIONS = 4096
_BLOCK = 1024  # documents whose similarities with all others are in memory at a time
_STEPS = 30  # of the bisection: thresholds to 1e-9


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    chosen: positions of the documents, in their own order.
    threshold: similarity from which on documents are neighbors; None where all were taken.
    covered: share of the documents that are chosen or neighbors of one that is.
    """

    chosen: tuple[int, ...]
    threshold: float | None
    covered: float


def hashed_ngrams(texts: Sequence[str], dimensions: int = DIMENSIONS) -> np.ndarray:
    """Vectors float32 [N, dimensions] of length 1 whose products are similarities: words and pairs of words, hashed.

    Each counts by the root of its frequency times its inverse document frequency, log((1 + N) / (1 + documents)) + 1, with a
    sign from its hash, so that collisions cancel. A text without words is 0.
    """
    counts = []
    documents: Counter[int] = Counter()
    for text in texts:
        words = words_of(text)
        pairs = [f"{one} {other}" for one, other in pairwise(words)]
        found = Counter(xxhash.xxh3_64_intdigest(part.encode("utf-8", "surrogatepass")) for part in (*words, *pairs))
        counts.append(found)
        documents.update(found.keys())
    vectors = np.zeros((len(texts), dimensions), np.float32)
    for row, found in enumerate(counts):
        for digest, count in found.items():
            weight = math.sqrt(count) * (math.log((1 + len(texts)) / (1 + documents[digest])) + 1)
            vectors[row, (digest >> 1) % dimensions] += weight if digest & 1 else -weight
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)


@dataclass(frozen=True)
class Neighbors:
    """The most similar documents of each, in rows one after the other: of document i, [starts[i], starts[i + 1]).

    Each pair stands there twice, once for each of the two, and no document is its own neighbor.
    """

    starts: np.ndarray
    others: np.ndarray
    similarities: np.ndarray

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self.starts.size - 1


def nearest(vectors: np.ndarray, count: int = 256) -> Neighbors:
    """The `count` most similar documents of each by the product of their vectors [N, D], and those it is one of for.

    Exact, in blocks, in time that grows with the square of N: seconds of a core for thousands of documents.
    """
    total = vectors.shape[0]
    count = min(count, total - 1)
    ones, twos, values = [], [], []
    for begin in range(0, total, _BLOCK):
        similar = vectors[begin : begin + _BLOCK] @ vectors.T
        rows = np.arange(similar.shape[0])
        similar[rows, begin + rows] = -np.inf
        best = np.argpartition(-similar, count - 1, axis=1)[:, :count] if count > 0 else np.empty((rows.size, 0), np.int64)
        ones.append(np.repeat(begin + rows, count))
        twos.append(best.ravel())
        values.append(np.take_along_axis(similar, best, axis=1).ravel())
    one, two, value = (np.concatenate(part) if part else np.empty(0) for part in (ones, twos, values))
    one, two = one.astype(np.int64), two.astype(np.int64)
    low, high = np.minimum(one, two), np.maximum(one, two)
    pairs, first = np.unique(low * max(total, 1) + high, return_index=True)
    low, high, value = pairs // max(total, 1), pairs % max(total, 1), value[first]
    rows, others, both = np.concatenate([low, high]), np.concatenate([high, low]), np.concatenate([value, value])
    order = np.lexsort((others, rows))
    starts = np.searchsorted(rows[order], np.arange(total + 1))
    return Neighbors(starts, others[order], both[order])


def greedy_coverage(neighbors: Neighbors, k: int, threshold: float) -> tuple[list[int], int]:
    """Choose k documents one by one, each the one that covers most of those not covered yet; of equal ones the first.

    Returns:
        The choice in the order of choosing, and how many documents it covers.
    """
    starts, similar = neighbors.starts, neighbors.similarities >= threshold
    around = [neighbors.others[a:b][similar[a:b]] for a, b in pairwise(starts.tolist())]
    covered = np.zeros(neighbors.documents, bool)
    heap = [(-(1 + one.size), number) for number, one in enumerate(around)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < k:
        gain, number = heapq.heappop(heap)
        now = int(not covered[number]) + int(np.count_nonzero(~covered[around[number]]))
        if now < -gain:  # gains only fall, so that one which is still the largest needs no other look
            heapq.heappush(heap, (-now, number))
            continue
        chosen.append(number)
        covered[number] = True
        covered[around[number]] = True
    return chosen, int(np.count_nonzero(covered))


def select(neighbors: Neighbors, k: int, coverage: float = 0.9) -> Selection:
    """Choose k documents at the largest threshold at which they cover a share; k = n chooses all.

    Where not even all neighbors that are known reach the share, as each document knows but some, all of them are used, and
    `covered` says what was reached.

    Raises:
        UserError: k or coverage is out of its range.
    """
    total = neighbors.documents
    if not 1 <= k <= total:
        raise UserError(f"coverage selection: expected 1 to {total} documents to choose, got {k}")
    if not 0 < coverage <= 1:
        raise UserError(f"coverage selection: expected a coverage above 0 and at most 1, got {coverage}")
    if k == total:
        return Selection(tuple(range(total)), None, 1.0)
    low = float(neighbors.similarities.min())
    high = float(neighbors.similarities.max()) + 1e-6
    best, covered = greedy_coverage(neighbors, k, low)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        chosen, now = greedy_coverage(neighbors, k, middle)
        if now >= coverage * total:
            low, best, covered = middle, chosen, now
        else:
            high = middle
    return Selection(tuple(sorted(best)), low, covered / total)


def choose_at_random(total: int, k: int, seed: int) -> tuple[int, ...]:
    """k of `total` documents at random, in their own order: what a selection is held against."""
    return tuple(sorted(np.random.Generator(np.random.Philox(key=seed)).permutation(total)[:k].tolist()))
