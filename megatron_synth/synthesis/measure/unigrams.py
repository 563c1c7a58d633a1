"""What a corpus has lost of the tail of the natural distribution, by the tokens of one tokenizer.

Corpora of different lengths cannot be compared by what they lack: a short one lacks rare tokens by chance. So each figure has
its counterpart: the same of a draw of as many tokens from the natural unigrams themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_synth.data.shards.source import Source

Counts = npt.NDArray[np.int64]
HEAD_SHARE = 0.9
"""The most frequent natural tokens that together have this share are the head; all others that occur are the tail."""
MOST_TOKENS = 50_000_000
"""Counted of a source at most, from its beginning."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Unigrams:
    """A corpus beside natural text.

    counted: tokens of the corpus; tail_types: different natural tokens in the tail.
    lost: share of these that the corpus never has; lost_by_chance: expected share in a natural draw of as many tokens,
    the mean of (1 - p)^counted. tail: share of the corpus' tokens that are in the tail, which is 1 - HEAD_SHARE or a little
    less in natural text.
    kl: KL(corpus || natural); kl_reverse: KL(natural || corpus), in nats, each token counted once more than it occurs;
    kl_by_chance, kl_reverse_by_chance: of one natural draw.
    """

    counted: int
    tail_types: int
    lost: float
    lost_by_chance: float
    tail: float
    kl: float
    kl_reverse: float
    kl_by_chance: float
    kl_reverse_by_chance: float


def count_tokens(source: Source, vocab_size: int, most: int = MOST_TOKENS) -> Counts:
    """How often each token occurs [V] among the first `most` of a source.

    Raises:
        UserError: it cannot be read.
    """
    counts = np.zeros(vocab_size, np.int64)
    end = min(source.num_tokens, most)
    for begin in range(0, end, _BLOCK):
        block = np.empty(min(_BLOCK, end - begin), np.int64)
        source.read(begin, block)
        counts += np.bincount(block, minlength=vocab_size)[:vocab_size]
    return counts


def compare_unigrams(corpus: Counts, natural: Counts, seed: int = 0) -> Unigrams:
    """Measure counts [V] of a corpus against those of natural text.

    seed: of the natural draw.

    Raises:
        ValueError: one of them is empty.
    """
    counted, total = int(corpus.sum()), int(natural.sum())
    if not counted or not total:
        raise ValueError("no tokens to compare")
    tail = in_tail(natural)
    p = natural / total
    drawn = np.random.default_rng(seed).multinomial(counted, p)
    return Unigrams(
        counted=counted,
        tail_types=int(tail.sum()),
        lost=float(np.mean(corpus[tail] == 0)) if tail.any() else 0.0,
        lost_by_chance=float(np.mean((1 - p[tail]) ** counted)) if tail.any() else 0.0,
        tail=float(corpus[tail].sum() / counted),
        kl=_divergence(corpus, natural),
        kl_reverse=_divergence(natural, corpus),
        kl_by_chance=_divergence(drawn, natural),
        kl_reverse_by_chance=_divergence(natural, drawn),
    )


def in_tail(natural: Counts) -> npt.NDArray[np.bool_]:
    """Which tokens [V] are in the tail: those that occur and are not among the most frequent with HEAD_SHARE of all."""
    order = np.argsort(-natural, kind="stable")
    before = np.cumsum(natural[order]) - natural[order]
    head = np.zeros(len(natural), np.bool_)
    head[order[before < HEAD_SHARE * natural.sum()]] = True
    return ~head & (natural > 0)


def _divergence(counts: Counts, reference: Counts) -> float:
    """KL(counts || reference) over the tokens of either, by Laplace's rule."""
    either = (counts > 0) | (reference > 0)
    ours, theirs = (one[either] + 1.0 for one in (counts, reference))
    p, q = ours / ours.sum(), theirs / theirs.sum()
    return float(np.sum(p * np.log(p / q)))
