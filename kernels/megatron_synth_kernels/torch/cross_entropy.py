"""Cross-entropy over a chunk of logits in two elementwise passes, between which tensor-parallel ranks put their parts together.

N tokens, V entries of this rank's part of the vocabulary. The first `valid` of them are tokens, the rest is padding: it has no
probability and no gradient, so that nothing depends on how far a vocabulary is padded.

With m the maximum of all logits, s = sum(exp(logit - m)) and L = m + log(s):  loss = L - logit[label];
d loss / d logit = exp(logit - L) - [logit is the label's].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements worked on at once: 1 MB stays in a cache, 64 MB fill a GPU


def _blocks(logits: Tensor) -> Iterator[slice]:
    tokens, vocabulary = logits.shape
    rows = max(1, _BLOCK[logits.device.type] // max(vocabulary, 1))
    return (slice(first, first + rows) for first in range(0, tokens, rows))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32, or fp64 for fp64 logits, which references have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _column(labels: Tensor, vocab_start: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Places of the labels in this part of the vocabulary, [N, 1], 0 where they are not in it; and whether they are."""
    column = labels[:, None] - vocab_start
    here = (column >= 0) & (column < vocabulary)
    return column.where(here, 0), here


def cross_entropy_stats(logits: Tensor, labels: Tensor, vocab_start: int, valid: int | None = None) -> Tensor:
    """What one rank knows of the cross-entropy of each token.

    Args:
        logits: [N, V], fp32 or bf16; -inf is a logit like any other.
        labels: [N] int64, ids of the whole vocabulary.
        vocab_start: id of this part's first entry.
        valid: entries that are tokens; None: all.

    Returns:
        [3, N] fp32: the local maximum m, sum(exp(logit - m)) (0 where all are -inf, or there are only padding entries), the
        label's logit (0 where the label is in another part).
    """
    stats = torch.empty((3, len(logits)), dtype=_wide(logits.dtype), device=logits.device)
    maximum, total, own = stats.unbind(0)
    logits = logits[:, :valid]
    if not logits.shape[1]:
        maximum.fill_(-torch.inf)
        stats[1:].zero_()
        return stats
    for rows in _blocks(logits):
        block = logits[rows]
        maximum[rows] = block.amax(dim=1)
        # the largest probability is exp(m - m) / sum: torch's softmax is one fused pass, its parts are three
        torch.reciprocal(torch.softmax(block, dim=1, dtype=stats.dtype).amax(dim=1), out=total[rows])
    total.masked_fill_(maximum == -torch.inf, 0.0)
    column, here = _column(labels, vocab_start, logits.shape[1])
    own.copy_(logits.gather(1, column).where(here, 0.0).squeeze(1))
    return stats


def cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    log_sum_exp: Tensor,
    scale: Tensor,
    z_loss: float,
    valid: int | None = None,
) -> Tensor:
    """scale * (softmax * (1 + 2 * z_loss * L) - onehot(label)), written over the logits.

    It is the gradient of scale * (cross-entropy + z_loss * L^2).

    Args:
        logits: [N, V], overwritten.
        labels: [N] int64, ids of the whole vocabulary.
        vocab_start: id of this part's first entry.
        log_sum_exp: [N] fp32, L over the whole vocabulary.
        scale: [N] fp32. A token of scale 0 has no gradient, whatever its logits are.
        z_loss: weight of the square of L.
        valid: entries that are tokens; None: all. The others get no gradient.

    Returns:
        `logits`.
    """
    whole, logits = logits, logits[:, :valid]
    if valid is not None:
        whole[:, valid:] = 0.0
    if not logits.shape[1]:
        return whole
    column, here = _column(labels, vocab_start, logits.shape[1])
    factor = (scale * (1.0 + 2.0 * z_loss * log_sum_exp) if z_loss else scale)[:, None]
    shift, masked = log_sum_exp[:, None], (scale == 0)[:, None]
    any_masked = logits.is_cuda or bool(masked.any())  # where looking would be a wait, none is asked for
    for rows in _blocks(logits):
        block = logits[rows]
        wide = block.sub_(shift[rows]) if block.dtype == shift.dtype else block - shift[rows]
        wide.exp_().mul_(factor[rows])
        wide.scatter_add_(1, column[rows], (-scale[rows, None]).where(here[rows], 0.0))
        if any_masked:
            wide.masked_fill_(masked[rows], 0.0)
        if wide is not block:
            block.copy_(wide)
    return whole
