"""Cross-entropy over a vocabulary that one rank holds whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made in the forward pass, in the memory of the log-probabilities: one [N, V] buffer instead of three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        column = labels[:, None]
        losses = -probabilities.gather(1, column).squeeze(1)
        if ctx.needs_input_grad[0]:
            probabilities.exp_()
            probabilities.scatter_add_(1, column, torch.full_like(column, -1, dtype=torch.float32))
            ctx.save_for_backward(probabilities)
            ctx.dtype = logits.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (softmax_less_label,) = ctx.saved_tensors
        return softmax_less_label.mul_(grad[:, None]).to(ctx.dtype), None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-token cross-entropy in fp32: log(sum(exp(logits))) - logits[label].

    Its gradient can be taken once: it is made in place.

    Args:
        logits: [S, B, V].
        labels: [S, B], int64.

    Returns:
        [S, B], fp32 nats.
    """
    return _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten()).view(labels.shape)  # type: ignore[no-any-return, no-untyped-call]
