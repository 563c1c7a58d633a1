"""Elementwise operations as torch.compile makes them, from definitions in plain torch: one pass each, forward and backward.

Shapes are static in a run, so every shape is compiled once, in its first step; inductor keeps the result on disk. On a CPU it
writes C++, on a GPU Triton.
"""

from __future__ import annotations

import torch
import torch._inductor.config as inductor
from torch import Tensor

from megatron_synth_kernels.torch import rope as reference
from megatron_synth_kernels.torch import swiglu as _swiglu
from megatron_synth_kernels.torch.rope import ScaledBase

# Ranks compile at the same time: a pool of processes for each would take the cores from all.
inductor.compile_threads = 1


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _norm(total, weight, eps), total


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = x * cos + torch.cat((-second, first), dim=-1) * sin
    return out.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


rms_norm = torch.compile(_norm, fullgraph=True, dynamic=False)
"""As norm.rms_norm: x [..., H], weight [H] -> [..., H]."""
rms_norm_residual = torch.compile(_norm_residual, fullgraph=True, dynamic=False)
"""As norm.rms_norm_residual: x, residual [..., H], weight [H] -> rms_norm(x + residual), x + residual."""
swiglu = torch.compile(_swiglu.swiglu, fullgraph=True, dynamic=False)
"""As swiglu.swiglu: [..., 2F] -> [..., F]."""
_compiled_rotate = torch.compile(_rotate, fullgraph=True, dynamic=False)


def rope(
    query: Tensor,
    key: Tensor,
    base: float | ScaledBase,
    positions: Tensor | None = None,
    inplace: bool = False,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As rope.rope: query [S, B, A, D], key [S, B, G, D] -> both, rotated."""
    tables = reference.tables_at(query, base, positions, length)
    return _compiled_rotate(query, *tables), _compiled_rotate(key, *tables)
