"""The two passes of cross-entropy over a chunk of logits, in Triton. See cross_entropy.py for what they mean.

N tokens, V entries of this rank's part of the vocabulary. Each pass reads the logits once; the second writes their gradient
over them. exp is taken 9/8 times per logit in the first pass and once in the second: in bf16 a logit comes every 0.46 ps at
4.3 TB/s, and an H200 makes an exp every 0.27 ps (132 processors x 16 per clock at 1.75 GHz), so both stay bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_synth_kernels.launch import ceil_div
from megatron_synth_kernels.triton.math import rounded

_GROUP = 8  # neighboring logits of one thread: 16 bytes in bf16
_LANES = 512  # groups of a tile
_WARPS = 8
_GRAD_BLOCK = 4096


@triton.jit
def cross_entropy_stats_kernel(
    logits_ptr,
    labels_ptr,
    out_ptr,
    tokens,
    stride,
    first,
    valid,
    VOCABULARY: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One token: a row of logits, from one end to the other. Padding is read, to keep loads aligned, and left out."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * stride
    place = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # A running maximum and sum per thread: neither a shuffle nor a barrier inside the loop. The maximum of a group comes first,
    # so that the sum is rescaled once for GROUP logits.
    maximum = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, VOCABULARY, LANES * GROUP):
        x = tl.load(row_ptr + start + place, mask=start + place < VOCABULARY, other=float("-inf")).to(tl.float32)
        x = tl.where(start + place < valid, x, float("-inf"))
        higher = tl.maximum(maximum, tl.max(x, axis=1))
        # while all is -inf: exp(-inf - 0) = 0, where exp(-inf + inf) would not be a number
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
        maximum = higher
    highest = tl.max(maximum, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total_sum = tl.sum(total * tl.exp(maximum - base), axis=0)
    label = tl.load(labels_ptr + token) - first
    here = (label >= 0) & (label < valid)
    own = tl.load(row_ptr + label, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + token, highest)
    tl.store(out_ptr + tokens + token, total_sum)
    tl.store(out_ptr + 2 * tokens + token, own)


@triton.jit
def cross_entropy_grad_kernel(
    logits_ptr,
    labels_ptr,
    log_sum_exp_ptr,
    scale_ptr,
    stride,
    first,
    valid,
    z_loss,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK logits of one token."""
    blocks: tl.constexpr = (VOCABULARY + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < VOCABULARY
    row_ptr = logits_ptr + token * stride
    x = tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + token)
    log_sum_exp = tl.load(log_sum_exp_ptr + token)
    label = tl.load(labels_ptr + token) - first
    softmax = tl.exp(x - log_sum_exp) * (1.0 + 2.0 * z_loss * log_sum_exp)
    grad = tl.where(column == label, softmax - 1.0, softmax) * scale
    # a masked token has no gradient, nor has padding, whatever the logits are
    grad = tl.where(scale == 0.0, 0.0, grad)
    grad = tl.where(column < valid, grad, 0.0)
    tl.store(row_ptr + column, rounded(grad, logits_ptr.dtype.element_ty), mask=mask)


def cross_entropy_stats(logits: Tensor, labels: Tensor, vocab_start: int, valid: int | None = None) -> Tensor:
    """As cross_entropy.cross_entropy_stats: logits [N, V], labels [N] -> [3, N] fp32."""
    tokens, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty((3, tokens), dtype=torch.float32, device=logits.device)
    if tokens:
        cross_entropy_stats_kernel[(tokens,)](
            logits,
            labels.contiguous(),
            out,
            tokens,
            logits.stride(0),
            vocab_start,
            vocabulary if valid is None else valid,
            VOCABULARY=vocabulary,
            LANES=_LANES,
            GROUP=_GROUP,
            num_warps=_WARPS,
        )
    return out


def cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    log_sum_exp: Tensor,
    scale: Tensor,
    z_loss: float,
    valid: int | None = None,
) -> Tensor:
    """As cross_entropy.cross_entropy_grad_: the gradient of logits [N, V], written over them."""
    tokens, vocabulary = logits.shape
    assert logits.stride(1) == 1, "written in place, so neighboring logits must lie side by side"
    if tokens:
        cross_entropy_grad_kernel[(tokens * ceil_div(vocabulary, _GRAD_BLOCK),)](
            logits,
            labels.contiguous(),
            log_sum_exp.contiguous(),
            scale.contiguous(),
            logits.stride(0),
            vocab_start,
            vocabulary if valid is None else valid,
            z_loss,
            VOCABULARY=vocabulary,
            BLOCK=_GRAD_BLOCK,
            num_warps=_WARPS,
        )
    return logits
