"""What a synthetic corpus is like beside the natural text that it was made from: one reading, one record of figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_synth.synthesis.filters.words import words_of
from megatron_synth.synthesis.measure.overlap import Contamination, Overlap, Redundancy
from megatron_synth.synthesis.measure.statistics import (
    CompressionRatio,
    Lengths,
    TypeTokenRatio,
    divergence_by_word,
    kl_divergence,
    novelty,
    tail_share,
)

NOVELTY = (1, 2, 4, 8)
HEAD = 1000
_NAMED_WORDS = 20
_TEXTS = 1024


@dataclass(frozen=True)
class Synthetic:
    """A document of the corpus. parents: the texts that it was made from, none where they are unknown."""

    kind: str
    parents: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class TextFigures:
    """Figures of one body of text.

    words: how many; types: different ones; type_token: different words in windows of 1000, on average; compression: bytes for
    each byte of their zlib stream; tail: share of words that are not among the `HEAD` most frequent natural ones.
    """

    lengths: Lengths
    words: int
    types: int
    type_token: float | None
    compression: float | None
    tail: float


@dataclass(frozen=True)
class CorpusFigures:
    """All figures of a corpus.

    kl: KL(synthetic || natural) of unigrams in nats; kl_reverse: KL(natural || synthetic), which lost words make large.
    more, less: words that the corpus has too often and too rarely, with what each adds to `kl` or to `kl_reverse`.
    novelty: mean share of n-grams that no parent has, by kind and by n, of the texts that have parents and such n-grams.
    kinds: texts of each kind.
    """

    synthetic: TextFigures
    natural: TextFigures
    kl: float
    kl_reverse: float
    more: list[tuple[str, float]]
    less: list[tuple[str, float]]
    novelty: dict[str, dict[int, float]]
    kinds: dict[str, int]
    redundancy: Redundancy
    contamination: list[Contamination]


@dataclass
class _Body:
    """What is counted of texts as they come."""

    counts: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    types: TypeTokenRatio = field(default_factory=TypeTokenRatio)
    compression: CompressionRatio = field(default_factory=CompressionRatio)

    def add(self, text: str) -> list[str]:
        words = words_of(text)
        self.counts.update(words)
        self.lengths.append(len(words))
        self.types.add(words)
        self.compression.add(text)
        return words

    def figures(self, natural: Counter[str]) -> TextFigures:
        return TextFigures(
            lengths=Lengths.of(self.lengths),
            words=self.counts.total(),
            types=len(self.counts),
            type_token=self.types.value,
            compression=self.compression.value,
            tail=tail_share(self.counts, natural, HEAD),
        )


def measure_corpus(
    documents: Iterable[Synthetic],
    natural: Iterable[str],
    *,
    validation: Mapping[str, Iterable[str]] | None = None,
) -> CorpusFigures:
    """Measure a corpus in one reading of each argument.

    The order of the documents matters a little where neighbors are looked at: compression, windows, nearly equal texts.

    Args:
        documents: the corpus, at least one text with a word.
        natural: natural text to compare with, such as all parents, at least one text with a word. Divergences depend on how
            much text is counted: take about as much as there is of the corpus.
        validation: texts of the validation domains, by name.

    Raises:
        ValueError: there is no word in the corpus or in the natural text.
    """
    ours, theirs = _Body(), _Body()
    for text in natural:
        theirs.add(text)
    overlap = Overlap({name: map(words_of, texts) for name, texts in (validation or {}).items()})
    kinds: Counter[str] = Counter()
    new = _Novelty()
    held: list[list[str]] = []
    for document in documents:
        words = ours.add(document.text)
        kinds[document.kind] += 1
        new.add(document, words)
        held.append(words)
        if len(held) == _TEXTS:
            overlap.add(held)
            held = []
    overlap.add(held)
    for name, body in (("corpus", ours), ("natural text", theirs)):
        if not body.counts:
            raise ValueError(f"the {name} has no words")
    return CorpusFigures(
        synthetic=ours.figures(theirs.counts),
        natural=theirs.figures(theirs.counts),
        kl=kl_divergence(ours.counts, theirs.counts),
        kl_reverse=kl_divergence(theirs.counts, ours.counts),
        more=_largest(divergence_by_word(ours.counts, theirs.counts)),
        less=_largest(divergence_by_word(theirs.counts, ours.counts)),
        novelty=new.means(),
        kinds=dict(sorted(kinds.items())),
        redundancy=overlap.redundancy(),
        contamination=overlap.contamination(),
    )


class _Novelty:
    """Sums of shares, by kind and n."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], tuple[float, int]] = {}

    def add(self, document: Synthetic, words: list[str]) -> None:
        if not document.parents:
            return
        parent = words_of("\n\n".join(document.parents))
        for size in NOVELTY:
            share = novelty(words, parent, size)
            if share is not None:
                total, count = self._sums.get((document.kind, size), (0.0, 0))
                self._sums[document.kind, size] = total + share, count + 1

    def means(self) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for (kind, size), (total, count) in sorted(self._sums.items()):
            found.setdefault(kind, {})[size] = total / count
        return found


def _largest(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(parts, key=lambda part: (-part[1], part[0]))[:_NAMED_WORDS]
