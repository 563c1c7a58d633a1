"""FP8 linear layers, in the place of megatron-core's column- and row-parallel ones.

A layer has three products, all of them A B^T of operands whose summed axis is contiguous, the one order that Hopper multiplies:

    forward      y  [T, N] = x    [T, K] (w   [N, K])^T
    input's      dx [T, K] = dy   [T, N] (w^T [K, N])^T
    weight's     dw [N, K] = dy^T [N, T] (x^T [K, T])^T      in fp32, added to main_grad

T tokens of the whole sequence (S x B), K channels in, N out; under tensor parallelism K or N is a rank's part.

Kept for the backward pass is the quantized x^T: one byte per number. Under sequence parallelism it is this rank's part of x, as
in megatron-core. With one scale per tensor the parts are quantized first and gathered in FP8, forward and backward, at half the
traffic of bf16. Blocks of 128 tokens may cross ranks, so with block scales the parts are gathered as they are.

Where RMSNorm or SwiGLU makes the input, the layer does it as it quantizes (`normalize_with`, `activate_after`), and what they
would have written is never in memory. SwiGLU's gradient, which the layer before it needs in FP8 and nobody in any other form,
is quantized as it is made, too, and handed to that layer beside autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import layers as mcore_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_synth.model import ops
from megatron_synth.model.fp8.recipe import GRAD, INPUT, WEIGHT, Fp8Layer, Fp8Run
from megatron_synth.model.ops import Quantized, Source


class _Normalized:
    """RMSNorm between a layer's input and its product."""

    def __init__(self, run: Fp8Run, eps: float):
        self._run, self._eps = run, eps

    def source(self, x: Tensor, norm_weight: Tensor | None) -> Source:
        """Of x [T, K]."""
        return self._run.rms_norm.Normalized(x, norm_weight, self._eps)  # type: ignore[no-any-return]

    def kept(self, source: Any, x: Tensor, norm_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        """For `gradients`."""
        return x, norm_weight, source.inverse

    def gradients(self, grad: Tensor, shape: torch.Size, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Of x, viewed as `shape`, and of the norm's weight."""
        grad_x, grad_weight = self._run.rms_norm.gradients(grad, *kept)
        return grad_x.view(shape), grad_weight


class _Activated:
    """SwiGLU between a layer's input and its product. `before` is the layer that made the input."""

    def __init__(self, run: Fp8Run, before: Fp8Layer):
        self._run, self._before = run, before

    def source(self, x: Tensor, norm_weight: Tensor | None) -> Source:
        """Of x [T, 2 K]."""
        return self._run.swiglu.SwiGLU(x)  # type: ignore[no-any-return]

    def kept(self, source: Any, x: Tensor, norm_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        """For `gradients`."""
        return (x,)

    def gradients(self, grad: Tensor, shape: torch.Size, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """What stands for that of x, viewed as `shape`; the layer before has the numbers."""
        source = self._run.swiglu.SwiGLUGradient(grad, *kept)
        return self._before.hand_gradient(source, shape, grad), None


class _Linear(torch.autograd.Function):
    """x [S or S / TP, B, K], w [N, K] -> [S, B, N]. With `made` (and norm_weight [K]) the input is what that makes of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        weight: Tensor,
        layer: Fp8Layer,
        made: _Normalized | _Activated | None,
        training: bool,
        allreduce_dgrad: bool,
        gathers: bool,
        group: Any,
    ) -> Tensor:
        part = x.reshape(-1, x.shape[-1])
        source = part if made is None else made.source(part, norm_weight)
        w, w_transposed = layer.weight(weight)
        tensorwise = layer.run.recipe.tensorwise
        kept: Quantized | None
        if not gathers:
            operand, kept = layer.quantize(INPUT, source, transposed=training, recorded=training)
        elif tensorwise:
            kept, _ = layer.quantize(INPUT, source, transposed=False, recorded=training)
            assert kept is not None
            operand = Quantized(_gather(kept.data, group)[0], kept.scale)
        else:
            assert made is None
            operand, _ = layer.quantize(INPUT, _gather(part, group)[0], transposed=False, recorded=training)
            kept = None
        assert operand is not None
        y = ops.fp8.product(operand, w, x.dtype, fast_accumulation=tensorwise)
        if training:
            before = () if made is None else made.kept(source, part, norm_weight)
            if kept is None:
                ctx.save_for_backward(part, None, weight)
            else:
                ctx.save_for_backward(kept.data, kept.scale, weight, *before)
                ctx.block = kept.block
            ctx.w_transposed, ctx.layer, ctx.group, ctx.made = w_transposed, layer, group, made
            ctx.allreduce_dgrad, ctx.gathers, ctx.shape, ctx.dtype = allreduce_dgrad, gathers, x.shape, x.dtype
        length = x.shape[0] * group.size() if gathers else x.shape[0]
        return y.view(length, *x.shape[1:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        data, scale, weight, *before = ctx.saved_tensors
        layer, group = ctx.layer, ctx.group
        wants_x, wants_norm, wants_weight = ctx.needs_input_grad[:3]
        whole, gathering = data, None
        if ctx.gathers and wants_weight:
            whole, gathering = _gather(data, group, wait=False)
        dy, dy_transposed = layer.gradient(grad, transposed=wants_weight)
        dx = dw = d_norm = pending = None
        if wants_x or wants_norm:
            dx = ops.fp8.product(dy, ctx.w_transposed, ctx.dtype)
            # as in megatron-core, the communication that the weight's product hides is asked for first
            if gathering is not None:
                gathering.wait()
            if ctx.allreduce_dgrad:
                pending = torch.distributed.all_reduce(dx, group=group, async_op=True)
            elif ctx.gathers:
                summed = torch.empty((dx.shape[0] // group.size(), dx.shape[1]), dtype=dx.dtype, device=dx.device)
                pending = mcore_layers.dist_reduce_scatter_func(summed, dx, group=group, async_op=True)
                dx = summed
        elif gathering is not None:
            gathering.wait()
        if wants_weight:
            if not ctx.gathers:
                x_transposed = Quantized(data, scale, ctx.block)
            elif scale is not None:
                x_transposed = Quantized(layer.run.quantizer.transpose(whole), scale)
            else:
                _, x_transposed = layer.quantize(INPUT, whole, row=False, recorded=False)
            dw = _accumulate(weight, ops.fp8.product(dy_transposed, x_transposed, torch.float32), ctx.dtype)
        if pending is not None:
            pending.wait()
        if dx is not None and ctx.made is not None:
            dx, d_norm = ctx.made.gradients(dx, ctx.shape, tuple(before))
        elif dx is not None:
            dx = dx.view(ctx.shape)
        return dx, d_norm, dw, *[None] * 6


def _gather(part: Tensor, group: Any, *, wait: bool = True) -> tuple[Tensor, Any]:
    """[T / TP, K] of every rank -> [T, K], and what to wait for."""
    whole = torch.empty((part.shape[0] * group.size(), part.shape[1]), dtype=part.dtype, device=part.device)
    as_bytes = part.element_size() == 1  # communication knows no FP8
    source, target = (part.view(torch.uint8), whole.view(torch.uint8)) if as_bytes else (part, whole)
    handle = mcore_layers.dist_all_gather_func(target, source.contiguous(), group=group, async_op=not wait)
    return whole, handle


def _accumulate(weight: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Add to main_grad, where megatron-core's data parallelism has put one, and return what autograd is to be given."""
    if not hasattr(weight, "main_grad"):
        return gradient.to(dtype)
    weight.main_grad.add_(gradient)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # its hook, which starts the reduction of the bucket, runs only if there is a gradient; nobody reads it
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's, its products in FP8. Output channels are shared by tensor-parallel ranks."""

    def __init__(self, *args: Any, fp8: Fp8Run, name: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert not self.explicit_expert_comm and not self.config.defer_embedding_wgrad_compute
        parts = {WEIGHT, GRAD} | ({INPUT} if self.sequence_parallel else set())
        self.fp8 = fp8.add(name, frozenset(parts), self.tp_group)
        self._norm: Callable[[], Tensor | None] = lambda: None
        self._made: _Normalized | None = None

    def normalize_with(self, norm: ops.RMSNorm) -> bool:
        """Do what `norm`, which makes this layer's input and nothing else's, did; False where that saves nothing.

        Blocks that cross ranks are quantized from what was gathered, so the norm's output is needed as it is.
        """
        if self.sequence_parallel and not self.fp8.run.recipe.tensorwise:
            return False
        self._norm = lambda: norm.weight  # no attribute: its weight would be a parameter of this layer, too
        self._made = _Normalized(self.fp8.run, norm.eps)
        norm.in_linear = True
        return True

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        arguments = (options["allreduce_dgrad"], options["sequence_parallel"], self.tp_group)
        out: Tensor = _Linear.apply(input, self._norm(), weight, self.fp8, self._made, torch.is_grad_enabled(), *arguments)
        return out if self.bias is None else out + self.bias


class Fp8RowParallelLinear(RowParallelLinear):
    """megatron-core's, its products in FP8. Input channels are shared by tensor-parallel ranks."""

    def __init__(self, *args: Any, fp8: Fp8Run, name: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert self.bias is None and not self.explicit_expert_comm
        self.fp8 = fp8.add(name, frozenset({INPUT, WEIGHT}), self.tp_group)
        self._made: _Activated | None = None

    def activate_after(self, before: Fp8ColumnParallelLinear) -> None:
        """Apply SwiGLU to the output of `before`, which is used nowhere else."""
        self._made = _Activated(self.fp8.run, before.fp8)

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        assert not options["allreduce_dgrad"] and not options["sequence_parallel"]  # both are outside the product here
        return _Linear.apply(  # type: ignore[no-any-return]
            input, None, weight, self.fp8, self._made, torch.is_grad_enabled(), False, False, self.tp_group
        )


def fuse(layer: Any) -> None:
    """Let the FP8 layers of a transformer layer do its norms and its activation; others stay as they are.

    What selective recomputation would drop of such a layer is not there: the outputs of norms and of SwiGLU.
    """
    qkv, mlp = layer.self_attention.linear_qkv, layer.mlp
    before = isinstance(layer.input_layernorm, ops.RMSNorm)
    if before and isinstance(qkv, Fp8ColumnParallelLinear) and qkv.normalize_with(layer.input_layernorm):
        layer.recompute_input_layernorm = False
    if not isinstance(mlp.linear_fc1, Fp8ColumnParallelLinear):
        return
    if before and mlp.linear_fc1.normalize_with(layer.pre_mlp_layernorm):
        layer.recompute_pre_mlp_layernorm = False
    mlp.linear_fc2.activate_after(mlp.linear_fc1)
    mlp.in_linear = True
