"""RMSNorm (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Y = x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Args:
        x: [..., H].
        weight: [H].
        eps: added to the mean square.

    Returns:
        [..., H], in x's dtype.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
