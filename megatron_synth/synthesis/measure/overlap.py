"""Equal and nearly equal texts of a corpus, and n-grams of validation texts in it, before anything is tokenized.

It counts as `prepare duplicates` does (`data/overlap`), with words in the place of tokens, so that no tokenizer is needed. What
is prepared is compared by that verb, at any size; here about 2 kB of memory are taken for each text of the corpus, and 24 bytes
for each n-gram of the validation texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from megatron_synth.data.overlap.minhash import BINS, minhash
from megatron_synth.data.overlap.ngrams import Batch, hashes, mix

SHINGLE, THRESHOLD, NGRAM = 8, 0.8, 13  # those of `prepare duplicates`
_BANDS = 16
_TEXTS = 2048  # at a time


@dataclass(frozen=True)
class Redundancy:
    """Texts of a corpus that stand in it before, word for word (exact) and nearly (near, the exact ones included)."""

    texts: int
    exact: int
    near: int


@dataclass(frozen=True)
class Contamination:
    """Texts of a validation domain that a corpus has seen: with any of their n-grams, and with at least half of them.

    Texts shorter than an n-gram are left out.
    """

    domain: str
    texts: int
    any: int
    half: int


def batched(texts: Iterable[Sequence[str]]) -> Iterator[Batch]:
    """Texts of words as batches of documents whose tokens are hashes of the words, uint32."""
    ids: dict[str, int] = {}
    held: list[list[int]] = []
    first = 0
    for words in texts:
        held.append([ids.setdefault(word, xxhash.xxh32_intdigest(word.encode("utf-8", "surrogatepass"))) for word in words])
        if len(held) == _TEXTS:
            yield _batch(held, first)
            first += len(held)
            held, ids = [], {}
    if held:
        yield _batch(held, first)


def _batch(texts: list[list[int]], first: int) -> Batch:
    ends = np.cumsum([len(one) for one in texts], dtype=np.int64)
    tokens = np.array([token for one in texts for token in one], np.uint32)
    return Batch(first, tokens, np.concatenate([[0], ends[:-1]]), ends)


class Overlap:
    """Reads a corpus once, batch by batch, and tells both.

    Args:
        validation: texts of words by the name of their domain.
    """

    def __init__(self, validation: Mapping[str, Iterable[Sequence[str]]]):
        self._domains = {name: [hashes(batch, NGRAM) for batch in batched(texts)] for name, texts in validation.items()}
        values = [values for parts in self._domains.values() for values, _ in parts]
        self._wanted = np.unique(np.concatenate(values)) if values else np.empty(0, np.uint64)
        self._seen = np.zeros(self._wanted.size, bool)
        self._texts = self._exact = self._near = 0
        self._digests: set[int] = set()
        self._bands: dict[int, np.ndarray] = {}

    def add(self, texts: Sequence[Sequence[str]]) -> None:
        """Take the next texts, of words."""
        for batch in batched(texts):
            self._mark(batch)
            self._compare(batch)

    def _mark(self, batch: Batch) -> None:
        values, _ = hashes(batch, NGRAM)
        if values.size and self._wanted.size:
            at = np.minimum(np.searchsorted(self._wanted, values), self._wanted.size - 1)
            self._seen[at[self._wanted[at] == values]] = True

    def _compare(self, batch: Batch) -> None:
        """Each text with the first one in each of its bands."""
        rows, values = minhash(batch, SHINGLE)
        signatures = dict(zip(rows.tolist(), (values & np.uint64(0xFFFF)).astype(np.uint16), strict=True))
        bands = dict(zip(rows.tolist(), _bands(values).tolist(), strict=True))
        for number, (begin, end) in enumerate(zip(batch.starts.tolist(), batch.ends.tolist(), strict=True)):
            if begin == end:
                continue
            digest = xxhash.xxh3_64_intdigest(batch.tokens[begin:end].data)
            exact = digest in self._digests
            self._digests.add(digest)
            near = exact
            if number in bands:
                signature = signatures[number]
                for band in bands[number]:
                    other = self._bands.setdefault(band, signature)
                    near = near or (other is not signature and bool(np.mean(other == signature) >= THRESHOLD))
            self._texts, self._exact, self._near = self._texts + 1, self._exact + exact, self._near + near

    def redundancy(self) -> Redundancy:
        """Of all texts until now."""
        return Redundancy(self._texts, self._exact, self._near)

    def contamination(self) -> list[Contamination]:
        """Of each validation domain, by all texts until now."""
        return [self._of(name, parts) for name, parts in self._domains.items()]

    def _of(self, name: str, parts: list[tuple[np.ndarray, np.ndarray]]) -> Contamination:
        texts = seen_any = seen_half = 0
        for values, rows in parts:
            if not values.size:
                continue
            seen = self._seen[np.searchsorted(self._wanted, values)]
            present, where = np.unique(rows, return_inverse=True)
            hits, ngrams = np.bincount(where, seen), np.bincount(where)
            texts += present.size
            seen_any += int(np.count_nonzero(hits))
            seen_half += int(np.count_nonzero(2 * hits >= ngrams))
        return Contamination(name, texts, seen_any, seen_half)


def _bands(values: np.ndarray) -> np.ndarray:
    """One hash of each band of MinHash values uint64 [N, BINS]: uint64 [N, bands]."""
    totals = np.tile(np.arange(_BANDS, dtype=np.uint64), (values.shape[0], 1))
    for row in range(BINS // _BANDS):
        totals = mix(totals ^ values[:, row :: BINS // _BANDS])
    return totals
