"""Operations of TransformerEngine (2.9 to 2.11) behind our signatures: its CUDA kernels, without its modules."""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine_torch as tex
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformer_engine.pytorch.constants import TE_DType

from megatron_synth_kernels.launch import as_rows


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        lines = as_rows(x).contiguous()
        weight = weight.to(x.dtype)
        out, _, inverse = tex.rmsnorm_fwd(lines, weight, eps, None, None, TE_DType[x.dtype], 0, False)
        ctx.save_for_backward(lines, weight, inverse)
        return out.view(x.shape)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        lines, weight, inverse = ctx.saved_tensors
        grad_x, grad_weight = tex.rmsnorm_bwd(as_rows(grad).contiguous(), lines, inverse, weight, 0, False)
        return grad_x.view(grad.shape), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As norm.rms_norm: x [..., H], weight [H] -> [..., H]."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        lines = as_rows(gate_and_up).contiguous()
        ctx.save_for_backward(lines)
        out = tex.swiglu(lines, None)  # like ours, and unlike torch's GLU, the gate comes first
        return out.view(*gate_and_up.shape[:-1], -1)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (lines,) = ctx.saved_tensors
        grad_x = tex.dswiglu(as_rows(grad).contiguous(), lines, None)
        return grad_x.view(*grad.shape[:-1], -1)  # type: ignore[no-any-return]


def swiglu(gate_and_up: Tensor) -> Tensor:
    """As swiglu.swiglu: [..., 2F] -> [..., F]."""
    return _SwiGLU.apply(gate_and_up)  # type: ignore[no-any-return, no-untyped-call]
