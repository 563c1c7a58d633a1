"""One AdamW step of one tensor, operation by operation, and rounding to bf16 by chance: what kernels are held to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PHILOX_ROUNDS = 7  # enough to pass every test of TestU01's BigCrush (Salmon et al., 2011, table 2)
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Rounding:
    """Which random bits round a tensor: a function of these three and of the element's place alone.

    seed: of the run, below 2^63. stream: the tensor's number. step: of the optimizer.
    """

    seed: int
    stream: int
    step: int


def philox(elements: Tensor, rounding: Rounding) -> Tensor:
    """32 random bits for each element, by Philox4x32-7 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        elements: int64, places in the tensor.
        rounding: key (seed) and the rest of the counter (stream, step).

    Returns:
        int64 of the same shape, in [0, 2^32).
    """
    c0, c1 = elements & _LOW, (elements >> 32) & _LOW
    c2, c3 = torch.full_like(c0, rounding.stream), torch.full_like(c0, rounding.step)
    k0, k1 = rounding.seed & _LOW, rounding.seed >> 32
    for _ in range(PHILOX_ROUNDS):
        # products of two 32-bit numbers wrap round in int64, but their bits are right
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW
        c2, c3 = ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up with the probability of the part that is cut off; the expectation is x itself.

    Args:
        x: fp32. What is not finite is rounded as usual.
        bits: int64 of the same shape; the lower 16 bits of each decide.
    """
    # sign and magnitude: adding to the lower half of the word moves away from zero with the right probability on both sides
    word = x.view(torch.int32).long() + (bits & 0xFFFF)
    cut = (word & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), cut, x).to(torch.bfloat16)


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one step, in fp32 where they meet a tensor."""

    decay: float
    beta1: float
    beta2: float
    step_size: float
    inverse_root2: float
    eps: float

    @classmethod
    def of(cls, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> Coefficients:
        """For optimizer step `step`, counted from 1."""
        beta1, beta2 = betas
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        return cls(1 - lr * weight_decay, beta1, beta2, lr / correction1, 1 / math.sqrt(correction2), eps)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    coefficients: Coefficients,
    copy: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) in fp32, without fused multiply-adds.

    Args:
        param: fp32 or bf16, updated.
        grad: fp32 or bf16.
        exp_avg: fp32, updated.
        exp_avg_sq: fp32, updated.
        coefficients: of this step.
        copy: bf16, the weight that an fp32 `param` is the master of; written.
        rounding: round what becomes bf16 by chance. None: to the nearest.
    """
    c = coefficients
    gradient = grad.float()
    exp_avg.copy_(exp_avg * c.beta1 + gradient * (1 - c.beta1))
    exp_avg_sq.copy_(exp_avg_sq * c.beta2 + gradient * gradient * (1 - c.beta2))
    root = exp_avg_sq.double().sqrt().float()  # rounded rightly, as torch's own for fp32 is not on every CPU
    denominator = root * c.inverse_root2 + c.eps
    updated = param.float() * c.decay - exp_avg * c.step_size / denominator
    narrow = updated.to(torch.bfloat16)
    if rounding is not None:
        elements = torch.arange(param.numel(), device=param.device).view(param.shape)
        narrow = round_stochastically(updated, philox(elements, rounding))
    param.copy_(narrow if param.dtype is torch.bfloat16 else updated)
    if copy is not None:
        copy.copy_(narrow)
