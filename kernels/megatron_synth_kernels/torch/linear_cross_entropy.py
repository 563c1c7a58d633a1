"""Output layer and cross-entropy in one, chunk by chunk of tokens, so that the logits are never whole in memory.

The gradient is made in the forward pass, while a chunk's logits are at hand: it overwrites them, and two products turn it into
the chunk's part of the gradients of hidden states and weight. What lives on until the backward pass is as large as the
hidden states. (Chunks and gradients in the forward pass: Hsu et al., 2024, arXiv 2410.10989. Added here: a vocabulary that
tensor-parallel ranks share, the weight gradient straight in fp32, per-token losses beside the gradient.)

In the forward pass the gradient that will come in from above is not known. It is a scalar, because the function returns the
weighted sum of the losses, and what it will be is passed as `grad_scale`; the backward pass checks that it is.

N tokens, H hidden size, V entries of this rank's part of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_synth_kernels import registry

LOGITS_BYTES = 2**29
"""Logits of a chunk: large enough that adding a chunk's weight gradient to the sum is little beside its product."""


@dataclass(frozen=True)
class Part:
    """Which part of the vocabulary this rank holds."""

    vocab_start: int = 0
    """Id of its first entry."""
    group: ProcessGroup | None = None
    """The ranks that hold the others; None: this rank holds all."""
    vocab_size: int | None = None
    """Tokens of the whole vocabulary. Entries beyond are padding, with no probability and no gradient. None: there are none."""

    def valid(self, entries: int) -> int:
        """How many of this rank's entries are tokens; they come first."""
        return entries if self.vocab_size is None else min(entries, max(0, self.vocab_size - self.vocab_start))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    grad_scale: float = 1.0,
    z_loss: float = 0.0,
    part: Part = Part(),
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of hidden @ weight^T, and of its sum over tokens the gradients.

    total = sum(token_weights * (loss + z_loss * log_sum_exp^2)), z-loss after Chowdhery et al., 2022, arXiv 2204.02311.

    Where the weight has a `main_grad`, the gradient is added to it in the forward pass, by the contract of megatron-core's
    linear layers: the weight's `grad_added_to_main_grad` is set, and the gradient that autograd sees is a placeholder. Two
    forward passes then count twice, whether or not a backward pass follows.

    Args:
        hidden: [N, H]. Under tensor parallelism every rank gets the same, and its own part of the gradient: sum them up.
        weight: [V, H].
        labels: [N] int64, ids of the whole vocabulary.
        token_weights: [N] fp32; None: no gradients are made, `total` is 0.
        grad_scale: the gradient that `total` will get. Without main_grad it may turn out otherwise.
        z_loss: weight of the square of log_sum_exp.
        part: of the vocabulary.
        chunk_tokens: tokens of a chunk; default: as many as LOGITS_BYTES allow.

    Returns:
        total, a scalar in fp32 and the only differentiable output; losses [N], without z-loss, and log_sum_exp [N], in fp32.
        Equal on all ranks of the group.
    """
    with_grad = token_weights is not None and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if chunk_tokens is None:
        fitting = LOGITS_BYTES // (len(weight) * hidden.element_size())
        chunk_tokens = max(128, fitting // 128 * 128)
    return _LinearCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, labels, token_weights, grad_scale, z_loss, part, chunk_tokens, with_grad
    )


def _across_ranks(stats: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """[3, N] of each rank -> log_sum_exp [N] and the label's logit [N], of the whole vocabulary. One collective."""
    if group is None or group.size() == 1:
        maximum, total, own = stats
        return maximum + total.log(), own
    gathered = stats.new_empty((group.size() * 3, stats.shape[1]))
    torch.distributed.all_gather_into_tensor(gathered, stats, group=group)
    maxima, totals, owns = gathered.view(group.size(), 3, -1).unbind(1)
    maximum = maxima.amax(dim=0)
    return maximum + (totals * (maxima - maximum).exp()).sum(dim=0).log(), owns.sum(dim=0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor | None,
        grad_scale: float,
        z_loss: float,
        part: Part,
        chunk_tokens: int,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cross_entropy_stats, cross_entropy_grad_ = registry.get("cross_entropy_stats"), registry.get("cross_entropy_grad")
        wgrad = registry.get("wgrad")
        tokens, valid = len(hidden), part.valid(len(weight))
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses, log_sum_exp = torch.empty((2, tokens), dtype=wide, device=hidden.device).unbind(0)
        logits = hidden.new_empty((min(chunk_tokens, tokens), len(weight)))
        grad_hidden, sums, main_grad = None, None, getattr(weight, "main_grad", None)
        if with_grad:
            assert token_weights is not None
            scale = token_weights * grad_scale
            grad_hidden = torch.empty_like(hidden)
            sums = weight.new_zeros(weight.shape, dtype=wide) if main_grad is None else main_grad
        for first in range(0, tokens, chunk_tokens):
            rows = slice(first, min(first + chunk_tokens, tokens))
            chunk = torch.mm(hidden[rows], weight.t(), out=logits[: rows.stop - first])
            stats = cross_entropy_stats(chunk, labels[rows], part.vocab_start, valid)
            log_sum_exp[rows], own = _across_ranks(stats, part.group)
            torch.sub(log_sum_exp[rows], own, out=losses[rows])
            if grad_hidden is not None and sums is not None:
                grad = cross_entropy_grad_(chunk, labels[rows], part.vocab_start, log_sum_exp[rows], scale[rows], z_loss, valid)
                torch.mm(grad, weight, out=grad_hidden[rows])
                wgrad.wgrad_gemm_accum_fp32(hidden[rows], grad, sums)
        ctx.grad_scale, ctx.weight = grad_scale, weight if main_grad is not None else None
        ctx.save_for_backward(grad_hidden, sums.to(weight.dtype) if main_grad is None and sums is not None else None)
        ctx.mark_non_differentiable(losses, log_sum_exp)
        ctx.set_materialize_grads(False)
        if token_weights is None:
            return losses.new_zeros(()), losses, log_sum_exp
        objective = losses + z_loss * log_sum_exp.square() if z_loss else losses
        # not a product with 0: what is masked out may be infinite
        return (objective * token_weights).where(token_weights != 0, 0.0).sum(), losses, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        grad_hidden, grad_weight = ctx.saved_tensors
        assert grad_hidden is not None, "made without gradients"
        weight = ctx.weight
        if weight is None:
            factor = (grad / ctx.grad_scale).to(grad_hidden.dtype)
            return grad_hidden * factor, grad_weight * factor, *(None,) * 7
        # the weight gradient is where it belongs already, made for this very scale
        torch._assert_async(grad == ctx.grad_scale, "the loss was scaled otherwise than announced")
        if hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            # its hook on the weight wants a gradient to be there, and adds it if the weight has another use
            make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
            grad_weight = make(weight)
        return grad_hidden, grad_weight, *(None,) * 7
