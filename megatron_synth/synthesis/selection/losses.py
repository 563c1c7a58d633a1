"""Parents by loss (after S3, arXiv 2310.13671): text is made where a small model is weak."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_synth.config.errors import UserError


@dataclass(frozen=True)
class DocumentLoss:
    """Of a document in an evaluation: the sum of the losses of its tokens in nats, and how many these are."""

    total: float
    tokens: int


def highest_losses(losses: Mapping[str, DocumentLoss], count: int, *, min_tokens: int = 32) -> list[str]:
    """Keys of the `count` documents with the highest mean loss of a token, the highest first; of equal ones the least key.

    Args:
        losses: by document.
        count: at least 1; fewer come back where there are fewer documents.
        min_tokens: shorter documents are left out: their means scatter, and the extremes would be noise.

    Raises:
        UserError: count is below 1, or a loss is not finite, as of a run that diverged.
    """
    if count < 1:
        raise UserError(f"parents by loss: expected at least 1 document, got {count}")
    for key, one in losses.items():
        if not math.isfinite(one.total):
            raise UserError(f"parents by loss: document {key!r} has the loss {one.total}; evaluate a run that did not diverge")
    means = {key: one.total / one.tokens for key, one in losses.items() if one.tokens >= max(min_tokens, 1)}
    return sorted(means, key=lambda key: (-means[key], key))[:count]
