"""AdamW in Triton: one pass over each tensor, BF16 weights rounded by chance on request.

Bytes per parameter with an fp32 weight and gradient: 28, and 2 for a BF16 copy. With a BF16 weight and no master: 24 or 22.
Every tensor is one launch, where TransformerEngine's, apex's and torch's kernels take all tensors at once; it is there for
what they do not have, BF16 weights without a master.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_synth_kernels.launch import ceil_div
from megatron_synth_kernels.torch.adam import FusedAdam
from megatron_synth_kernels.torch.adam_reference import PHILOX_ROUNDS, Coefficients, Rounding
from megatron_synth_kernels.triton.math import rounded

_BLOCK = 1024


@triton.jit
def _narrow(x, element, seed, stream, step, ROUNDING: tl.constexpr, ROUNDS: tl.constexpr):
    """fp32 -> bf16, by chance or to the nearest."""
    if ROUNDING:
        zero = (element * 0).to(tl.uint32)
        bits, _, _, _ = tl.philox(
            seed,
            element.to(tl.uint32),
            (element >> 32).to(tl.uint32),
            zero + stream.to(tl.uint32),
            zero + step.to(tl.uint32),
            ROUNDS,
        )
        word = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
        cut = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), cut, x)
    return rounded(x, tl.bfloat16)


@triton.jit(do_not_specialize=["stream", "step", "seed"])
def adamw_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    copy_ptr,
    elements,
    decay,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    step_size,
    inverse_root2,
    eps,
    seed,
    stream,
    step,
    COPY: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of one tensor."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < elements
    param = tl.load(param_ptr + element, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + element, mask=mask, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + element, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + element, mask=mask, other=0.0)
    # in the order of the reference and without fused multiply-adds: the same bits
    exp_avg = exp_avg * beta1 + grad * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    denominator = tl.sqrt_rn(exp_avg_sq) * inverse_root2 + eps
    updated = param * decay - tl.div_rn(exp_avg * step_size, denominator)
    tl.store(exp_avg_ptr + element, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + element, exp_avg_sq, mask=mask)
    if param_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(param_ptr + element, _narrow(updated, element, seed, stream, step, ROUNDING, ROUNDS), mask=mask)
    else:
        tl.store(param_ptr + element, updated, mask=mask)
    if COPY:
        tl.store(copy_ptr + element, _narrow(updated, element, seed, stream, step, ROUNDING, ROUNDS), mask=mask)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    coefficients: Coefficients,
    copy: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:
    """As adam_reference.adamw_, on contiguous tensors."""
    assert all(x.is_contiguous() for x in (param, grad, exp_avg, exp_avg_sq, *(() if copy is None else (copy,))))
    c, r = coefficients, rounding or Rounding(0, 0, 0)
    if not param.numel():
        return
    adamw_kernel[(ceil_div(param.numel(), _BLOCK),)](
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        copy,
        param.numel(),
        c.decay,
        c.beta1,
        c.beta2,
        1 - c.beta1,
        1 - c.beta2,
        c.step_size,
        c.inverse_root2,
        c.eps,
        r.seed,
        r.stream,
        r.step,
        COPY=copy is not None,
        ROUNDING=rounding is not None,
        ROUNDS=PHILOX_ROUNDS,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )


class TritonAdam(FusedAdam):
    """FusedAdam by one Triton kernel per tensor; moments in fp32 for weights of any type.

    Args of FusedAdam, and
        rounding_seed: BF16 weights without an fp32 master are rounded by chance, with bits that depend on this, the parameter's
            number and the step. None: to the nearest.
    """

    def __init__(self, params: Any, *args: Any, rounding_seed: int | None = None, **kwargs: Any):
        super().__init__(params, *args, **kwargs)
        self.rounding_seed = rounding_seed
        self._streams = {p: stream for stream, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        coefficients = Coefficients.of(group["lr"], group["betas"], group["eps"], group["weight_decay"], group["step"])
        for p in params:
            rounding = None
            if self.rounding_seed is not None and p.dtype is torch.bfloat16:
                rounding = Rounding(self.rounding_seed, self._streams[p], group["step"])
            assert p.grad is not None
            state = self.state[p]
            adamw_(p, p.grad, state["exp_avg"], state["exp_avg_sq"], coefficients, rounding=rounding)

    def _moment(self, param: Tensor) -> Tensor:
        return torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; torch's own would turn the moments into the type of the weights."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name in ("exp_avg", "exp_avg_sq"):
                    self.state[p][name] = value.detach().to(device=p.device, dtype=torch.float32, copy=True)
