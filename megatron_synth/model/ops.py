"""The only way to the kernels: the operations that a model is made of, and the seams of megatron-core they go into.

Shapes: S tokens, B sequences, H hidden size, A query heads, G key/value heads, D channels of a head, V vocabulary, F MLP width.
Under tensor parallelism A, G, V and F are a rank's own part; under sequence parallelism S is too, outside attention and MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel import layers as mcore_layers
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_synth.model.documents import Documents
from megatron_synth.model.objective import Losses, Objective
from megatron_synth_kernels import registry
from megatron_synth_kernels.torch import fp8 as fp8
from megatron_synth_kernels.torch.attention.context import chunks_of as chunks_of
from megatron_synth_kernels.torch.attention.context import context_attention
from megatron_synth_kernels.torch.fp8 import E4M3 as E4M3
from megatron_synth_kernels.torch.fp8 import E5M2 as E5M2
from megatron_synth_kernels.torch.fp8 import Pair as Pair
from megatron_synth_kernels.torch.fp8 import Quantized as Quantized
from megatron_synth_kernels.torch.fp8 import Scaling as Scaling
from megatron_synth_kernels.torch.fp8 import Source as Source
from megatron_synth_kernels.torch.linear_cross_entropy import Part, linear_cross_entropy
from megatron_synth_kernels.torch.loss import cross_entropy
from megatron_synth_kernels.torch.rope import ScaledBase


def quantizer() -> Any:
    """The module of the FP8 quantizers that was chosen: amax_of, quantize_*, transpose, as in `fp8`."""
    return registry.get("quantise_fp8")


def quantizing_swiglu() -> Any:
    """The module of SwiGLU that quantizes: SwiGLU, SwiGLUGradient."""
    return registry.get("swiglu_quantise")


def quantizing_rms_norm() -> Any:
    """The module of RMSNorm that quantizes: Normalized, gradients."""
    return registry.get("rms_norm_quantise")


def connect() -> None:
    """Give megatron-core the optimizer and the weight-gradient product that were chosen.

    It binds both at import by module globals, and in two modules the optimizer, to what it finds in TransformerEngine or apex.
    """
    mcore_optimizer.Adam = distrib_optimizer.Adam = registry.get("adam")
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = False  # `step` is in the param group, as with apex
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    mcore_layers.fused_weight_gradient_mlp_cuda = registry.get("wgrad")
    mcore_layers._grad_accum_fusion_available = True
    tensor_parallel.CheckpointWithoutOutput = CheckpointWithoutOutput


class CheckpointWithoutOutput(mcore_random.CheckpointWithoutOutput):
    """Drops an output after its use and makes it again in the backward pass.

    megatron-core's own takes its default, fp8=False, for FP8 and then asks a TransformerEngine that may not be there.
    """

    def __init__(self, fp8: bool = False):
        super().__init__(True if fp8 else None)


_NORMALISED = "_normalized"
"""Attribute of a sum: the norm that made it, and what that norm made of it.

It belongs to the tensor, not to the module: so it is never another micro-batch's, and goes with the tensor when an error or a
stopped forward pass leaves it unused.
"""


class RMSNorm(torch.nn.Module):
    """RMSNorm over the hidden axis, [S, B, H] -> [S, B, H].

    megatron-core's own wrapper of torch's norm refuses sequence parallelism. This one marks its weight instead, so that
    finalize_model_grads sums its gradient over the tensor-parallel ranks.
    """

    in_linear = False
    """Whether the linear layer behind it normalizes as it quantizes; this module then holds the weight and passes x on."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps
        self._rms_norm, self._rms_norm_residual = registry.get("rms_norm"), registry.get("rms_norm_residual")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """[S, B, H] -> [S, B, H]. With `residual`, [S, B, H], the norm of x + residual, and this sum."""
        if self.in_linear:
            assert residual is None
            return x
        if residual is not None:
            return self._rms_norm_residual(x, residual, self.weight, self.eps)
        made_by, made = x.__dict__.pop(_NORMALISED, (None, None))
        return made if made_by is self else self._rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x + residual, whose norm is made in the same pass and handed out when this module is called with the sum."""
        normalized, total = self(x, residual)  # a call, since hooks on this module see to it that its weight has arrived
        setattr(total, _NORMALISED, (self, normalized))
        return total


class AddForNorm:
    """The residual addition before a norm, in the place of megatron-core's bias-dropout-add. There is no bias, no dropout."""

    def __init__(self, norm: RMSNorm):
        self._norm = norm

    def __call__(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """What megatron-core calls with (output, bias), the residual stream and the dropout's probability."""
        return self._add

    def _add(self, output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        assert output[1] is None and dropout == 0.0
        return self._norm.add(output[0], residual)


def join_additions_to_norms(layers: Sequence[Any], final_norm: RMSNorm | None, recompute: str | None) -> None:
    """Make each residual addition and the norm after it one operation.

    Attention's output is added by the norm before the MLP, the MLP's by the next layer's first norm or, after the last layer,
    by the final one. At the end of a stage there is no norm: the addition stays as it is, as its sum is sent on. So it does
    before a norm that a linear layer makes as it quantizes, which moves as many bytes or fewer: that norm's output is never
    written.

    Args:
        layers: megatron-core's of a model chunk, in order.
        final_norm: after the last layer; None where the chunk ends without one.
        recompute: megatron-core's recompute_granularity. Under `full` what a layer returns is another tensor for the next
            one, so only the additions within layers are joined; under `selective` a norm is made from the sum alone, once more
            in the backward pass, so none is.
    """
    if recompute == "selective":
        return
    following = [*(layer.input_layernorm for layer in layers[1:]), final_norm]
    for layer, norm in zip(layers, following, strict=True):
        # megatron-core makes the addition with gradients, always; a norm made so would keep its inputs in an evaluation, too
        layer.bias_dropout_add_exec_handler = nullcontext
        if not layer.pre_mlp_layernorm.in_linear:
            layer.self_attn_bda = AddForNorm(layer.pre_mlp_layernorm)
        if norm is not None and recompute is None and not norm.in_linear:
            layer.mlp_bda = AddForNorm(norm)


class _Split(torch.autograd.Function):
    """[S, B, G (A / G + 2) D] -> its queries [S, B, G, A / G, D], keys and values [S, B, G, D], as views.

    Where the three gradients lie in one tensor as they were split, the gradient is that tensor; else they are joined by a copy.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, groups: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.shape = mixed.shape
        grouped = mixed.detach().unflatten(-1, (groups, -1, channels))
        return grouped[..., :-2, :], grouped[..., -2, :], grouped[..., -1, :]

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None]:
        whole = _whole(query, key, value)
        if whole is None:
            whole = torch.cat((query, key.unsqueeze(3), value.unsqueeze(3)), dim=3)
        return whole.reshape(ctx.shape), None, None


def _whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """The contiguous [S, B, G, A / G + 2, D] that these are the parts of; None if there is none."""
    sequence, batch, groups, per_group, channels = query.shape
    shape = (sequence, batch, groups, per_group + 2, channels)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(5))
    first = query.storage_offset()
    parts = (query, strides, 0), (key, (*strides[:3], 1), per_group), (value, (*strides[:3], 1), per_group + 1)
    for part, expected, place in parts:
        if part.untyped_storage().data_ptr() != query.untyped_storage().data_ptr():
            return None
        if part.stride() != expected or part.storage_offset() != first + place * channels:
            return None
    return query.as_strided(shape, strides)


class JoinedSelfAttention(SelfAttention):
    """megatron-core's, but the gradients of queries, keys and values are made in one tensor where CoreAttention can do so.

    Theirs are joined by a copy in every layer, and queries of several heads to a group are copied before they are used.
    """

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, output_gate: bool = False, split_qkv: bool = True
    ) -> Any:
        """[S, B, H] -> queries [S, B, G, A / G, D] or [S, B, A, D], keys and values [S, B, G, D]."""
        if not self.core_attention.joins or self.config.num_query_groups < self.world_size:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        assert split_qkv and not output_gate
        mixed, _ = self.linear_qkv(hidden_states)
        return _Split.apply(mixed, self.num_query_groups_per_partition, self.hidden_size_per_attention_head)


class CoreAttention(torch.nn.Module):
    """Causal self-attention of one rank's heads, in the place of megatron-core's DotProductAttention.

    It also rotates queries and keys. megatron-core would do that just before, but computes the tables again in every layer and
    leaves the result in an order that attention must copy.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        rotary_base: float | ScaledBase,
        window: int | None,
        overwrite: bool,
        **_: Any,
    ):
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal
        assert config.attention_dropout == 0.0, "attention dropout is not implemented"
        self.scale = 1.0 / math.sqrt(config.kv_channels)
        self.rotary_base, self.window = rotary_base, window
        self._rope, self._attention = registry.get("rope"), registry.get("attention")
        self._context = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None
        # Nothing reads queries and keys as they were, except a second forward pass of this module alone.
        again = config.recompute_granularity == "selective" and "core_attn" in (config.recompute_modules or ())
        self._overwrite = overwrite and not again
        self._joined = getattr(self._rope, "joined", None) if self._overwrite else None

    @property
    def joins(self) -> bool:
        """Whether `forward` takes queries in groups, and makes the three gradients in one tensor."""
        return self._joined is not None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        packed_seq_params: Documents | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[S, B, A, D] or, where it joins, [S, B, G, A / G, D], and twice [S, B, G, D] -> [S, B, A * D].

        The causal mask is implied. Positions count from 0 in each row or, if they are given, in each document. Where ranks
        share the sequence, S is this rank's part.
        """
        assert attention_mask is None and kwargs.get("attention_bias") is None
        documents = packed_seq_params
        positions = None if documents is None else documents.position_ids
        if self._context is not None:
            return self._of_part(query, key, value, documents, self._context)
        query, key, value = self._rotated(query, key, value, positions)
        ends = (None, None) if documents is None else (documents.cu_seqlens, documents.max_seqlen)
        return self._attention(query, key, value, self.scale, *ends, self.window)  # type: ignore[no-any-return]

    def sampled(
        self, query: Tensor, key: Tensor, documents: Documents | None, row: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a row attends with, for who watches: copies, and the arguments stay as they are.

        Args:
            query: as that of `forward`.
            key: as that of `forward`.
            documents: as its packed_seq_params.
            row: which.

        Returns:
            Rotated query [S, A, D] and key [S, G, D] of this rank's tokens of the row; [S] the place of each in the row, and
            [S] the place at which its document begins.
        """
        length = query.shape[0] * (1 if self._context is None else self._context.size())
        places = self.places(query.shape[0], query.device)
        positions = places if documents is None else documents.position_ids[row].long()
        heads = query.flatten(2, 3) if query.dim() == 5 else query
        rows = heads[:, row : row + 1].clone(), key[:, row : row + 1].clone()
        query, key = self._rope(*rows, self.rotary_base, positions[None], False, length)
        return query.squeeze(1), key.squeeze(1), places, places - positions

    def places(self, length: int, device: torch.device) -> Tensor:
        """[S] int64: where in the row the S tokens of this rank are."""
        if self._context is None:
            return torch.arange(length, device=device)
        size = self._context.size()
        return _positions(self._context.rank(), size, size * length, 1, device)[0].long()

    @property
    def context_group(self) -> ProcessGroup | None:
        """The ranks that share each sequence; None: this one has all of it."""
        return self._context

    def _rotated(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None, length: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if query.dim() == 5:
            assert self._joined is not None
            return self._joined(query, key, value, self.rotary_base, positions, self._overwrite, length)  # type: ignore[no-any-return]
        return *self._rope(query, key, self.rotary_base, positions, self._overwrite, length), value

    def _of_part(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, group: ProcessGroup) -> Tensor:
        """As `forward`, of this rank's tokens."""
        length = query.shape[0] * group.size()
        if documents is None:
            positions = _positions(group.rank(), group.size(), length, query.shape[1], query.device)
        else:
            positions = documents.position_ids
        query, key, value = self._rotated(query, key, value, positions, length)
        ends = None if documents is None else documents.cu_seqlens
        return context_attention(query, key, value, self.scale, group, ends, self.window)


@lru_cache(maxsize=8)
def _positions(rank: int, size: int, length: int, rows: int, device: torch.device) -> Tensor:
    """[B, S / c]: where in the row the tokens of a rank are."""
    chunks = torch.arange(length, dtype=torch.int32, device=device).view(2 * size, -1)
    return torch.cat([chunks[chunk] for chunk in chunks_of(rank, size)]).expand(rows, -1).contiguous()


class SwiGLUMLP(MLP):
    """megatron-core's MLP with silu(gate) * up and nothing else between its two linear layers (Shazeer, 2020)."""

    in_linear = False
    """Whether the second linear layer applies the activation as it quantizes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._swiglu = registry.get("swiglu")

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **_: Any) -> tuple[Tensor, None]:
        """[S, B, H] -> [S, B, H] and no bias. Under selective recomputation the activation's output is not kept."""
        assert per_token_scale is None
        gate_and_up, _ = self.linear_fc1(hidden_states)
        if self.in_linear:
            out, bias = self.linear_fc2(gate_and_up)
        elif self.config.recompute_granularity == "selective" and self.training and torch.is_grad_enabled():
            checkpoint = CheckpointWithoutOutput()
            out, bias = self.linear_fc2(checkpoint.checkpoint(self._swiglu, gate_and_up))
            checkpoint.discard_output_and_register_recompute(out)
        else:
            out, bias = self.linear_fc2(self._swiglu(gate_and_up))
        assert bias is None
        return out, None


def output_and_loss(
    input: Tensor,
    weight: Tensor,
    bias: None,
    *,
    labels: Tensor,
    objective: Objective | None,
    vocab_size: int,
    sequence_parallel: bool,
    tp_group: ProcessGroup,
    **_: Any,
) -> Losses:
    """Output layer and loss in one, in the place of `_forward_impl` of megatron-core's ColumnParallelLinear.

    Args:
        input: [S, B, H], the whole sequence or, under sequence parallelism, this rank's part of it.
        weight: [V / tensor-parallel size, H].
        bias: none.
        labels: [B, S] of the whole sequence.
        objective: None for an evaluation: no gradients are made.
        vocab_size: tokens of the whole vocabulary; rows beyond are padding, with no probability and no gradient.
        sequence_parallel: whether the input is a part.
        tp_group: the tensor-parallel ranks.
    """
    assert bias is None
    # In the backward pass these add up the parts of the gradient that the ranks' parts of the vocabulary give.
    gather = gather_from_sequence_parallel_region if sequence_parallel else copy_to_tensor_model_parallel_region
    hidden = gather(input, group=tp_group)
    length, batch, _ = hidden.shape
    part = Part(tp_group.rank() * len(weight), tp_group, vocab_size)
    total, losses, log_sum_exp = linear_cross_entropy(
        hidden.flatten(0, 1),
        weight,
        labels.t().flatten(),
        None if objective is None else objective.token_weights.t().flatten(),
        grad_scale=1.0 if objective is None else objective.grad_scale,
        z_loss=0.0 if objective is None else objective.z_loss,
        part=part,
    )
    return Losses(total, losses.view(length, batch).t(), log_sum_exp.view(length, batch).t())


def loss_of_logits(logits: Tensor, labels: Tensor, objective: Objective | None, vocab_size: int) -> Losses:
    """The loss where the output layer has made the logits, whole.

    Args:
        logits: [S, B, V / tensor-parallel size]; those of padding are overwritten.
        labels: [B, S], global token ids.
        objective: None for an evaluation.
        vocab_size: tokens of the whole vocabulary; entries beyond are padding, with no probability and no gradient.
    """
    entries = logits.shape[-1]
    part = Part(parallel_state.get_tensor_model_parallel_rank() * entries, None, vocab_size)
    with torch.no_grad():  # exp(-inf) is 0, and so is the gradient
        logits[..., part.valid(entries) :] = -torch.inf
    labels = labels.t().contiguous()
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        losses = cross_entropy(logits, labels).t()
    else:
        losses = vocab_parallel_cross_entropy(logits, labels).t()
    if objective is None:
        return Losses(losses.new_zeros(()), losses, None)
    weights = objective.token_weights
    assert objective.z_loss == 0.0, "the z-loss comes with the fused loss"
    return Losses((losses * weights).where(weights != 0, 0.0).sum(), losses.detach(), None)
