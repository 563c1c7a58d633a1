"""Modules that other families than Llama have: norms over all heads, and norms of what is added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_synth.model.ops import RMSNorm


class AddNormalized(torch.nn.Module):
    """x + RMSNorm(output), in the place of megatron-core's bias-dropout-add. There is no bias, no dropout."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """What megatron-core calls with (output, bias), the residual stream [S, B, H] and the dropout's probability."""
        return self._add

    def _add(self, output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        assert output[1] is None and dropout == 0.0
        normalized: Tensor = self.norm(output[0])
        return residual + normalized


class NormOfAllHeads(torch.nn.Module):
    """RMSNorm over the channels of all heads together, [S, B, A, D] -> [S, B, A, D], in fp32 and rounded at the end.

    Tensor-parallel ranks have their heads' part of the weight, [A D], and of the sum of squares, which they add up.
    """

    def __init__(self, heads: int, *, config: TransformerConfig, hidden_size: int, eps: float):
        """heads: of all ranks. hidden_size: channels of one, as megatron-core has it."""
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.eps, channels = eps, heads // self.group.size() * hidden_size
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(channels, dtype=config.params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, A, D] -> [S, B, A, D]."""
        return _NormOverRanks.apply(x.flatten(2), self.weight, self.eps, self.group).view(x.shape)  # type: ignore[no-any-return, no-untyped-call]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """As megatron-core's modules: the weight, shared by tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)  # type: ignore[no-any-return]


class _NormOverRanks(torch.autograd.Function):
    """y = w x r with r = (mean of x^2 + eps)^(-1/2), the mean over the channels of all ranks.

    So dx = r (g - z mean(g z)) with z = x r and g = w dy; the mean is over the channels of all ranks again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, group: ProcessGroup) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(_mean(wide.square(), group) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.group = group
        return (wide * scale * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normalized, grad = x.float() * scale, grad.float()
        weighted = grad * weight
        dx = scale * (weighted - normalized * _mean(weighted * normalized, ctx.group))
        return dx.to(x.dtype), (grad * normalized).flatten(0, -2).sum(0).to(weight.dtype), None, None


def _mean(x: Tensor, group: ProcessGroup) -> Tensor:
    """[..., A D / ranks] -> [..., 1]: over the channels of all ranks."""
    total = x.sum(-1, keepdim=True)
    if group.size() > 1:
        torch.distributed.all_reduce(total, group=group)
    return total / (x.shape[-1] * group.size())
