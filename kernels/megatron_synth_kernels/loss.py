"""Cross-entropy over a vocabulary that one rank holds whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per-token cross-entropy in fp32: log(sum(exp(logits))) - logits[label].

    Args:
        logits: [S, B, V].
        labels: [S, B], int64.

    Returns:
        [S, B], fp32 nats.
    """
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return flat.view(labels.shape)
